"""Continuous batching over a paged cache: requests join and leave at every step, and share one pool of pages.

A small decoder with random weights serves many requests of different lengths. Each step decodes one token of
every request that runs; whoever is done gives its pages back, and whoever waits joins as soon as there are
enough. At the end every request is decoded once more, alone over a cache of its own: the tokens must be the
same.

    python examples/decode_paged.py --requests 64 --pages 200
"""

import argparse
import random
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flash_attn_ext import KVCache, PagedKVCache

VOCABULARY = 1000


class Layer(nn.Module):
    """Grouped-query attention and an MLP; `attend(q, k, v)` appends to a cache and attends to it."""

    def __init__(self, width: int, heads: int, heads_kv: int) -> None:
        super().__init__()
        self.heads, self.heads_kv, self.dim = heads, heads_kv, width // heads
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * heads_kv) * self.dim, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attend) -> Tensor:  # (batch, seq, width)
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, self.dim))
        q, k, v = qkv.split([self.heads, self.heads_kv, self.heads_kv], dim=2)
        x = x + self.project(attend(q, k, v).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Tokens (batch, seq) to the next token of each sequence; the caches turn q and k by their positions."""

    def __init__(self, layers: int, width: int, heads: int, heads_kv: int, longest: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, heads, heads_kv) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        dim = width // heads
        angles = torch.outer(torch.arange(longest), 1e4 ** (-torch.arange(0, dim, 2) / dim))
        self.rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}

    def forward(self, tokens: Tensor, caches: list) -> Tensor:
        """caches: for each layer a function of (q, k, v, **rotary)."""
        x = self.embed(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, lambda q, k, v, cache=cache: cache(q, k, v, **self.rotary))
        return F.linear(self.norm(x[:, -1]), self.embed.weight).argmax(-1)


@dataclass
class Request:
    prompt: list[int]
    wanted: int  # tokens
    tokens: list[int] = field(default_factory=list)
    sequence: int = -1  # its name in every layer's cache, while it runs

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.wanted


class Server:
    """One pool of pages for each layer."""

    def __init__(self, model: Decoder, pages: int, page_size: int) -> None:
        self.model, self.page_size = model, page_size
        layer = model.layers[0]
        self.pools = [PagedKVCache(pages, page_size, layer.heads_kv, layer.dim) for _ in model.layers]
        self.running: list[Request] = []

    def admit(self, request: Request) -> bool:
        """Starts a request if pages for all of it are left beside what the others may still take."""
        promised = sum(
            self._pages(r) - -(-self.pools[0].length(r.sequence) // self.page_size) for r in self.running
        )
        if self._pages(request) > self.pools[0].free_pages - promised:
            return False
        for pool in self.pools:  # each gives the same name
            request.sequence = pool.add()
        self._step([request], torch.tensor([request.prompt]))
        self.running.append(request)
        self._leave()
        return True

    def step(self) -> int:
        """Decodes a token of every running request; returns how many there were."""
        running = self.running
        self._step(running, torch.tensor([[r.tokens[-1]] for r in running]))
        self._leave()
        return len(running)

    def _pages(self, request: Request) -> int:
        return -(-(len(request.prompt) + request.wanted) // self.page_size)

    def _step(self, requests: list[Request], tokens: Tensor) -> None:
        names = [r.sequence for r in requests]

        def attend(pool: PagedKVCache):
            return lambda q, k, v, **rotary: pool.attend(names, q, k, v, **rotary)

        for request, token in zip(requests, self.model(tokens, list(map(attend, self.pools))), strict=True):
            request.tokens.append(int(token))

    def _leave(self) -> None:
        for request in self.running:
            if request.done:
                for pool in self.pools:
                    pool.free(request.sequence)
        self.running = [r for r in self.running if not r.done]


def alone(model: Decoder, request: Request) -> list[int]:
    """The same request over a cache of its own."""
    layer = model.layers[0]
    capacity = len(request.prompt) + request.wanted
    caches = [KVCache(1, capacity, layer.heads_kv, layer.dim).attend for _ in model.layers]
    tokens = [int(model(torch.tensor([request.prompt]), caches))]
    while len(tokens) < request.wanted:
        tokens.append(int(model(torch.tensor([tokens[-1:]]), caches)))
    return tokens


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"requests": 32, "pages": 120, "page_size": 16, "layers": 2, "width": 256, "heads": 8,
             "heads_kv": 2, "longest_prompt": 200, "most_tokens": 60}  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    a = parser.parse_args()
    torch.manual_seed(0)
    choose = random.Random(0)
    requests = [
        Request(
            [choose.randrange(VOCABULARY) for _ in range(choose.randint(1, a.longest_prompt))],
            choose.randint(1, a.most_tokens),
        )
        for _ in range(a.requests)
    ]
    model = Decoder(a.layers, a.width, a.heads, a.heads_kv, a.longest_prompt + a.most_tokens)
    server = Server(model, a.pages, a.page_size)

    waiting, steps, most, fullest = list(requests), 0, 0, 0
    start = time.perf_counter()
    while waiting or server.running:
        while waiting and server.admit(waiting[0]):
            waiting.pop(0)
        if not server.running and waiting:
            raise SystemExit("a request needs more pages than there are: raise --pages")
        most = max(most, len(server.running))
        fullest = max(fullest, a.pages - server.pools[0].free_pages)
        if server.running:
            server.step()
            steps += 1
    together = time.perf_counter() - start

    start = time.perf_counter()
    for request in requests:
        assert request.tokens == alone(model, request), "decoding together gave other tokens than alone"
    one_by_one = time.perf_counter() - start

    tokens = sum(r.wanted for r in requests)
    table = Table(title=f"{a.requests} requests, {tokens} tokens", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "seconds", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_row("together, paged", f"{together:.2f}", f"{tokens / together:.0f}")
    table.add_row("one by one", f"{one_by_one:.2f}", f"{tokens / one_by_one:.0f}")
    Console().print(table)
    print(
        f"{steps} steps, up to {most} requests at once in up to {fullest} of {a.pages} pages of "
        f"{a.page_size} keys; the tokens are the same"
    )


if __name__ == "__main__":
    main()
