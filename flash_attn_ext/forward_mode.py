"""Forward-mode derivatives: what a change of the inputs makes of the results, blockwise in torch operations.

With p = exp(s - lse) and ds the change of the scores, rows of p and its sink adding up to 1:
dlse = rowsum(p * ds), dout = (p * ds) v + p dv - dlse * out. Dropout scales p where it meets v and dv, not in
dlse. Scores are recomputed tile by tile as in the backward pass, so memory stays O(seq_q + seq_kv).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from ._options import Options
from ._problem import (
    LAYOUTS,
    Problem,
    contract,
    fold,
    heads_first,
    is_finite,
    lse_dtype,
    no_autocast,
    parts,
    tile_of,
    unfold,
)
from .portable import Tiles


class Tangents(NamedTuple):
    """Of what has one."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


def is_active() -> bool:
    """Whether tensors may carry tangents (torch.func.jvp, torch.autograd.forward_ad)."""
    return forward_ad._current_level >= 0


def check_none(family: ops.Family, call: tuple) -> None:
    """Raises where writing into `out` would lose a tangent. `call`: as for `_run.run`."""
    for name, value in zip(("q", "k", "v", *family.options), call, strict=True):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise ValueError(f"out must be None when {name} has a tangent, which would be lost")


def tangents(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options, given: Tangents
) -> tuple[Tensor, Tensor]:
    """(tangent of out, tangent of lse) in their shapes and dtypes."""

    def like(t: Tensor, tangent: Tensor | None) -> Tensor:
        return t.new_zeros(()).expand(t.shape) if tangent is None else tangent

    changes = options._replace(bias=given.bias, alibi_slopes=given.alibi_slopes, sinks=given.sinks)
    own = parts(q, k, v, options)
    other = parts(like(q, given.q), like(k, given.k), like(v, given.v), changes)
    out_rows = heads_first(out, options.layout)
    lse_rows = lse[(None,) * (4 - q.dim())]
    found = []
    with no_autocast(q.device):
        for (p, queries, _), (change, _, _) in zip(own, other, strict=True):
            part = _Part(p, change, given, out_rows[:, :, queries], lse_rows[:, :, queries])
            found.append(part.tangents())
        rest = out_rows.shape[2] - sum(rows.shape[2] for rows, _ in found)  # behind the last packed sequence
        if rest:
            heads = out_rows.shape[:2]
            found.append((out.new_zeros(*heads, rest, out.shape[-1]), lse.new_zeros(*heads, rest)))
        dout, dlse = (torch.cat(pieces, 2) for pieces in zip(*found, strict=True))
    return _as_given(dout.to(out.dtype), q, options.layout), dlse.to(lse.dtype).reshape(lse.shape)


def _as_given(t: Tensor, q: Tensor, layout: int) -> Tensor:
    """`heads_first` undone."""
    if q.dim() == 2:
        return t[0, 0]
    t = t if q.dim() == 4 else t[0]
    return t.transpose(-3, -2) if layout == LAYOUTS["bshd"] else t


class _Part:
    """One problem of a call."""

    def __init__(self, problem: Problem, change: Problem, given: Tangents, out: Tensor, lse: Tensor):
        """out: (batch, heads_q, seq_q, dim_v), lse without the last axis."""
        self.problem, self.change, self.given, self.out, self.lse = problem, change, given, out, lse
        self.dtype = lse_dtype(problem.q)

    def tangents(self) -> tuple[Tensor, Tensor]:
        if not self.problem.has_work():
            return torch.zeros_like(self.out), torch.zeros_like(self.lse)
        tiles = Tiles(self.problem, self.dtype, 0, 0)
        safe = is_finite(self.problem.v) and is_finite(self.change.v)
        blocks = [self._rows(tiles, q0, q1, safe) for q0, q1 in tiles.query_blocks()]
        dout, dlse = (torch.cat(pieces, 3) for pieces in zip(*blocks, strict=True))
        return dout.flatten(1, 2), dlse.squeeze(-1).flatten(1, 2)

    def _rows(self, tiles: Tiles, q0: int, q1: int, safe: bool) -> tuple[Tensor, Tensor]:
        """Of queries [q0, q1): (batch, heads_kv, group, queries, dim_v), and with 1 in the place of dim_v."""
        p, dtype = self.problem, self.dtype
        q, dq = (x.q[..., q0:q1, :].to(dtype) for x in (p, self.change))
        out, lse = (p.rows(t)[..., q0:q1, :] for t in (self.out, self.lse[..., None]))
        lse = lse.masked_fill(lse == -math.inf, 0)
        values, moved, dlse, total = 0.0, 0.0, 0.0, 0.0
        blind = torch.ones_like(lse, dtype=torch.bool)  # rows that have seen no key
        for k0, k1 in tiles.key_blocks(q0, q1):
            k, v, dk, dv = (t[:, :, k0:k1].to(dtype) for t in (p.k, p.v, self.change.k, self.change.v))
            place = (q0, q1, k0, k1)
            s, visible, slope = tiles.scores(q, k, place)
            weights = (s.to(lse.dtype) - lse).exp().to(dtype)
            ds = self._score_changes(q, k, dq, dk, slope, place)
            if visible is not None:
                weights, ds = (t.masked_fill(~visible, 0) for t in (weights, ds))
                blind = blind & ~visible.any(-1, keepdim=True)
            else:
                blind = torch.zeros_like(blind)
            total = total + weights.sum(-1, keepdim=True)
            changed = weights * ds
            dlse = dlse + changed.sum(-1, keepdim=True)
            if (kept := p.kept(*place)) is not None:
                weights, changed = (t * kept * p.dropout_scale for t in (weights, changed))
            seen = None if safe or visible is None else fold(visible.expand_as(s))
            values = values + unfold(contract(fold(changed), seen, v), q.shape[2])
            if self.given.v is not None:
                moved = moved + unfold(contract(fold(weights), seen, dv), q.shape[2])
        if isinstance(total, float):  # no key for any of them
            return torch.zeros_like(out), torch.zeros_like(lse)
        if p.sinks is not None:
            sink = (p.sinks.to(lse.dtype) - lse).exp().to(dtype).masked_fill(blind, 0)
            total = total + sink
            if self.given.sinks is not None:
                dlse = dlse + sink * self.change.sinks.to(dtype)
        # Weights from a log-sum-exp of -1e38 do not add up to 1, see portable.backward.
        total = total.masked_fill(total == 0, 1)
        dlse = dlse / total
        return (values + moved) / total - dlse * out.to(dtype), dlse

    def _score_changes(
        self, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, slope: Tensor | None, place: tuple
    ) -> Tensor:
        """ds of a tile."""
        p, group = self.problem, q.shape[2]
        ds = torch.zeros((), dtype=self.dtype, device=q.device)
        if self.given.q is not None:
            ds = ds + unfold(fold(dq) @ k.mT, group)
        if self.given.k is not None:
            ds = ds + unfold(fold(q) @ dk.mT, group)
        ds = ds * p.scale
        if slope is not None:
            ds = ds * slope
        if self.given.bias is not None:
            ds = ds + tile_of(self.change.bias, *place).to(self.dtype)
        if self.given.alibi_slopes is not None:
            ds = ds - self.change.slopes.to(self.dtype) * p.distance(*place, self.dtype)
        return ds
