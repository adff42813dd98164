"""The two passes round the ring, as an autograd function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._merge import merge
from .._options import Options
from .._philox import state_of
from .._problem import heads_first, kernel_lse_dtype, lse_dtype, no_autocast
from . import _blocks, _placement
from ._group import Ranks, check_first_order, like, wait
from ._kernels import Kernels

_MOST_BLOCKS = 4  # of two ranks' parts: a part has two segments at most


@dataclass(frozen=True)
class Call:
    """One call of `ring_attention` beyond its tensors."""

    ranks: Ranks
    kernels: Kernels
    placement: str
    lengths_q: tuple[int, ...]  # of the ranks' parts
    lengths_kv: tuple[int, ...]
    band: _blocks.Band
    layout: int
    scale: float | None
    softcap: float
    dropout_p: float
    rng_state: Tensor | None  # this rank's, int64 (2,)

    @property
    def steps(self) -> int:
        """How often keys are passed on."""
        return _blocks.steps(self.placement, self.lengths_q, self.lengths_kv, self.band)

    def circulate(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """(source, [k, v]) of every rank whose keys may be seen, in the caller's layout."""
        own = [k.contiguous(), v.contiguous()]
        return self.ranks.circulate(own, self.axis(k), self.lengths_kv, self.steps)

    def axis(self, t: Tensor) -> int:
        """That of the sequence."""
        return t.dim() - (3 if t.dim() > 2 and self.layout == 0 else 2)

    def blocks(self, source: int, kv_lengths: Tensor | None) -> Iterator[tuple[slice, slice, Options]]:
        """(queries, keys, options) of each call of a kernel with the keys of `source`."""
        rank = self.ranks.rank
        plan = (self.placement, self.lengths_q, self.lengths_kv, self.band, rank, source)
        for number, block in enumerate(_blocks.blocks(*plan)):
            keys = slice(block.k_begin, block.k_end)
            options = Options(
                kv_lengths=self._visible(source, keys, kv_lengths),
                rng_state=self._state(source, number),
                window_left=block.left,
                window_right=block.right,
                scale=self.scale,
                softcap=self.softcap,
                dropout_p=self.dropout_p,
            )
            yield slice(block.q_begin, block.q_end), keys, options

    def _visible(self, source: int, keys: slice, kv_lengths: Tensor | None) -> Tensor | None:
        """How many of these keys come before `kv_lengths`; as places increase, they are the first ones."""
        if kv_lengths is None:
            return None
        places = _placement.places(self.placement, source, self.lengths_kv, kv_lengths.device)
        return (places[keys] < kv_lengths[:, None]).sum(-1)

    def _state(self, source: int, number: int) -> Tensor | None:
        """A dropout's state of its own for each block of each pair of ranks: the kernels count from 0 in each
        block, and ranks may have the same seed."""
        if self.rng_state is None:
            return None
        pair = self.ranks.rank * self.ranks.size + source
        return state_of(self.rng_state, pair * _MOST_BLOCKS + number)


class Attention(torch.autograd.Function):
    """(out, lse): out like q, lse (batch, heads_q, seq_q) of `kernel_lse_dtype`."""

    @staticmethod
    def forward(ctx, call, q, k, v, sinks, kv_lengths):
        ctx.set_materialize_grads(False)
        with no_autocast(q.device):
            out, lse_of_keys = _forward(call, q, k, v, kv_lengths)
            lse = lse_of_keys
            if sinks is not None:
                out, lse = _with_sinks(out, lse_of_keys, sinks, call)
        out = out.to(q.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, sinks, kv_lengths, out, lse_of_keys)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        check_first_order("ring_attention")
        q, k, v, sinks, kv_lengths, out, lse = ctx.saved_tensors
        call, dsinks = ctx.call, None
        dout = torch.zeros_like(out) if dout is None else dout
        with no_autocast(q.device):
            if sinks is not None:
                nothing = lse == -math.inf
                sink = _rows(sinks, lse)
                lse = torch.logaddexp(lse, sink)
                if ctx.needs_input_grad[4]:
                    dsinks = _into_sinks(call, dout, dlse, out, lse, sink, nothing).to(sinks.dtype)
            grads = _backward(call, dout, dlse, q, k, v, out, lse, kv_lengths)
        grads = (g.to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))
        return None, *grads, dsinks, None


