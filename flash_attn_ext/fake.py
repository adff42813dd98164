"""Shapes, strides and dtypes of every operator's results, for tracing without data."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._errors import check_call
from ._problem import kernel_lse_dtype, lse_shape


def _check(*arguments, out: Tensor | None = None) -> None:
    """The validator itself, where all sizes are numbers; symbolic sizes are checked when the call runs."""
    tensors = [t for t in (*arguments[:6], out) if t is not None]
    if not any(isinstance(n, torch.SymInt) for t in tensors for n in (*t.shape, *t.stride())):
        check_call(*arguments, out=out)


def _lse(q: Tensor, layout: int, return_lse: bool) -> Tensor:
    return q.new_empty(lse_shape(q, layout) if return_lse else (0,), dtype=kernel_lse_dtype(q))


def _forward(q, k, v, mask, bias, kv_lengths, layout, *options):
    options, return_lse = options[:5], options[5]  # a backend's own arguments follow
    _check(q, k, v, mask, bias, kv_lengths, layout, *options)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), _lse(q, layout, return_lse)


def _forward_out(q, k, v, out, mask, bias, kv_lengths, layout, *options):
    options, return_lse = options[:5], options[5]
    _check(q, k, v, mask, bias, kv_lengths, layout, *options, out=out)
    return _lse(q, layout, return_lse)


def _backward(dout, dlse, q, k, v, out, lse, mask, bias, *options):
    need_bias_grad = options[7]
    dbias = bias.new_empty(bias.shape) if need_bias_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def register(operators: ops.Operators) -> None:
    torch.library.register_fake(operators.attention, _forward)
    torch.library.register_fake(operators.forward, _forward)
    torch.library.register_fake(operators.backward, _backward)
    if operators.forward_out is not None:
        torch.library.register_fake(operators.forward_out, _forward_out)
