"""Blockwise attention in plain torch operations: any device, any dtype that has a matmul.

Forward: online softmax over blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867;
Dao et al. 2022, arXiv:2205.14135). Backward: scores are recomputed block by block from the
saved log-sum-exp. Memory beyond inputs and outputs is O(seq_q + seq_kv). It serves devices
that have no kernel, and is a second opinion on those that have one. Packed sequences are taken
one after another; there, reading cu_seqlens waits for their device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._errors import check_call
from ._options import Options
from ._problem import (
    Problem,
    contract,
    fold,
    heads_first,
    is_finite,
    kernel_lse_dtype,
    lse_dtype,
    lse_shape,
    new_result,
    no_autocast,
    ordered_as,
    parts,
    tile_of,
    unfold,
)

_TILE_ELEMENTS = 1 << 22  # scores that exist at a time, over all heads
_BLOCK_KV = 512
_MIN_BLOCK_Q, _MAX_BLOCK_Q = 32, 512


def tile_shape(
    heads_total: int, seq_q: int, seq_kv: int, block_q: int = 0, block_kv: int = 0
) -> tuple[int, int]:
    """(queries, keys) of one tile. `heads_total` is batch * heads_q; a block of 0 is chosen here."""
    keys = max(1, min(block_kv or _BLOCK_KV, seq_kv))
    fitting = _TILE_ELEMENTS // max(1, heads_total * keys)
    queries = block_q or min(max(fitting, _MIN_BLOCK_Q), _MAX_BLOCK_Q)
    return max(1, min(queries, seq_q)), keys


class Tiles:
    """What every pass over the scores has in common: which tiles there are, and their scores."""

    def __init__(self, problem: Problem, accumulate: torch.dtype, block_q: int, block_kv: int):
        self.problem, self.dtype = problem, accumulate
        batch, heads_kv, group, self.seq_q, _ = problem.q.shape
        seq_kv = problem.k.shape[2]
        self.block_q, self.block_kv = tile_shape(
            batch * heads_kv * group, self.seq_q, seq_kv, block_q, block_kv
        )

    def query_blocks(self) -> Iterator[tuple[int, int]]:
        for begin in range(0, self.seq_q, self.block_q):
            yield begin, min(begin + self.block_q, self.seq_q)

    def key_blocks(self, q_begin: int, q_end: int) -> Iterator[tuple[int, int]]:
        first, end = self.problem.visible_keys(q_begin, q_end)
        for begin in range(first, end, self.block_kv):
            yield begin, min(begin + self.block_kv, end)

    def scores(
        self, q: Tensor, k: Tensor, tile: tuple[int, int, int, int]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores (batch, heads_kv, group, queries, keys), -inf where hidden; which are visible
        (None: all); and the slope of the softcap there (None without one)."""
        p = self.problem
        s = unfold((fold(q) @ k.mT).mul_(p.scale), q.shape[2])
        slope = None
        if p.softcap:
            t = s.div_(p.softcap).tanh_()
            slope = 1 - t * t
            s = t * p.softcap
        if p.bias is not None:
            s += tile_of(p.bias, *tile).to(self.dtype)
        if p.slopes is not None:
            s -= p.slopes.to(self.dtype) * p.distance(*tile, self.dtype)
        visible = p.visible(*tile)
        if visible is not None:
            s.masked_fill_(~visible, -math.inf)
        return s, visible, slope