def _rows(sinks: Tensor, lse: Tensor) -> Tensor:
    """(heads_q,) for each row of (batch, heads_q, seq_q)."""
    return sinks.to(lse.dtype)[:, None].expand_as(lse)


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Out in the dtype of the sums, and the LSE of the keys."""
    total = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=lse_dtype(q))
    out, rows = (heads_first(t, call.layout) for t in (total, q))
    lse = q.new_full(rows.shape[:3], -math.inf, dtype=kernel_lse_dtype(q))
    for source, held in call.circulate(k, v):
        keys, values = (heads_first(t, call.layout) for t in held)
        for i, j, options in call.blocks(source, kv_lengths):
            part = call.kernels.forward(rows[:, :, i], keys[:, :, j], values[:, :, j], options)
            lse_part = part[1][..., None]
            out[:, :, i], merged = merge(out[:, :, i], lse[:, :, i, None], part[0], lse_part, out.dtype)
            lse[:, :, i] = merged[..., 0]
    return total, lse


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """One more state: a sink is a key whose score is its LSE and whose value is 0."""
    states = (heads_first(out, call.layout), lse[..., None], out.new_zeros(()), _rows(sinks, lse)[..., None])
    merged, lse = merge(*states, out.dtype)
    heads_first(out, call.layout).copy_(merged)
    return out, lse[..., 0]


def _into_sinks(
    call: Call,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    sink: Tensor,
    nothing: Tensor,
) -> Tensor:
    """d lse / d sink is the sink's probability, and of the output it takes its share of delta. Rows that see
    no key, `nothing`, give no gradient."""
    dout, out = (heads_first(t, call.layout).to(lse_dtype(t)) for t in (dout, out))
    into = -(dout * out).sum(-1) if dlse is None else dlse - (dout * out).sum(-1)
    return ((sink - lse).exp() * into).masked_fill(nothing, 0).sum((0, 2))


def _backward(
    call: Call,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtype of the sums. What a rank contributes to the gradients of another's keys is
    added to what comes along from the one before, and goes on behind these keys; at last it goes home."""
    ranks, steps, axis = call.ranks, call.steps, call.axis(k)
    dtype = lse_dtype(q)
    dq = q.new_zeros(q.shape, dtype=dtype)
    q, dq_rows, dout, out = (heads_first(t, call.layout) for t in (q, dq, dout, out))
    kernels, dout = call.kernels.for_backward(dout, lse)
    works, arriving, sums = [], [], []
    for step, (source, held) in enumerate(call.circulate(k, v)):
        own = [torch.zeros_like(t, dtype=dtype) for t in held]
        keys, values, dk, dv = (heads_first(t, call.layout) for t in (*held, *own))
        for i, j, options in call.blocks(source, kv_lengths):
            given = (dout[:, :, i], None if dlse is None else dlse[:, :, i])
            saved = (q[:, :, i], keys[:, :, j], values[:, :, j], out[:, :, i], lse[:, :, i])
            grads = kernels.backward(*given, *saved, options)
            for into, more in zip((dq_rows[:, :, i], dk[:, :, j], dv[:, :, j]), grads, strict=True):
                into += more
        wait(works)
        for into, more in zip(own, arriving, strict=step > 0):
            into += more
        sums = own
        if step < steps:
            following = call.lengths_kv[(source - 1) % ranks.size]
            arriving = [like(t, axis, following) for t in sums]
            works = ranks.start_shift(sums, arriving, 1)
    if steps:
        home = [like(t, axis, call.lengths_kv[ranks.rank]) for t in sums]
        wait(ranks.start_shift(sums, home, -steps))
        sums = home
    return dq, *sums
