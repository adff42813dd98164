"""Derivatives of gradients, blockwise in torch operations.

The gradients g of L = <dout, out(x)> + <dlse, lse(x)> in the inputs x, multiplied with a direction u, are
what L changes by along it: <u, g> = <dout, tangent of out along u> + <dlse, tangent of lse along u>. So the
derivatives of g follow from those of the tangents (forward_mode.py), which are written in terms of x, out and
lse; autograd sees to what out and lse depend on. Scores are recomputed for one tile at a time, so memory is
O(seq_q + seq_kv).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from ._options import Options
from ._problem import heads_first, lse_dtype, no_autocast
from .forward_mode import Tangents, check_nesting, joined, linear_parts


class Derivatives(NamedTuple):
    """Of <dout, tangent of out> + <dlse, tangent of lse>, in the shapes and dtypes of what they belong to."""

    dout: Tensor
    dlse: Tensor
    out: Tensor
    lse: Tensor
    inputs: dict[str, Tensor]  # by the names in Tangents; what the call does not have is not there


def derivatives(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    direction: Tangents,
) -> Derivatives:
    dtype = lse_dtype(q)
    inputs = {"q": q, "k": k, "v": v}
    inputs |= {name: t for name in Tangents._fields[3:] if (t := getattr(options, name)) is not None}
    # Sums over blocks are rounded once.
    sources = {"out": out.to(dtype), "lse": lse, **{name: t.to(dtype) for name, t in inputs.items()}}
    totals = {name: torch.zeros_like(t) for name, t in sources.items()}
    if dlse is None:
        dlse = torch.zeros_like(lse)
    dout_rows = heads_first(dout.to(dtype), options.layout)
    dlse_rows = dlse[(None,) * (4 - q.dim())].to(dtype)

    def parts(sources: dict[str, Tensor], only: int | None = None) -> list:
        own = dict(sources)
        tensors = (own.pop(name) for name in ("q", "k", "v", "out", "lse"))
        return linear_parts(*tensors, options._replace(**own), direction, only)

    def add(grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            totals[name] = totals[name] + grad

    found = []
    with no_autocast(q.device), _plainly_saved():
        for n, part in enumerate(parts(sources)):
            if not part.problem.has_work():
                found.append(part.tangents())
                continue
            safe = part.is_finite()
            blocks = []
            for q0, q1 in part.tiles.query_blocks():
                sums = part.sums(q0, q1, safe)
                rows, pull = torch.func.vjp(
                    lambda s, sums, at=(n, q0, q1): parts(s, at[0])[0].finish(*at[1:], sums), sources, sums
                )
                cotangents = (
                    part.problem.rows(t[:, :, part.queries]).narrow(3, q0, q1 - q0).to(r.dtype)
                    for t, r in zip((dout_rows, dlse_rows.unsqueeze(-1)), rows, strict=True)
                )
                own, into_sums = pull(tuple(cotangents))
                add(own)
                for k0, k1 in part.tiles.key_blocks(q0, q1):
                    _, pull = torch.func.vjp(
                        lambda s, at=(n, q0, q1, k0, k1), safe=safe: parts(s, at[0])[0].tile(*at[1:], safe),
                        sources,
                    )
                    add(*pull(into_sums))
                blocks.append(rows)
            found.append(part.whole(blocks))
    of_dout, of_dlse = joined(found, q, out, lse, options.layout)
    return Derivatives(
        of_dout,
        of_dlse,
        totals["out"].to(out.dtype),
        totals["lse"],
        {name: totals[name].to(t.dtype) for name, t in inputs.items()},
    )


@contextmanager
def _plainly_saved() -> Iterator[None]:
    """Without the hooks on saved tensors of a checkpoint or save_on_cpu, which torch.func refuses: what it
    saves for one tile is gone before the next, and not for them to keep."""
    hooks = []
    while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        hooks.append(pair)
    try:
        yield
    finally:
        for pair in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)


@dataclass(frozen=True)  # not a tuple: torch.func would take it apart
class Call:
    """What `operators.backward` was called for. `sources`: dout, dlse, the tensors among the arguments of
    `operators.forward`, out, lse."""

    operators: ops.Operators
    rest: tuple  # of the arguments of `operators.forward`: those that are no tensors
    needs: tuple[bool, ...]  # as `operators.backward` takes them

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources between dlse and out."""
        return "q", "k", "v", *self.operators.family.tensors

    @property
    def gradients(self) -> tuple[str, ...]:
        """What the results of `backward` belong to."""
        return "q", "k", "v", *self.operators.family.differentiable

    def backward(self, dout: Tensor, dlse: Tensor | None, sources: tuple) -> tuple[Tensor, ...]:
        _, _, q, k, v, *tensors, out, lse = sources
        numbers = self.operators.family.numbers
        options = (*tensors, *self.rest[:numbers], *self.needs, *self.rest[numbers + 1 :])
        return self.operators.call_backward(dout, dlse, q, k, v, out, lse, *options)

    def derivatives(self, sources: tuple, direction: Tangents) -> Derivatives:
        dout, dlse, q, k, v, *tensors, out, lse = sources
        options, _ = self.operators.family.read((*tensors, *self.rest))
        return derivatives(dout, dlse, q, k, v, out, lse, options, direction)

    def along(self, sources: tuple, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """What the gradients change by when the sources do; those of out and lse follow from the inputs'.

        The matrix of second derivatives is symmetric: `derivatives` multiplies with it, too.
        """
        into_dout, into_dlse, *changes = tangents
        by_name = dict(zip(self.names, changes, strict=False))
        direction = Tangents(*(by_name.get(name) for name in Tangents._fields))
        own: dict[str, Tensor] = {}
        if any(d is not None for d in direction):
            found = self.derivatives(sources, direction)
            own = found.inputs
            into_dout, into_dlse = (
                more if t is None else t + more
                for t, more in ((into_dout, found.out), (into_dlse, found.lse))
            )
        if into_dout is None:
            into_dout = torch.zeros_like(sources[0])
        grads = self.backward(into_dout, into_dlse, sources)
        return tuple(
            g + own[name] if g.numel() and name in own else g
            for name, g in zip(self.gradients, grads, strict=True)
        )


class _RefuseThirdOrder(torch.autograd.Function):
    """Passes the first `count` tensors on; differentiating them again, in any of the tensors, raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count, *tensors):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "third-order gradients of flash attention are not implemented: "
            "use backend='standard' where a gradient of a gradient's gradient is needed"
        )

    jvp = backward


class _AlongDirection(torch.autograd.Function):
    """Derivatives that are there already, as what they are linear in: the directions that they were taken
    along (twice backward, as torch.autograd.functional.hvp does). In the sources they are third order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call, places, *tensors):
        """tensors: the derivatives; directions, by `call.gradients`; sources. places: of the derivatives, in
        the order of the sources."""
        return tuple(t.clone() for t in tensors[: len(places)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.call, ctx.places, *tensors = inputs
        begin = len(ctx.places) + len(ctx.call.gradients)
        ctx.given = [d is not None for d in tensors[len(ctx.places) : begin]]
        ctx.save_for_backward(*tensors[begin:])

    @staticmethod
    def backward(ctx, *cotangents):
        sources = ctx.saved_tensors
        tangents: list[Tensor | None] = [None] * len(sources)
        for place, cotangent in zip(ctx.places, cotangents, strict=True):
            tangents[place] = cotangent
        found = ctx.call.along(sources, tangents)
        if torch.is_grad_enabled():
            depend_on = (t for t in (*sources, *cotangents) if t is not None)
            found = _RefuseThirdOrder.apply(len(found), *(t.detach() for t in found), *depend_on)
        into_directions = (t if given else None for t, given in zip(found, ctx.given, strict=True))
        nothing = [None] * (2 + len(ctx.places))
        # Asked for, these zeros meet an error behind the sources; else nobody takes them.
        return (*nothing, *into_directions, *(t if t is None else torch.zeros_like(t) for t in sources))

    jvp = _RefuseThirdOrder.backward


class _Gradients(torch.autograd.Function):
    """Gradients that are there already, made differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call, count, *tensors):
        return tuple(t.clone() for t in tensors[:count])  # torch drops the tangents of views

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.call, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.count :])
        ctx.save_for_forward(*tensors[ctx.count :])

    @staticmethod
    def backward(ctx, *directions):
        call, sources = ctx.call, ctx.saved_tensors
        nothing = [None] * (2 + ctx.count)
        direction = Tangents(**dict(zip(call.gradients, directions, strict=True)))
        if all(d is None for d in direction):
            return (*nothing, *(None for _ in sources))
        found = call.derivatives(sources, direction)
        own = [found.dout, found.dlse if sources[1] is not None else None]
        own += [found.inputs.get(name) for name in call.names] + [found.out, found.lse]
        if torch.is_grad_enabled():
            places = tuple(n for n, t in enumerate(own) if t is not None)
            held = [n for n, t in enumerate(sources) if t is not None]
            behind = list(sources)
            refusing = _RefuseThirdOrder.apply(len(held), *(sources[n] for n in held))
            for n, t in zip(held, refusing, strict=True):
                behind[n] = t
            final = _AlongDirection.apply(
                call, places, *(own[n].detach() for n in places), *directions, *behind
            )
            for n, t in zip(places, final, strict=True):
                own[n] = t
        return (*nothing, *own)

    @staticmethod
    def jvp(ctx, _call, _count, *tangents):
        check_nesting()
        return ctx.call.along(ctx.saved_tensors, tangents[ctx.count :])


def differentiable(grads: tuple[Tensor, ...], call: Call, sources: tuple) -> tuple[Tensor, ...]:
    """`grads`, which `call.backward` returned, as functions of `sources`."""
    return _Gradients.apply(call, len(grads), *(g.detach() for g in grads), *sources)
