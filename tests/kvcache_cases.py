"""Random calls of `flash_attention_with_kvcache`, and what they must give, sequence by sequence."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from reference import attend, unfused
from torch import Tensor


@dataclass
class CacheCall:
    arguments: dict  # of flash_attention_with_kvcache
    lengths: list[int]
    pads: list[int]
    rows: list  # of each sequence: what indexes the caches with the positions of its entry

    @property
    def added(self) -> int:
        k = self.arguments.get("k")
        return 0 if k is None else k.shape[1]

    def keys(self, b: int, cache: Tensor) -> Tensor:
        """The keys or values of a sequence, those that the call has added included: (n, heads, dim)."""
        return cache[self.rows[b]][self.pads[b] : self.lengths[b] + self.added]

    def untouched(self, cache: Tensor) -> Tensor:
        """Bool, like the first two axes of a cache: places that the call must not write."""
        kept = torch.ones(cache.shape[:2], dtype=torch.bool)
        for b, length in enumerate(self.lengths):
            places = torch.zeros(cache.shape[:2], dtype=torch.int64)
            places.view(-1)[:] = torch.arange(places.numel())
            kept.view(-1)[places[self.rows[b]][length : length + self.added]] = False
        return kept


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: list[int], interleaved: bool) -> Tensor:
    """x (seq, heads, dim) turned in fp64, pair by pair."""
    y = x.double().clone()
    pairs = cos.shape[1]
    for n in range(pairs):
        a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + pairs)
        c, s = (t[positions, n, None].double() for t in (cos, sin))
        y[..., a] = x[..., a].double() * c - x[..., b].double() * s
        y[..., b] = x[..., b].double() * c + x[..., a].double() * s
    return y


def _strided(r: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A cache: contiguous, heads before keys, part of a larger one, or with gaps between elements."""
    kind = r.choice(["plain", "plain", "heads-first", "part", "gaps"])
    if kind == "heads-first":
        return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
    if kind == "part":
        return torch.randn(shape[0], shape[1] + 1, shape[2] + 1, shape[3] + 3).to(dtype)[:, 1:, 1:, 3:]
    if kind == "gaps":
        return torch.randn(*shape[:3], 2 * shape[3]).to(dtype)[..., ::2]
    return torch.randn(shape).to(dtype)


