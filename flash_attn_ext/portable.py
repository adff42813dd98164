"""Blockwise attention in plain torch operations: any device, any dtype that has a matmul.

Forward: online softmax over blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867;
Dao et al. 2022, arXiv:2205.14135). Backward: scores are recomputed block by block from the
saved log-sum-exp. Memory beyond inputs and outputs is O(seq_q + seq_kv). It serves devices
that have no kernel, and is a second opinion on those that have one. Arguments are those of
the operator `attention_forward` (see csrc/torch/schemas.h).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._errors import check_call
from ._problem import (
    Problem,
    contract,
    heads_first,
    is_finite,
    kernel_lse_dtype,
    lse_dtype,
    lse_shape,
    no_autocast,
    tile_of,
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


class _Tiles:
    """What forward and backward have in common: which tiles there are, and their scores."""

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

    def query_rows(self, t: Tensor, q_begin: int, q_end: int) -> Tensor:
        """(batch, heads_kv, group, queries, columns) of a (batch, heads_q, seq_q, columns) tensor."""
        return self.problem.rows(t)[..., q_begin:q_end, :].to(self.dtype)

    def scores(
        self, q: Tensor, k: Tensor, tile: tuple[int, int, int, int]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores (batch, heads_kv, group, queries, keys), -inf where hidden; which are visible
        (None: all); and the slope of the softcap there (None without one)."""
        p = self.problem
        s = _unfold(_fold(q) @ k.mT, q.shape[2]).mul_(p.scale)
        slope = None
        if p.softcap:
            t = s.div_(p.softcap).tanh_()
            slope = 1 - t * t
            s = t * p.softcap
        if p.bias is not None:
            s += tile_of(p.bias, *tile).to(self.dtype)
        visible = p.visible(*tile)
        if visible is not None:
            s.masked_fill_(~visible, -math.inf)
        return s, visible, slope


def _fold(t: Tensor) -> Tensor:
    """(batch, heads_kv, group, rows, n) -> (batch, heads_kv, group * rows, n): a group shares its keys."""
    return t.flatten(2, 3)


