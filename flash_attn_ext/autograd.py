"""First-order gradients and autocast of the attention operators."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops

# Positions in the forward operators' arguments.
_BIAS, _OPTIONS, _RETURN_LSE = 4, slice(6, 12), 12


class _RefuseSecondOrder(torch.autograd.Function):
    """Passes gradients on; differentiating them again raises."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tensors[:count]

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "second-order gradients of flash attention are not implemented: "
            "use backend='standard' where a gradient of a gradient is needed"
        )


def _setup(ctx, operators: ops.Operators, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.save_for_backward(*inputs[:6], out, lse)
    ctx.operators = operators
    ctx.options = inputs[_OPTIONS]
    ctx.has_lse = inputs[_RETURN_LSE]
    ctx.blocks = inputs[_RETURN_LSE + 1 :]


def _gradients(ctx, dout: Tensor | None, dlse: Tensor | None, need_bias_grad: bool) -> tuple[Tensor, ...]:
    q, k, v, mask, bias, kv_lengths, out, lse = ctx.saved_tensors
    tensors = mask, bias, kv_lengths
    if not ctx.has_lse:
        lse = ctx.operators.forward(q, k, v, *tensors, *ctx.options, True, *ctx.blocks)[1]
        dlse = None
    if dout is None:
        dout = torch.zeros_like(out)
    grads = ctx.operators.backward(
        dout, dlse, q, k, v, out, lse, *tensors, *ctx.options, need_bias_grad, *ctx.blocks
    )
    # Under create_graph the result looks differentiable; say so only when it is asked to be.
    if torch.is_grad_enabled():
        grads = _RefuseSecondOrder.apply(4, *(g.detach() for g in grads), dout, q, k, v, bias)
    return grads


def _by_input(grads: tuple[Tensor, ...], need_bias_grad: bool, count: int) -> tuple[Tensor | None, ...]:
    """One entry per forward argument: q, k, v, mask, bias, then none."""
    dq, dk, dv, dbias = grads
    return (dq, dk, dv, None, dbias if need_bias_grad else None) + (None,) * (count - _BIAS - 1)


class Attention(torch.autograd.Function):
    """The differentiable operator for eager calls: a third of the dispatcher's overhead."""

    @staticmethod
    def forward(ctx, operators, *inputs):
        ctx.set_materialize_grads(False)
        output = operators.forward(*inputs)
        _setup(ctx, operators, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        need_bias_grad = ctx.needs_input_grad[1 + _BIAS]
        grads = _gradients(ctx, dout, dlse, need_bias_grad)
        return None, *_by_input(grads, need_bias_grad, _RETURN_LSE + 1 + len(ctx.blocks))


def _register_autograd(operators: ops.Operators) -> None:
    def setup_context(ctx, inputs, output):
        _setup(ctx, operators, inputs, output)

    def backward(ctx, dout, dlse):
        need_bias_grad = ctx.needs_input_grad[_BIAS]
        grads = _gradients(ctx, dout, dlse, need_bias_grad)
        return _by_input(grads, need_bias_grad, _RETURN_LSE + 1 + len(ctx.blocks))

    torch.library.register_autograd(operators.attention, backward, setup_context=setup_context)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as an active autocast wants them. float64 stays, as in torch's own operators;
    a bias keeps its dtype, for -1e38 would become -inf in a narrower one."""
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))


_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")


def _register_autocast(operators: ops.Operators) -> None:
    without_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    for key in _AUTOCAST_KEYS[1:]:
        without_autocast = without_autocast | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(q, k, v, *arguments):
        q, k, v = autocast(q, k, v)
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return operators.attention(q, k, v, *arguments)

    library = torch.library.Library("flash_attn_ext", "FRAGMENT")
    for key in _AUTOCAST_KEYS:
        library.impl(operators.attention, kernel, key)
    _libraries.append(library)


_libraries: list[torch.library.Library] = []  # a registration lives as long as its library


def register() -> None:
    for operators in (ops.CPU, ops.PORTABLE):
        _register_autograd(operators)
        _register_autocast(operators)