class OnlineSoftmax:
    """The largest score of each row so far, and the sum of exp(score - largest): (batch, heads_kv, group,
    queries, 1) each."""

    def __init__(self, problem: Problem, q: Tensor):
        """q: the rows in question, (batch, heads_kv, group, queries, dim), in the type of the scores."""
        self.row_max = q.new_full((*q.shape[:-1], 1), -math.inf)
        self.row_sum = torch.zeros_like(self.row_max)
        if problem.sinks is not None:  # a key that all rows have seen before the first, with a value of 0
            self.row_max = problem.sinks.to(q.dtype).expand_as(self.row_max)
            self.row_sum = (self.row_max != -math.inf).to(q.dtype)

    @property
    def shift(self) -> Tensor:
        """`row_max`, and 0 in rows that have seen no key: -inf - -inf is NaN."""
        return self.row_max.masked_fill(self.row_max == -math.inf, 0)

    def add(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """exp(score - row_max), in the place of the scores of a tile, and what earlier ones have to be
        multiplied with."""
        old_max = self.row_max
        self.row_max = torch.maximum(old_max, s.amax(-1, keepdim=True))
        weights = s.sub_(self.shift).exp_()
        decay = (old_max - self.shift).exp_()
        self.row_sum = self.row_sum * decay + weights.sum(-1, keepdim=True)
        return weights, decay

    def lse(self, dtype: torch.dtype) -> Tensor:
        """-inf where there is nothing; without the last axis."""
        lse = self.row_max.to(dtype) + self.row_sum.to(dtype).log()
        return lse.masked_fill_(self.row_sum == 0, -math.inf).squeeze(-1)


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    return_lse: bool,
    block_q: int = 0,
    block_kv: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse), `out` written in place when given; lse is empty, (0,), when not asked for."""
    check_call(q, k, v, options, out)
    found = parts(q, k, v, options)
    out = new_result(q, v.shape[-1], options.layout) if out is None else out
    lse = q.new_full(lse_shape(q, options.layout), -math.inf, dtype=kernel_lse_dtype(q))
    out_rows, lse_rows = heads_first(out, options.layout), _lse_view(lse, q)
    if options.cu_seqlens_q is not None:
        out.zero_()  # rows past the last sequence
    for p, queries, _ in found:
        _forward_part(p, p.rows(out_rows[:, :, queries]), p.rows(lse_rows[:, :, queries]), block_q, block_kv)
    return out, lse if return_lse else lse.new_empty(0)


def _lse_view(lse: Tensor, q: Tensor) -> Tensor:
    """(batch, heads_q, seq_q) of a tensor with or without the first two axes."""
    return lse[(None,) * (4 - q.dim())]


def _forward_part(p: Problem, out_rows: Tensor, lse_rows: Tensor, block_q: int, block_kv: int) -> None:
    """Writes out (batch, heads_kv, group, seq_q, dim_v) and lse, without the last axis."""
    if not p.has_work():
        out_rows.zero_()
        if p.sinks is not None:
            lse_rows.copy_(p.sinks[..., 0].expand_as(lse_rows))
        return
    tiles = Tiles(p, lse_dtype(p.q), block_q, block_kv)
    v_is_safe = is_finite(p.v)
    with no_autocast(p.q.device):
        for q0, q1 in tiles.query_blocks():
            rows = _forward_rows(tiles, q0, q1, v_is_safe, lse_rows.dtype)
            out_rows[..., q0:q1, :], lse_rows[..., q0:q1] = rows


def _forward_rows(
    tiles: Tiles, q0: int, q1: int, v_is_safe: bool, lse_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    p = tiles.problem
    q = p.q[..., q0:q1, :].to(tiles.dtype)
    softmax = OnlineSoftmax(p, q)
    acc = q.new_zeros(*q.shape[:-1], p.v.shape[-1])
    for k0, k1 in tiles.key_blocks(q0, q1):
        k, v = (t[:, :, k0:k1].to(tiles.dtype) for t in (p.k, p.v))
        tile = (q0, q1, k0, k1)
        s, visible, _ = tiles.scores(q, k, tile)
        weights, decay = softmax.add(s)
        seen = None if v_is_safe or visible is None else fold(visible.expand_as(s))
        if (kept := p.kept(*tile)) is not None:
            weights.mul_(kept).mul_(p.dropout_scale)
        acc = acc * decay + unfold(contract(fold(weights), seen, v), q.shape[2])
    nothing = softmax.row_sum == 0
    return (acc / softmax.row_sum).masked_fill_(nothing, 0), softmax.lse(lse_dtype)


class Needs(NamedTuple):
    """Which gradients are asked for, beyond dq, dk and dv."""

    bias: bool = False
    alibi_slopes: bool = False
    sinks: bool = False


@torch.no_grad()
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: Needs,
    block_q: int = 0,
    block_kv: int = 0,
    *,
    of_part: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv, dbias, dalibi_slopes, dsinks), an empty (0,) tensor for what is not needed.

    of_part: out and lse are those of more keys than these; the gradients are what these keys contribute.

    With p = exp(s - lse), r what dropout makes of 1 (0 or 1 / (1 - dropout_p)), dp = r * (dout v^T) and
    delta = rowsum(p * dp) - dlse, rows of p and its sink adding up to 1: dv = (r * p)^T dout,
    ds = p * (dp - delta), dq = scale ds k, dk = scale ds^T q, dsink = sum of -p_sink * delta.
    """
    dtype = lse_dtype(q)
    dq, dk, dv = (t.new_zeros(t.shape, dtype=dtype) for t in (q, k, v))
    owners = {name: getattr(options, name) for name in Needs._fields}
    sums = {
        name: t.new_zeros(t.shape, dtype=dtype) if need else None
        for need, (name, t) in zip(needs, owners.items(), strict=True)
    }
    # Gradients are where their tensors are: the same views serve both.
    grads = parts(dq, dk, dv, options._replace(**sums))
    dout, lse = heads_first(dout, options.layout), _lse_view(lse, q)
    dlse = None if dlse is None else _lse_view(dlse, q)
    with no_autocast(q.device):
        for (p, queries, _), (grad, _, _) in zip(parts(q, k, v, options), grads, strict=True):
            if not p.has_work():
                continue
            tiles = Tiles(p, dtype, block_q, block_kv)
            own_dout, own_lse, own_dlse = (
                t if t is None else p.rows(t[:, :, queries]) for t in (dout, lse, dlse)
            )
            safe = all(map(is_finite, (p.q, p.k, p.v, own_dout)))
            for q0, q1 in tiles.query_blocks():
                dlse_block = None if own_dlse is None else own_dlse[..., q0:q1, None].to(dtype)
                dout_block = own_dout[..., q0:q1, :].to(dtype)
                rows = _Rows(tiles, q0, q1, dout_block, own_lse[..., q0:q1, None])
                delta = None
                if of_part:
                    out_block = p.rows(heads_first(out, options.layout)[:, :, queries])[..., q0:q1, :]
                    delta = (dout_block * out_block).sum(-1, keepdim=True)
                _backward_rows(rows, delta, dlse_block, grad, safe)
    others = (
        q.new_empty(0) if total is None else total.to(owners[name].dtype) for name, total in sums.items()
    )
    given = zip((dq, dk, dv), (q, k, v), strict=True)
    return *(ordered_as(grad.to(t.dtype), t, options.layout) for grad, t in given), *others


