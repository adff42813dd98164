"""First-order gradients and autocast of the attention operators, and notice of what they write into."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor

from . import ops
from ._problem import AUTOCAST_DEVICES

# Positions in the forward operators' arguments: three tensors, mask, bias, kv_lengths, options,
# return_lse, and what the backend wants to be told beyond that.
_BIAS, _TENSORS, _RETURN_LSE = 4, 6, 12


class _RefuseSecondOrder(torch.autograd.Function):
    """Passes the first `count` tensors on; differentiating them again raises."""

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
            "second-order gradients of flash attention are not implemented: "
            "use backend='standard' where a gradient of a gradient is needed"
        )


def _save(ctx, operators: ops.Operators, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.operators = operators
    ctx.options = inputs[_TENSORS:]


def _backward(
    ctx, dout: Tensor | None, dlse: Tensor | None, need_bias_grad: bool
) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the forward operator."""
    q, k, v, mask, bias, kv_lengths, out, lse = ctx.saved_tensors
    *options, return_lse = ctx.options[: _RETURN_LSE - _TENSORS + 1]
    own = ctx.options[len(options) + 1 :]
    masking = mask, bias, kv_lengths
    if not return_lse:
        lse = ctx.operators.forward(q, k, v, *masking, *options, True, *own)[1]
        dlse = None
    if dout is None:
        dout = torch.zeros_like(out)
    grads = ctx.operators.backward(dout, dlse, q, k, v, out, lse, *masking, *options, need_bias_grad, *own)
    if torch.is_grad_enabled():  # create_graph: whoever differentiates these gradients is told
        grads = _RefuseSecondOrder.apply(4, *(g.detach() for g in grads), dout, q, k, v, bias)
    dq, dk, dv, dbias = grads
    rest = len(ctx.options) + _TENSORS - _BIAS - 1
    return (dq, dk, dv, None, dbias if need_bias_grad else None) + (None,) * rest


class _EagerAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, *inputs):
        ctx.set_materialize_grads(False)
        output = operators.forward(*inputs)
        _save(ctx, operators, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        return None, *_backward(ctx, dout, dlse, ctx.needs_input_grad[1 + _BIAS])


class _FunctorchAttention(torch.autograd.Function):
    """The form that torch.func asks for; in eager mode it costs several times the other one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operators, *inputs):
        return operators.forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        _save(ctx, inputs[0], inputs[1:], output)

    backward = _EagerAttention.backward


# Past the part of `Function.apply` that serves functorch, to whom `attention` never passes this.
_apply_eager = super(torch.autograd.Function, _EagerAttention).apply


def attention(operators: ops.Operators, *arguments) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable: `operators.attention` at a fraction of the dispatcher's cost.

    `arguments` are those of `operators.forward`, with return_lse True.
    """
    if torch._C._are_functorch_transforms_active():
        return _FunctorchAttention.apply(operators, *arguments)
    return _apply_eager(operators, *arguments)


def _register_autograd(operators: ops.Operators) -> None:
    def setup_context(ctx, inputs, output):
        _save(ctx, operators, inputs, output)

    def backward(ctx, dout, dlse):
        return _backward(ctx, dout, dlse, ctx.needs_input_grad[_BIAS])

    torch.library.register_autograd(operators.attention, backward, setup_context=setup_context)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as an active autocast wants them. float64 stays, as in torch's own operators;
    a bias keeps its dtype, for -1e38 would become -inf in a narrower one."""
    device = q.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))


_AUTOCAST_KEYS = [f"Autocast{device.upper()}" for device in AUTOCAST_DEVICES]
_library = torch.library.Library("flash_attn_ext", "FRAGMENT")  # registrations live as long as it does


def _register_autocast(operators: ops.Operators) -> None:
    key_sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in _AUTOCAST_KEYS)
    without_autocast = functools.reduce(operator.or_, key_sets)

    def kernel(q, k, v, *arguments):
        q, k, v = autocast(q, k, v)
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return operators.attention(q, k, v, *arguments)

    for key in _AUTOCAST_KEYS:
        _library.impl(operators.attention, kernel, key)


def _register_version_bump(forward_out: torch._ops.OpOverload) -> None:
    """Count a write into `out`, so that backward notices when `out` had been saved for something else."""
    below = torch._C._after_ADInplaceOrView_keyset

    def kernel(keyset, q, k, v, out, *arguments):
        torch.autograd.graph.increment_version(out)
        return forward_out.redispatch(keyset & below, q, k, v, out, *arguments)

    _library.impl(forward_out, kernel, "ADInplaceOrView", with_keyset=True)


def register(operators: ops.Operators) -> None:
    """Make `attention` differentiable and subject to autocast, and what `forward_out` writes noticed."""
    _register_autograd(operators)
    _register_autocast(operators)
    if operators.forward_out is not None:
        _register_version_bump(operators.forward_out)