def draw(seed: int, dtype: torch.dtype) -> CacheCall:
    r = random.Random(seed)
    torch.manual_seed(seed)
    batch = r.choice([1, 2, 3])
    heads_q, heads_kv = r.choice([(1, 1), (4, 4), (4, 2), (6, 1), (16, 2)])
    dim, dim_v = r.choice([(8, 8), (64, 64), (20, 12), (33, 40), (128, 128)])
    seq_q = r.choice([1, 1, 1, 2, 5, 17])
    added = r.choice([None, 0, 1, seq_q, 3])
    room = r.choice([20, 70, 200, 1500])
    lengths = [r.randint(0, room - (added or 0)) for _ in range(batch)]
    pads = [0] * batch
    a: dict = {"causal": r.choice([True, True, "bottom_right", "top_left", False])}
    if r.random() < 0.3:
        pads = [r.randint(0, n) for n in lengths]
        a["cache_leftpad"] = torch.tensor(pads, dtype=r.choice([torch.int32, torch.int64]))
    integers = r.choice([torch.int32, torch.int64])
    if r.random() < 0.15:
        lengths = [max(lengths)] * batch
        a["cache_lengths"] = lengths[0]
    else:
        a["cache_lengths"] = torch.tensor(lengths, dtype=integers)

    if r.random() < 0.5:
        size = r.choice([1, 3, 16, 64, 100, 256])
        need = -(-room // size)
        pages = batch * need + 2
        order = r.sample(range(pages), pages)
        table = torch.tensor([order[b * need : (b + 1) * need] for b in range(batch)])
        for b in range(batch):  # what no key lies in may be anything
            table[b, -(-(lengths[b] + (added or 0)) // size) :] = r.choice([-1, 10**6])
            table[b, : pads[b] // size] = -1
        a["block_table"] = table.to(integers) if r.random() < 0.5 else table.to(integers).T.contiguous().T
        shape: tuple[int, ...] = (pages, size)
        places = torch.arange(need * size)
        rows = [(table[b].clamp(0, pages - 1)[places // size], places % size) for b in range(batch)]
    else:
        entries = batch
        owners = list(range(batch))
        if r.random() < 0.4:
            entries = batch + r.randint(0, 2)
            owners = r.sample(range(entries), batch)
            a["cache_batch_idx"] = torch.tensor(owners, dtype=integers)
        shape = (entries, room)
        rows = [(owner, slice(None)) for owner in owners]
    a["k_cache"] = _strided(r, (*shape, heads_kv, dim), dtype)
    a["v_cache"] = _strided(r, (*shape, heads_kv, dim_v), dtype)
    a["q"] = torch.randn(batch, seq_q, heads_q, dim).to(dtype)
    if added is not None:
        a["k"] = torch.randn(batch, added, heads_kv, dim).to(dtype)
        a["v"] = torch.randn(batch, heads_kv, added, dim_v).to(dtype).transpose(1, 2)
        if r.random() < 0.5:
            pairs = r.choice([dim // 2, dim // 4, 1])
            angles = torch.randn(room + seq_q, pairs)
            tables = (angles.cos(), angles.sin())
            a["rotary_cos"], a["rotary_sin"] = (t.to(r.choice([dtype, torch.float32])) for t in tables)
            a["rotary_interleaved"] = r.random() < 0.5
    if r.random() < 0.3:
        a["window"] = (r.choice([None, 0, 7, 40]), r.choice([None, 0, 3]))
    if r.random() < 0.2:
        a["softcap"] = 2.5
    if r.random() < 0.2:
        a["scale"] = r.choice([0.3, -0.2, 0.0])
    if r.random() < 0.3:
        shape = (heads_q,) if r.random() < 0.5 else (batch, heads_q)
        a["alibi_slopes"] = torch.rand(shape)
    if r.random() < 0.3:
        a["sinks"] = torch.randn(heads_q)
    if r.random() < 0.3:
        a["num_splits"] = r.choice([1, 2, 7])
    if r.random() < 0.2:
        a["batch_invariant"] = True
    return CacheCall(a, lengths, pads, rows)


def queries(call: CacheCall, b: int) -> Tensor:
    """Of sequence b, turned and rounded once: (seq_q, heads_q, dim)."""
    a = call.arguments
    q = a["q"][b]
    if "rotary_cos" not in a:
        return q
    moving = a["causal"] is not False or any(w is not None for w in a.get("window", ()))
    first = call.lengths[b]
    positions = [first + (i if moving else 0) for i in range(len(q))]
    turned = rotated(q, a["rotary_cos"], a["rotary_sin"], positions, a["rotary_interleaved"])
    return turned.to(q.dtype)


def results(call: CacheCall) -> tuple[list, list]:
    """For each sequence the oracle's result and the unfused computation's, from the caches as the call left them."""
    a = call.arguments
    options = {name: a[name] for name in ("causal", "window", "softcap", "scale", "sinks") if name in a}
    exact, plain = [], []
    for b in range(len(call.lengths)):
        own = dict(options)
        if "alibi_slopes" in a:
            slopes = a["alibi_slopes"]
            own["alibi_slopes"] = slopes[b] if slopes.dim() == 2 else slopes
        k, v = (call.keys(b, a[name])[None] for name in ("k_cache", "v_cache"))
        tensors = (queries(call, b)[None], k, v)
        exact.append(attend(*tensors, **own))
        plain.append(unfused(*tensors, **own))
    return exact, plain