def _unfold(t: Tensor, group: int) -> Tensor:
    return t.unflatten(2, (group, t.shape[2] // group))


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    layout: int,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    return_lse: bool,
    block_q: int = 0,
    block_kv: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse), `out` written in place when given; lse is empty, (0,), when not asked for."""
    call = (q, k, v, mask, bias, kv_lengths, layout, causal, window_left, window_right, scale, softcap)
    check_call(*call, out=out)
    p = Problem.make(*call)
    dtype = lse_dtype(q)
    out = q.new_empty(*q.shape[:-1], v.shape[-1]) if out is None else out
    lse = q.new_full(lse_shape(q, layout), -math.inf, dtype=kernel_lse_dtype(q))
    if not p.has_work():
        out.zero_()
        return out, lse if return_lse else lse.new_empty(0)
    out_rows = p.rows(heads_first(out, layout))
    lse_rows = p.rows(lse.view(p.q.shape[0], -1, p.q.shape[3]))
    tiles = _Tiles(p, dtype, block_q, block_kv)
    v_is_safe = is_finite(p.v)
    with no_autocast(q.device):
        for q0, q1 in tiles.query_blocks():
            rows = _forward_rows(tiles, q0, q1, v_is_safe, lse.dtype)
            out_rows[..., q0:q1, :], lse_rows[..., q0:q1] = rows
    return out, lse if return_lse else lse.new_empty(0)


def _forward_rows(
    tiles: _Tiles, q0: int, q1: int, v_is_safe: bool, lse_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    p = tiles.problem
    q = p.q[..., q0:q1, :].to(tiles.dtype)
    row_max = q.new_full((*q.shape[:-1], 1), -math.inf)
    row_sum = torch.zeros_like(row_max)
    acc = q.new_zeros(*q.shape[:-1], p.v.shape[-1])
    for k0, k1 in tiles.key_blocks(q0, q1):
        k, v = (t[:, :, k0:k1].to(tiles.dtype) for t in (p.k, p.v))
        s, visible, _ = tiles.scores(q, k, (q0, q1, k0, k1))
        new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
        # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
        shift = new_max.masked_fill(new_max == -math.inf, 0)
        weights = s.sub_(shift).exp_()
        decay = (row_max - shift).exp_()
        seen = None if v_is_safe or visible is None else _fold(visible.expand_as(s))
        row_sum = row_sum * decay + weights.sum(-1, keepdim=True)
        acc = acc * decay + _unfold(contract(_fold(weights), seen, v), q.shape[2])
        row_max = new_max
    nothing = row_sum == 0
    out = (acc / row_sum).masked_fill_(nothing, 0)
    lse = (row_max.to(lse_dtype) + row_sum.to(lse_dtype).log()).masked_fill_(nothing, -math.inf)
    return out, lse.squeeze(-1)


@torch.no_grad()
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    layout: int,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    need_bias_grad: bool,
    block_q: int = 0,
    block_kv: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv, dbias); dbias is an empty (0,) tensor when not asked for.

    With p = exp(s - lse), dp = dout v^T and delta = rowsum(p * dp) - dlse, rows of p adding up to 1:
    dv = p^T dout, ds = p * (dp - delta), dq = scale ds k, dk = scale ds^T q.
    """
    p = Problem.make(
        q, k, v, mask, bias, kv_lengths, layout, causal, window_left, window_right, scale, softcap
    )
    dtype = lse_dtype(q)
    dq, dk, dv = (t.new_zeros(t.shape, dtype=dtype) for t in (q, k, v))
    dbias = p.bias.new_zeros(p.bias.shape, dtype=dtype) if need_bias_grad else q.new_empty(0)
    if p.has_work():
        tiles = _Tiles(p, dtype, block_q, block_kv)
        grads = p.rows(heads_first(dq, layout)), heads_first(dk, layout), heads_first(dv, layout), dbias
        row_shape = (p.q.shape[0], -1, p.q.shape[3], 1)
        lse = lse.reshape(row_shape)
        dlse = None if dlse is None else dlse.reshape(row_shape)
        dout = heads_first(dout, layout)
        safe = all(map(is_finite, (p.q, p.k, p.v, dout)))
        with no_autocast(q.device):
            for q0, q1 in tiles.query_blocks():
                dout_block = tiles.query_rows(dout, q0, q1)
                dlse_block = None if dlse is None else tiles.query_rows(dlse, q0, q1)
                rows = _Rows(tiles, q0, q1, dout_block, p.rows(lse)[..., q0:q1, :])
                _backward_rows(rows, dlse_block, grads, safe, need_bias_grad)
    dbias = dbias.view(bias.shape).to(bias.dtype) if need_bias_grad else dbias
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias


class _Rows:
    """Queries [q0, q1) in the backward pass."""

    def __init__(self, tiles: _Tiles, q0: int, q1: int, dout: Tensor, lse: Tensor):
        self.tiles, self.q0, self.q1, self.dout = tiles, q0, q1, dout
        self.q = tiles.problem.q[..., q0:q1, :].to(tiles.dtype)
        lse = lse.masked_fill(lse == -math.inf, 0)
        self.lse_high = lse.to(tiles.dtype)
        # What a narrower type loses would show in every weight.
        self.lse_low = (lse - self.lse_high).to(tiles.dtype)

    def against(
        self, k: Tensor, v: Tensor, k0: int, k1: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """p and dp, 0 where hidden, then what `_Tiles.scores` tells of the tile: visible, slope."""
        s, visible, slope = self.tiles.scores(self.q, k, (self.q0, self.q1, k0, k1))
        weights = s.sub_(self.lse_high).sub_(self.lse_low).exp_()
        dp = _unfold(_fold(self.dout) @ v.mT, self.q.shape[2])
        if visible is not None:
            # A row that sees a NaN is NaN where it looks, and still 0 where it does not.
            hidden = ~visible
            weights.masked_fill_(hidden, 0)
            dp.masked_fill_(hidden, 0)
        return weights, dp, visible, slope


def _backward_rows(
    rows: _Rows,
    dlse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    safe: bool,
    need_bias_grad: bool,
) -> None:
    """Adds what these queries contribute to `grads`: dq, dk, dv, dbias in canonical axes."""
    tiles, q0, q1, group = rows.tiles, rows.q0, rows.q1, rows.q.shape[2]
    p = tiles.problem
    dq, dk, dv, dbias = grads

    def keys(k0: int, k1: int) -> tuple[Tensor, Tensor]:
        return tuple(t[:, :, k0:k1].to(tiles.dtype) for t in (p.k, p.v))

    # A pass of its own for what each row adds up to. rowsum(dout * out) would do for delta, but is
    # rounded otherwise than dp: where few keys have all the weight, dp - delta would be what the two
    # leave. And weights from a log-sum-exp of -1e38 do not add up to 1: its logarithm is rounded away.
    blocks = list(tiles.key_blocks(q0, q1))
    delta, total = torch.zeros_like(rows.lse_high), torch.zeros_like(rows.lse_high)
    tile = None
    for block in blocks:
        tile = rows.against(*keys(*block), *block)
        delta += (tile[0] * tile[1]).sum(-1, keepdim=True)
        total += tile[0].sum(-1, keepdim=True)
    total.masked_fill_(total == 0, 1)
    delta.div_(total)
    if dlse is not None:
        delta -= dlse
    for block in blocks:
        k, v = keys(*block)
        weights, dp, visible, slope = rows.against(k, v, *block) if len(blocks) > 1 else tile
        weights.div_(total)
        ds = dp.sub_(delta).mul_(weights)
        seen = None
        if visible is not None:
            weights.masked_fill_(~visible, 0)
            ds.masked_fill_(~visible, 0)
            seen = None if safe else _fold(visible.expand_as(ds))
        seen_t = None if seen is None else seen.mT
        if need_bias_grad:
            slot = tile_of(dbias, q0, q1, *block)
            slot += ds.sum_to_size(slot.shape)
        if slope is not None:
            ds.mul_(slope if visible is None else slope.masked_fill_(~visible, 0))
        ds = _fold(ds).mul_(p.scale)
        k0, k1 = block
        dv[:, :, k0:k1] += contract(_fold(weights).mT, seen_t, _fold(rows.dout))
        dk[:, :, k0:k1] += contract(ds.mT, seen_t, _fold(rows.q))
        dq[..., q0:q1, :] += _unfold(contract(ds, seen, k), group)
