"""What an attention map looks like, without making one: sums over it, block by block."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _errors, autograd
from ._extended import Arguments, options_of
from ._problem import LAYOUTS, Problem, heads_first, lse_dtype, no_autocast, parts
from ._run import check_types
from .config import AttentionConfig
from .masks import Mask
from .portable import OnlineSoftmax, Tiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AttentionStats:
    """Sums over the attention map; p_ij is the weight that query i gives to key j, after the softmax.

    All are float32 (float64 for float64), and without the axes that q does not have: of rank 3 there is
    no batch, of rank 2 there are no heads either.

    Attributes:
        received: (batch, heads_q, seq_kv) the mass that each key receives, the sum of p_ij over i.
        entropy: (batch, heads_q, seq_q) of each query, the sum of -p_ij ln p_ij over j, in nats: 0 where
            one key has all the weight, ln n where n keys share it alike, 0 for a query that sees no
            key. A sink counts as one more key.
        max_logit: (batch, heads_q) the largest score of a visible key, after scale, softcap, bias and
            ALiBi; -inf where there is none. Sinks do not count.
        lse: (batch, heads_q, seq_q) the log-sum-exp, as `flash_attention` returns it.
        pooled: (batch, heads_q, bins_q, bins_k) the mass of each cell of a grid over the map, the sum of
            p_ij over its queries i and keys j; None without `bins`. Query i is in bin
            i * bins_q // seq_q, key j in j * bins_k // seq_kv. A row of cells adds up to the number of
            its queries that see a key, less what sinks take.
    """

    received: Tensor
    entropy: Tensor
    max_logit: Tensor
    lse: Tensor
    pooled: Tensor | None = None


@torch.no_grad()
def attention_stats(
    q: Tensor,
    k: Tensor,
    causal: bool | str = False,
    *,
    scale: float | None = None,
    layout: str = "bshd",
    mask: Tensor | Mask | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    bins: int | tuple[int, int] | None = None,
) -> AttentionStats:
    """Which keys receive attention, and how sharp it is, in memory linear in the sequence lengths.

    Args:
        q: queries, (batch, seq_q, heads_q, dim), or as `flash_attention` takes them.
        k: keys, (batch, seq_kv, heads_kv, dim).
        bins: also sum up the map over a grid of so many bins of queries and of keys, an int of 1 or
            more or a pair of them.
        Others: as for `flash_attention`.

    Returns: `AttentionStats`. Nothing in it has a gradient, whatever q and k require.

    Raises:
        What `flash_attention` would raise; TypeError, ValueError for bins.

    Example:
        >>> q = k = torch.randn(1, 1024, 8, 64)
        >>> stats = attention_stats(q, k, causal=True, bins=16)
        >>> stats.received.shape, stats.entropy.shape, stats.pooled.shape
        (torch.Size([1, 8, 1024]), torch.Size([1, 8, 1024]), torch.Size([1, 8, 16, 16]))

    On every device these are plain torch operations, two passes over the keys of each block of queries:
    the first finds what the softmax divides by (Milakov and Gimelshein, 2018, arXiv:1805.02867), the
    second adds up.
    """
    arguments = Arguments(causal, scale, layout, mask, bias, window, softcap, alibi_slopes, sinks, kv_lengths)
    return _stats(q, k, arguments, None if bins is None else _grid(bins), None)


def _stats(
    q: Tensor, k: Tensor, a: Arguments, grid: tuple[int, int] | None, head: int | None
) -> AttentionStats:
    """Of all heads, or of one, which is then the only one."""
    dense = None if isinstance(a.mask, Mask) else a.mask
    tensors = (dense, a.bias, a.kv_lengths, None, a.alibi_slopes, a.sinks)
    check_types(q, k, k, tensors, a.layout, a.causal, a.scale, a.softcap, None)
    if torch._C._is_any_autocast_enabled():
        q, k, _ = autograd.autocast(q, k, k)
    options = options_of(q, k, a, AttentionConfig())
    _errors.check_call(q, k, k, options)
    with no_autocast(q.device):
        [(problem, *_)] = parts(q, k, k, options)
        found = _Sums(problem if head is None else _one_head(problem, head), lse_dtype(q), grid)
        if problem.has_work():
            found.add_all()
    axes = (0,) * (4 - q.dim())
    return AttentionStats(*(None if t is None else t.flatten(1, 2)[axes] for t in found.results()))


def _one_head(p: Problem, head: int) -> Problem:
    """Views of what concerns one query head."""
    place = divmod(head, p.q.shape[2])

    def own(t: Tensor | None, first: int) -> Tensor | None:
        """`t` at `place` of axes `first` and `first` + 1, which may be of size 1."""
        for axis, index in enumerate(place, first):
            if t is not None and t.shape[axis] != 1:
                t = t.narrow(axis, index, 1)
        return t

    k = p.k.narrow(1, place[0], 1)
    changes = {name: own(getattr(p, name), 1) for name in ("q", "mask", "bias", "slopes")}
    return replace(p, k=k, v=k, sinks=own(p.sinks, 0), **changes)


def _grid(bins: object) -> tuple[int, int]:
    pair = tuple(bins) if isinstance(bins, (tuple, list)) else (bins, bins)
    if len(pair) != 2 or any(not isinstance(n, int) or isinstance(n, bool) for n in pair):
        raise TypeError(f"bins must be None, an int or a pair of ints, got {bins!r}")
    if min(pair) < 1:
        raise ValueError(f"bins must be at least 1, got {bins!r}")
    return pair


class _Sums:
    """The results, (batch, heads_kv, group, ...), filled tile by tile."""

    def __init__(self, problem: Problem, dtype: torch.dtype, grid: tuple[int, int] | None):
        self.problem, self.dtype, self.grid = problem, dtype, grid
        *heads, seq_q, _ = problem.q.shape
        self.lengths = seq_q, problem.k.shape[2]

        def zeros(*shape: int) -> Tensor:
            return problem.q.new_zeros(*heads, *shape, dtype=dtype)

        self.received, self.entropy = zeros(self.lengths[1]), zeros(seq_q)
        self.max_logit, self.lse = zeros().fill_(-math.inf), zeros(seq_q).fill_(-math.inf)
        if problem.sinks is not None:  # what there is where no key is seen
            self.lse.copy_(problem.sinks[..., 0].expand_as(self.lse))
        self.pooled = None if grid is None else zeros(*grid)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.received, self.entropy, self.max_logit, self.lse, self.pooled

    def add_all(self) -> None:
        tiles = Tiles(self.problem, self.dtype, 0, 0)
        for q0, q1 in tiles.query_blocks():
            self._add_rows(tiles, q0, q1)

    def _add_rows(self, tiles: Tiles, q0: int, q1: int) -> None:
        p = self.problem
        q = p.q[..., q0:q1, :].to(self.dtype)
        softmax = OnlineSoftmax(p, q)
        blocks = list(tiles.key_blocks(q0, q1))

        def scores(k0: int, k1: int) -> tuple[Tensor, Tensor | None]:
            return tiles.scores(q, p.k[:, :, k0:k1].to(self.dtype), (q0, q1, k0, k1))[:2]

        for block in blocks:
            s, _ = scores(*block)
            self.max_logit = torch.maximum(self.max_logit, s.amax((-2, -1)))
            softmax.add(s)
        self.lse[..., q0:q1] = softmax.lse(self.dtype)
        shift, total = softmax.shift, softmax.row_sum.masked_fill(softmax.row_sum == 0, 1)
        entropy = self.entropy[..., q0:q1]
        if p.sinks is not None:
            weight = ((p.sinks.to(self.dtype) - shift).exp() / total).squeeze(-1)
            entropy -= torch.xlogy(weight, weight)
        for k0, k1 in blocks:
            s, visible = scores(k0, k1)
            weights = s.sub_(shift).exp_().div_(total)
            if visible is not None:  # a row that sees a NaN is NaN where it looks, and 0 where it does not
                weights.masked_fill_(~visible, 0)
            self.received[..., k0:k1] += weights.sum(-2)
            if self.grid is not None:
                self._pool(weights, q0, q1, k0, k1)
            entropy -= torch.xlogy(weights, weights).sum(-1)

    def _pool(self, weights: Tensor, q0: int, q1: int, k0: int, k1: int) -> None:
        """Sums over slices: a product with indicators would spread a NaN to cells without it."""
        first_q, rows = _bins_of(q0, q1, self.lengths[0], self.grid[0])
        first_k, keys = _bins_of(k0, k1, self.lengths[1], self.grid[1])
        columns = torch.stack([part.sum(-1) for part in weights.split(keys, -1)], -1)
        cells = torch.stack([part.sum(-2) for part in columns.split(rows, -2)], -2)
        self.pooled[..., first_q : first_q + len(rows), first_k : first_k + len(keys)] += cells


def _bins_of(begin: int, end: int, length: int, bins: int) -> tuple[int, list[int]]:
    """The first bin that part of [begin, end) is in, and how much of that is in each bin from there on."""
    first, last = begin * bins // length, (end - 1) * bins // length
    edges = [min(max(-(-b * length // bins), begin), end) for b in range(first, last + 2)]
    return first, [b - a for a, b in itertools.pairwise(edges)]


def plot_attention(
    q: Tensor,
    k: Tensor,
    causal: bool | str = False,
    *,
    scale: float | None = None,
    layout: str = "bshd",
    mask: Tensor | Mask | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    bins: int | tuple[int, int] = 256,
    head: int | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Draws the attention map of sequences of any length, as means over the cells of a grid.

    Args:
        bins: so many cells for the queries and for the keys, at most one for each.
        head: which query head, the only one that is then computed; None draws the mean over all. A
            batch is always averaged.
        path: where to write the picture; its ending says which format.
        Others: as for `attention_stats`.

    Returns: a `matplotlib.figure.Figure`. Colours are mean weights, on a logarithmic scale over four
        decades; where it is white, no query sees a key.

    Raises:
        ImportError: matplotlib is missing. TypeError, ValueError: as `attention_stats`, or a head
            that is not there, or nothing to draw.

    Example:
        >>> q = k = torch.randn(1, 8192, 8, 64)
        >>> figure = plot_attention(q, k, causal=True, head=0, path="attention.png")
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot_attention needs matplotlib: pip install matplotlib") from None
    heads, lengths = _sizes(q, k, layout)
    if head is not None and (not isinstance(head, int) or isinstance(head, bool)):
        raise TypeError(f"head must be an int or None, got {head!r}")
    if head is not None and not -heads <= head < heads:
        raise ValueError(f"head must lie in [{-heads}, {heads}), got {head}")
    grid = tuple(map(min, _grid(bins), lengths))
    arguments = Arguments(causal, scale, layout, mask, bias, window, softcap, alibi_slopes, sinks, kv_lengths)
    with torch.no_grad():
        pooled = _stats(q, k, arguments, grid, None if head is None else head % heads).pooled
    pooled = pooled[(None,) * (4 - pooled.dim())].mean((0, 1))
    sizes = (_bins_of(0, n, n, b)[1] for n, b in zip(lengths, grid, strict=True))
    rows, columns = (torch.tensor(n, dtype=pooled.dtype, device=pooled.device) for n in sizes)
    mean = (pooled / (rows[:, None] * columns)).float().cpu().numpy()
    top = float(mean[mean > 0].max(initial=0)) or 1.0  # a NaN is not above 0
    axes = (figure := Figure(figsize=(7, 6), layout="constrained")).add_subplot()
    image = axes.imshow(
        mean.clip(max=top),
        norm=LogNorm(top * 1e-4, top),
        extent=(0, lengths[1], lengths[0], 0),
        aspect="auto",
        interpolation="nearest",
    )
    title = "mean of all heads" if head is None else f"head {head % heads}"
    axes.set(xlabel="key", ylabel="query", title=f"attention, {title}")
    figure.colorbar(image, label="mean weight")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _sizes(q: object, k: object, layout: object) -> tuple[int, tuple[int, int]]:
    """The number of query heads, and both lengths, none of them 0."""
    _errors.choice("layout", layout, LAYOUTS)
    found = []
    for name, t in (("q", q), ("k", k)):
        _errors.check_tensor(name, t)
        if t.dim() not in (2, 3, 4):
            raise ValueError(f"{name} must have rank 2, 3 or 4, got shape {tuple(t.shape)}")
        if 0 in t.shape[:-1]:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, in which there is nothing to draw")
        found.append(heads_first(t, LAYOUTS[layout]).shape)
    return found[0][1], (found[0][2], found[1][2])
