"""Shapes, strides and dtypes of every operator's results, for tracing without data."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._errors import check_call
from ._options import EXTENDED_TENSORS, Options
from ._problem import kernel_lse_dtype, lse_shape, new_result


def _check(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor | None = None) -> None:
    """The validator itself, where all sizes are numbers; symbolic ones are checked when the call runs."""
    tensors = (q, k, v, out, *(getattr(options, name) for name in EXTENDED_TENSORS))
    sizes = [n for t in tensors if t is not None for n in (*t.shape, *t.stride())]
    if not any(isinstance(n, (torch.SymInt, torch.SymFloat)) for n in (*sizes, *options)):
        check_call(q, k, v, options, out)


def _lse(q: Tensor, options: Options, return_lse: bool) -> Tensor:
    shape = lse_shape(q, options.layout) if return_lse else (0,)
    return q.new_empty(shape, dtype=kernel_lse_dtype(q))


def register(operators: ops.Operators) -> None:
    family = operators.family

    def forward(q, k, v, *arguments):
        options, rest = family.read(arguments)  # without what is default at their end
        _check(q, k, v, options)
        return new_result(q, v.shape[-1], options.layout), _lse(q, options, bool(rest) and rest[0])

    def forward_out(q, k, v, out, *arguments):
        options, (return_lse, *_) = family.read(arguments)
        _check(q, k, v, options, out)
        return _lse(q, options, return_lse)

    def backward(dout, dlse, q, k, v, out, lse, *arguments):
        options, needs = family.read(arguments)
        owners = [getattr(options, name) for name in family.differentiable]
        needs = needs[: len(owners)] or [False] * len(owners)
        others = (
            t.new_empty(t.shape) if need else q.new_empty(0) for t, need in zip(owners, needs, strict=True)
        )
        return *(new_result(t, t.shape[-1], options.layout) for t in (q, k, v)), *others

    torch.library.register_fake(operators.attention, forward)
    torch.library.register_fake(operators.forward, forward)
    torch.library.register_fake(operators.backward, backward)
    if operators.forward_out is not None:
        torch.library.register_fake(operators.forward_out, forward_out)
