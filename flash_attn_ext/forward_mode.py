"""Forward-mode derivatives: what a change of the inputs makes of the results, blockwise in torch operations.

With p = exp(s - lse) and ds the change of the scores, rows of p and its sink adding up to 1:
dlse = rowsum(p * ds), dout = (p * ds) v + p dv - dlse * out. Dropout scales p where it meets v and dv, not in
dlse. Scores are recomputed tile by tile as in the backward pass, so memory stays O(seq_q + seq_kv).
"""

from __future__ import annotations

import math
import re
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


def check_nesting() -> None:
    """Raises in the one nest of transforms where torch loses what an autograd function's `jvp` returns."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    kinds = "".join(level.key().name[0] for level in levels)  # V(map), J(vp), G(rad), from the outermost in
    if re.search("V.*J.*V.*J", kinds):
        raise NotImplementedError(
            "a batched jvp of a batched jvp (jacfwd of jacfwd) would be wrong, for torch loses derivatives "
            "there: use jacfwd of jacrev, which is torch.func.hessian, or backend='standard'"
        )


def check_none(family: ops.Family, call: tuple) -> None:
    """Raises where writing into `out` would lose a tangent. `call`: as for `_run.run`."""
    for name, value in zip(("q", "k", "v", *family.options), call, strict=True):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise ValueError(f"out must be None when {name} has a tangent, which would be lost")


def tangents(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options, given: Tangents
) -> tuple[Tensor, Tensor]:
    """(tangent of out, tangent of lse) in their shapes and dtypes."""
    with no_autocast(q.device):
        found = [part.tangents() for part in linear_parts(q, k, v, out, lse, options, given)]
    return joined(found, q, out, lse, options.layout)


def linear_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    given: Tangents,
    only: int | None = None,
) -> list[LinearPart]:
    """As `parts`."""

    def like(t: Tensor, tangent: Tensor | None) -> Tensor:
        return t.new_zeros(()).expand(t.shape) if tangent is None else tangent

    changes = options._replace(bias=given.bias, alibi_slopes=given.alibi_slopes, sinks=given.sinks)
    own = parts(q, k, v, options, only)
    other = parts(like(q, given.q), like(k, given.k), like(v, given.v), changes, only)
    out_rows = heads_first(out, options.layout)
    lse_rows = lse[(None,) * (4 - q.dim())]
    return [
        LinearPart(p, change, given, queries, out_rows[:, :, queries], lse_rows[:, :, queries])
        for (p, queries, _), (change, _, _) in zip(own, other, strict=True)
    ]


def joined(
    found: list[tuple[Tensor, Tensor]], q: Tensor, out: Tensor, lse: Tensor, layout: int
) -> tuple[Tensor, Tensor]:
    """What each part has for its rows of `out` and `lse`, in the shapes and dtypes of these."""
    batch, heads, seq = heads_first(out, layout).shape[:3]
    rest = seq - sum(rows.shape[2] for rows, _ in found)  # behind the last packed sequence
    behind = (out.new_zeros(batch, heads, rest, out.shape[-1]), lse.new_zeros(batch, heads, rest))
    found = [*found, behind] if rest or not found else found
    of_out, of_lse = (torch.cat(pieces, 2) for pieces in zip(*found, strict=True))
    return _as_given(of_out.to(out.dtype), q, layout), of_lse.to(lse.dtype).reshape(lse.shape)


def _as_given(t: Tensor, q: Tensor, layout: int) -> Tensor:
    """`heads_first` undone."""
    if q.dim() == 2:
        return t[0, 0]
    t = t if q.dim() == 4 else t[0]
    return t.transpose(-3, -2) if layout == LAYOUTS["bshd"] else t


class Sums(NamedTuple):
    """Over keys, for some queries: (batch, heads_kv, group, queries, dim_v), the others with 1 for dim_v."""

    values: Tensor  # of (p * ds) v + p dv
    dlse: Tensor  # of p * ds
    total: Tensor  # of p


class LinearPart:
    """One problem of a call, and how its results follow its inputs."""

    def __init__(
        self, problem: Problem, change: Problem, given: Tangents, queries: slice, out: Tensor, lse: Tensor
    ):
        """`queries`: the place of its rows in the call; out: (batch, heads_q, seq_q, dim_v), lse without the
        last axis."""
        self.problem, self.change, self.given, self.queries = problem, change, given, queries
        self.out, self.lse = out, lse
        self.dtype = lse_dtype(problem.q)
        self.tiles = Tiles(problem, self.dtype, 0, 0)

    def tangents(self) -> tuple[Tensor, Tensor]:
        if not self.problem.has_work():
            return torch.zeros_like(self.out), torch.zeros_like(self.lse)
        safe = self.is_finite()
        return self.whole([self.rows(q0, q1, safe) for q0, q1 in self.tiles.query_blocks()])

    def is_finite(self) -> bool:
        """Whether what is hidden needs no care."""
        return all(map(is_finite, (self.problem.k, self.problem.v, self.change.v)))

    def whole(self, blocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `rows` returned for all of them, in the shapes of `out` and `lse`."""
        dout, dlse = (torch.cat(pieces, 3) for pieces in zip(*blocks, strict=True))
        return dout.reshape(self.out.shape), dlse.reshape(self.lse.shape)

    def rows(self, q0: int, q1: int, safe: bool) -> tuple[Tensor, Tensor]:
        """Tangents of queries [q0, q1): (batch, heads_kv, group, queries, dim_v), and with 1 in the place of
        dim_v."""
        return self.finish(q0, q1, self.sums(q0, q1, safe))

    def sums(self, q0: int, q1: int, safe: bool) -> Sums:
        """Of all keys that these queries may see."""
        batch, heads_kv, group = self.problem.q.shape[:3]
        zeros = self.problem.q.new_zeros(batch, heads_kv, group, q1 - q0, 1, dtype=self.dtype)
        found = Sums(zeros.expand(*zeros.shape[:-1], self.problem.v.shape[-1]), zeros, zeros)
        for k0, k1 in self.tiles.key_blocks(q0, q1):
            found = Sums(*map(torch.add, found, self.tile(q0, q1, k0, k1, safe)))
        return found

    def tile(self, q0: int, q1: int, k0: int, k1: int, safe: bool) -> Sums:
        """What keys [k0, k1) contribute."""
        p, dtype, place = self.problem, self.dtype, (q0, q1, k0, k1)
        q, dq = (x.q.narrow(-2, q0, q1 - q0).to(dtype) for x in (p, self.change))
        tensors = (p.k, p.v, self.change.k, self.change.v)
        k, v, dk, dv = (t.narrow(2, k0, k1 - k0).to(dtype) for t in tensors)
        if not safe and (visible := p.visible(*place)) is not None:
            k = _without_unseen(k, visible.expand(*q.shape[:-1], k1 - k0))
        s, visible, slope = self.tiles.scores(q, k, place)
        weights = (s.to(self.lse.dtype) - self._lse_of(q0, q1)).exp().to(dtype)
        ds = self._score_changes(q, k, dq, dk, slope, place)
        if visible is not None:
            weights, ds = (t.masked_fill(~visible, 0) for t in (weights, ds))
        changed = weights * ds
        total, dlse = (t.sum(-1, keepdim=True) for t in (weights, changed))
        if (kept := p.kept(*place)) is not None:
            weights, changed = (t * kept * p.dropout_scale for t in (weights, changed))
        seen = None if safe or visible is None else fold(visible.expand_as(s))
        values = contract(fold(changed), seen, v)
        if self.given.v is not None:
            values = values + contract(fold(weights), seen, dv)
        return Sums(unfold(values, q.shape[2]), dlse, total)

    def finish(self, q0: int, q1: int, sums: Sums) -> tuple[Tensor, Tensor]:
        """What `rows` returns."""
        p, (values, dlse, total) = self.problem, sums
        out = p.rows(self.out).narrow(-2, q0, q1 - q0)
        if p.sinks is not None:
            sink = (p.sinks.to(self.lse.dtype) - self._lse_of(q0, q1)).exp().to(self.dtype)
            sink = sink.masked_fill(self._blind(q0, q1), 0)
            total = total + sink
            if self.given.sinks is not None:
                dlse = dlse + sink * self.change.sinks.to(self.dtype)
        # Weights from a log-sum-exp of -1e38 do not add up to 1, see portable.backward.
        total = total.masked_fill(total == 0, 1)
        dlse = dlse / total
        return values / total - dlse * out.to(self.dtype), dlse

    def _lse_of(self, q0: int, q1: int) -> Tensor:
        """(batch, heads_kv, group, queries, 1), with 0 for -inf."""
        lse = self.problem.rows(self.lse.unsqueeze(-1)).narrow(-2, q0, q1 - q0)
        return lse.masked_fill(lse == -math.inf, 0)

    def _blind(self, q0: int, q1: int) -> Tensor:
        """Which of these queries see no key, in the shape of their lse."""
        blind = torch.ones_like(self._lse_of(q0, q1), dtype=torch.bool)
        for k0, k1 in self.tiles.key_blocks(q0, q1):
            visible = self.problem.visible(q0, q1, k0, k1)
            if visible is None:
                return torch.zeros_like(blind)
            blind = blind & ~visible.any(-1, keepdim=True)
        return blind

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


def _without_unseen(k: Tensor, visible: Tensor) -> Tensor:
    """0 for keys of a tile that none of its rows sees: the derivative of a product with NaN is NaN, also
    where nothing depends on the product. visible: (batch, heads_kv, group, queries, keys)."""
    return k.masked_fill(~visible.any((2, 3)).unsqueeze(-1), 0)
