"""A long sequence over several processes: a small causal model trains with each way to share out attention.

Starts the processes itself (gloo, on this machine). With ring_attention and ulysses_attention each holds a
part of the sequence, with head_parallel_attention all of it. All ways start from the same weights and must
end with those of a single process.

    python examples/ring_attention.py --ranks 4 --seq 16384
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing import spawn

from flash_attn_ext import flash_attention
from flash_attn_ext.distributed import (
    head_parallel_attention,
    ring_attention,
    shard_sequence,
    ulysses_attention,
)

VOCABULARY = 256
ZIGZAG = {"placement": "zigzag"}  # every rank has as much of a causal mask's triangle
# name: the attention, and how the sequence is held; None: whole, on every rank.
WAYS = {
    "ring": (partial(ring_attention, **ZIGZAG), ZIGZAG),
    "ulysses": (partial(ulysses_attention, **ZIGZAG), ZIGZAG),
    "head parallel": (head_parallel_attention, None),
}


class Model(nn.Module):
    """Tokens (batch, seq) at their places (seq,) to logits; `attend` is any attention of (q, k, v)."""

    def __init__(self, seq: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(seq, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, tokens: Tensor, places: Tensor, attend) -> Tensor:
        x = self.embed(tokens) + self.place(places)
        for qkv, project in zip(self.qkv, self.project, strict=True):
            q, k, v = qkv(F.rms_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            x = x + project(attend(q, k, v, causal=True).flatten(-2))
        return F.rms_norm(x, x.shape[-1:]) @ self.embed.weight.T / x.shape[-1] ** 0.5


def train(a: argparse.Namespace, attend, held: dict | None) -> dict:
    """`held`: how `shard_sequence` is to part the sequence among the ranks; None: every rank has it whole."""
    torch.manual_seed(0)
    model = Model(a.seq, a.width, a.heads, a.layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    text = torch.randint(VOCABULARY, (1, a.seq + 1))
    tokens, targets, places = text[:, :-1], text[:, 1:], torch.arange(a.seq)
    if held is not None:
        tokens, targets = (shard_sequence(t, **held) for t in (tokens, targets))
        places = shard_sequence(places, 0, **held)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    losses, start = [], time.perf_counter()
    for _ in range(a.steps):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(tokens, places, attend)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / a.seq
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if held is not None:  # a rank has the part of its tokens
            for p in model.parameters():
                dist.all_reduce(p.grad)
            dist.all_reduce(losses[-1])
        optimizer.step()
    seconds = (time.perf_counter() - start) / a.steps
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    return {"seconds": seconds, "kept": sum(kept.values()), "losses": torch.stack(losses), "weights": weights}


def process(rank: int, a: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=a.ranks)
    found = {name: train(a, *way) for name, way in WAYS.items()}
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"ranks": 2, "seq": 4096, "steps": 2, "width": 128, "heads": 4, "layers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(1)
    alone = train(a, flash_attention, None)
    with tempfile.TemporaryDirectory() as folder:
        spawn(process, (a, folder), nprocs=a.ranks)
        found = torch.load(Path(folder) / "found")

    print(f"{a.seq} tokens, {a.steps} steps, {a.ranks} processes of one thread each")
    print(f"{'':>14} | s / step | MiB kept per rank | last loss | error of weights")
    for name, result in {"one process": alone, **found}.items():
        error = (result["weights"] - alone["weights"]).abs().max().item()
        mebibytes, loss = result["kept"] / 2**20, result["losses"][-1].item()
        print(f"{name:>14} | {result['seconds']:8.3f} | {mebibytes:17.1f} | {loss:9.5f} | {error:16.1e}")
        torch.testing.assert_close(result["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=1e-4, atol=1e-5)
    print("all ways end with the weights of one process")


if __name__ == "__main__":
    main()