class _Tile(NamedTuple):
    """(batch, heads_kv, group, queries, keys) each; None where it would be all True, or all 1."""

    weights: Tensor  # p, 0 where hidden
    dp: Tensor  # 0 where hidden or dropped
    visible: Tensor | None
    slope: Tensor | None  # of the softcap
    kept: Tensor | None


class _Rows:
    """Queries [q0, q1) in the backward pass."""

    def __init__(self, tiles: Tiles, q0: int, q1: int, dout: Tensor, lse: Tensor):
        self.tiles, self.q0, self.q1, self.dout = tiles, q0, q1, dout
        self.q = tiles.problem.q[..., q0:q1, :].to(tiles.dtype)
        self.lse = lse.masked_fill(lse == -math.inf, 0)
        self.lse_high = self.lse.to(tiles.dtype)
        # What a narrower type loses would show in every weight.
        self.lse_low = (self.lse - self.lse_high).to(tiles.dtype)

    def against(self, k: Tensor, v: Tensor, k0: int, k1: int) -> _Tile:
        place = (self.q0, self.q1, k0, k1)
        s, visible, slope = self.tiles.scores(self.q, k, place)
        weights = s.sub_(self.lse_high).sub_(self.lse_low).exp_()
        dp = unfold(fold(self.dout) @ v.mT, self.q.shape[2])
        problem = self.tiles.problem
        if (kept := problem.kept(*place)) is not None:
            dp.mul_(kept).mul_(problem.dropout_scale)
        if visible is not None:
            # A row that sees a NaN is NaN where it looks, and still 0 where it does not.
            hidden = ~visible
            weights.masked_fill_(hidden, 0)
            dp.masked_fill_(hidden, 0)
        return _Tile(weights, dp, visible, slope, kept)

    def sink_weight(self) -> Tensor:
        """The probability that the sink takes: (batch, heads_kv, group, queries, 1)."""
        return (self.tiles.problem.sinks.to(self.lse.dtype) - self.lse).exp().to(self.tiles.dtype)


def _keys(p: Problem, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A block of k and of v."""
    return tuple(t[:, :, slice(*block)].to(dtype) for t in (p.k, p.v))


class _RowSums(NamedTuple):
    """What the gradients take from all keys of a row: (batch, heads_kv, group, queries, 1) each."""

    delta: Tensor  # rowsum(p * dp)
    total: Tensor  # of the weights, sink included: 1 but for rounding
    blind: Tensor  # bool: no key was seen


def _row_sums(rows: _Rows, blocks: list[tuple[int, int]]) -> tuple[_RowSums, _Tile | None]:
    """By a pass of its own, and the last tile of it. rowsum(dout * out) would do for delta, but is rounded
    otherwise than dp: where few keys have all the weight, dp - delta would be what the two leave. And weights
    from a log-sum-exp of -1e38 do not add up to 1: its logarithm is rounded away."""
    p, dtype = rows.tiles.problem, rows.tiles.dtype
    delta, total = torch.zeros_like(rows.lse_high), torch.zeros_like(rows.lse_high)
    blind = torch.ones_like(total, dtype=torch.bool)
    tile = None
    for block in blocks:
        tile = rows.against(*_keys(p, block, dtype), *block)
        delta += (tile.weights * tile.dp).sum(-1, keepdim=True)
        total += tile.weights.sum(-1, keepdim=True)
        if p.sinks is not None:
            blind &= False if tile.visible is None else ~tile.visible.any(-1, keepdim=True)
    if p.sinks is not None:
        total += rows.sink_weight()
    total.masked_fill_(total == 0, 1)
    return _RowSums(delta.div_(total), total, blind), tile


def _backward_rows(rows: _Rows, delta: Tensor | None, dlse: Tensor | None, grad: Problem, safe: bool) -> None:
    """Adds what these queries contribute to the gradients, which are in the places of their tensors. `delta`
    is that of more keys than these, where they are but a part; it goes without sinks."""
    tiles, q0, q1, group = rows.tiles, rows.q0, rows.q1, rows.q.shape[2]
    p = tiles.problem
    blocks = list(tiles.key_blocks(q0, q1))
    total, tile = None, None
    if delta is None:
        (delta, total, blind), tile = _row_sums(rows, blocks)
    if dlse is not None:
        delta = delta - dlse
    if grad.sinks is not None:
        into_sinks = (rows.sink_weight() / total).mul_(delta).masked_fill_(blind, 0)
        grad.sinks.sub_(into_sinks.sum((0, -2), keepdim=True)[0])
    for block in blocks:
        k, v = _keys(p, block, tiles.dtype)
        again = tile is None or len(blocks) > 1
        weights, dp, visible, slope, kept = rows.against(k, v, *block) if again else tile
        if total is not None:
            weights.div_(total)
        ds = dp.sub_(delta).mul_(weights)
        if kept is not None:
            weights.mul_(kept).mul_(p.dropout_scale)
        seen = None
        if visible is not None:
            weights.masked_fill_(~visible, 0)
            ds.masked_fill_(~visible, 0)
            seen = None if safe else fold(visible.expand_as(ds))
        seen_t = None if seen is None else seen.mT
        if grad.bias is not None:
            slot = tile_of(grad.bias, q0, q1, *block)
            slot += ds.sum_to_size(slot.shape)
        if grad.slopes is not None:
            far = p.distance(q0, q1, *block, tiles.dtype)
            grad.slopes.sub_((ds * far).sum_to_size(grad.slopes.shape))
        if slope is not None:
            ds.mul_(slope if visible is None else slope.masked_fill_(~visible, 0))
        ds = fold(ds).mul_(p.scale)
        k0, k1 = block
        grad.v[:, :, k0:k1] += contract(fold(weights).mT, seen_t, fold(rows.dout))
        grad.k[:, :, k0:k1] += contract(ds.mT, seen_t, fold(rows.q))
        grad.q[..., q0:q1, :] += unfold(contract(ds, seen, k), group)
