"""Derivatives and autocast of the attention operators, and notice of what they write into."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import forward_mode, ops, second_order
from ._problem import AUTOCAST_DEVICES


def _save(ctx, tensors: tuple) -> None:
    """For `_backward`, and for `_tangents` where there may be some."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def _lse(ctx, saved: tuple[Tensor, ...]) -> Tensor:
    """The log-sum-exp, computed once more where nobody asked for it."""
    operators, rest = ctx.operators, ctx.rest
    numbers = operators.family.numbers
    if rest[numbers]:
        return saved[-1]
    # Of the operator that is differentiable where derivatives of the gradients may be asked for.
    again = operators.attention if torch.is_grad_enabled() else operators.forward
    return again(*saved[:-2], *rest[:numbers], True, *rest[numbers + 1 :])[1]


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None, offset: int) -> list[Tensor | None]:
    """One gradient or None for each tensor that the forward operator takes, which stand `offset` places later
    among what the autograd function was given."""
    operators, rest, saved = ctx.operators, ctx.rest, ctx.saved_tensors
    family = operators.family
    *inputs, out, _ = saved
    lse = _lse(ctx, saved)
    if not rest[family.numbers]:
        dlse = None
    if dout is None:
        dout = torch.zeros_like(out)
    needs = tuple(ctx.needs_input_grad[place + offset] for place in family.places)
    call = second_order.Call(operators, rest, needs)
    sources = (dout, dlse, *inputs, out, lse)
    grads = call.backward(dout, dlse, sources)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # create_graph, or tangents that go on
        grads = second_order.differentiable(grads, call, sources)
    result: list[Tensor | None] = [None] * len(inputs)
    result[:3] = grads[:3]
    for place, grad, need in zip(family.places, grads[3:], needs, strict=True):
        if need:
            result[place] = grad
    return result


def _tangents(ctx, given: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Those of (out, lse); `given`: of the tensors that the forward operator takes."""
    forward_mode.check_nesting()
    family = ctx.operators.family
    saved = ctx.saved_tensors
    options, _ = family.read((*saved[3:-2], *ctx.rest))
    of_options = {
        name: given[place] for name, place in zip(family.differentiable, family.places, strict=True)
    }
    changes = forward_mode.Tangents(*given[:3], **of_options)
    dout, dlse = forward_mode.tangents(*saved[:3], saved[-2], _lse(ctx, saved), options, changes)
    return dout, dlse if ctx.rest[family.numbers] else torch.zeros_like(saved[-1])


class _EagerAttention(torch.autograd.Function):
    """Takes what is no tensor in one piece, for each argument costs a small call time."""

    @staticmethod
    def forward(ctx, operators, rest, few, *tensors):
        """few: the options again without what is default at their end, if much is, else None."""
        ctx.set_materialize_grads(False)
        if few is None:
            output = operators.call(*tensors, *rest)
        else:
            output = operators.call(*tensors[:3], *few, return_lse=True)
        _save(ctx, (*tensors, *output))
        ctx.operators, ctx.rest, ctx.few = operators, rest, few
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        few = ctx.few
        if few is None or dout is None or torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return None, None, None, *_backward(ctx, dout, dlse, offset=3)
        q, k, v, *nothing, out, lse = ctx.saved_tensors
        dq, dk, dv, *_ = ctx.operators.call_backward(dout, dlse, q, k, v, out, lse, *few)
        return None, None, None, dq, dk, dv, *nothing

    @staticmethod
    def jvp(ctx, operators, rest, few, *given):
        return _tangents(ctx, given)


class _FunctorchAttention(torch.autograd.Function):
    """The form that torch.func asks for; in eager mode it costs several times the other one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operators, *inputs):
        return operators.forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        operators, *inputs = inputs
        tensors = inputs[: operators.family.first_number]
        _save(ctx, (*tensors, *output))
        ctx.operators, ctx.rest = operators, tuple(inputs[len(tensors) :])

    @staticmethod
    def backward(ctx, dout, dlse):
        return None, *_backward(ctx, dout, dlse, 1), *[None] * len(ctx.rest)

    @staticmethod
    def jvp(ctx, operators, *given):
        return _tangents(ctx, given)


_library = torch.library.Library("flash_attn_ext", "FRAGMENT")  # registrations live as long as it does


class _KernelAttention(torch.autograd.function._SingleLevelFunction):
    """For a kernel of the dispatcher, which torch.func calls for one transform at a time."""

    forward = staticmethod(_EagerAttention.forward)
    backward = staticmethod(_EagerAttention.backward)
    jvp = staticmethod(_EagerAttention.jvp)


# Past the part of `Function.apply` that serves functorch, which must not be active: (operators, what follows
# the tensors among the arguments of `operators.forward`, few, those tensors one by one).
apply_eager = super(torch.autograd.Function, _EagerAttention).apply


def attention(operators: ops.Operators, *arguments) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable: `operators.attention` at a fraction of the dispatcher's cost.

    `arguments` are those of `operators.forward`, with return_lse True.
    """
    if torch._C._are_functorch_transforms_active():
        return _FunctorchAttention.apply(operators, *arguments)
    tensors = operators.family.first_number
    return apply_eager(operators, arguments[tensors:], None, *arguments[:tensors])


def _register_autograd(operators: ops.Operators) -> None:
    """What torch.library.register_autograd does, and derivatives in forward mode and under torch.func."""
    below = torch._C._after_autograd_keyset
    tensors = operators.family.first_number
    defaults = tuple(argument.default_value for argument in operators.attention._schema.arguments)

    def kernel(keyset, *arguments):
        arguments += defaults[len(arguments) :]  # the dispatcher leaves them out
        backward = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if backward or forward_mode.is_active():
            with enable_single_level_autograd_function():
                return _KernelAttention.apply(operators, arguments[tensors:], None, *arguments[:tensors])
        return operators.attention.redispatch(keyset & below, *arguments)

    _library.impl(operators.attention, kernel, "Autograd", with_keyset=True)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as an active autocast wants them. float64 stays, as in torch's own operators;
    a bias keeps its dtype, for -1e38 would become -inf in a narrower one."""
    device = q.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))


_AUTOCAST_KEYS = [f"Autocast{device.upper()}" for device in AUTOCAST_DEVICES]


def _register_autocast(operators: ops.Operators) -> None:
    key_sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in _AUTOCAST_KEYS)
    without_autocast = functools.reduce(operator.or_, key_sets)

    def kernel(q, k, v, *arguments):
        q, k, v = autocast(q, k, v)
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return operators.attention(q, k, v, *arguments)

    for key in _AUTOCAST_KEYS:
        _library.impl(operators.attention, kernel, key)


def register_version_bump(operator: torch._ops.OpOverload, written: Callable[..., tuple]) -> None:
    """Count a write into what `written` picks from the arguments, so that backward notices when that had been
    saved for something else."""
    below = torch._C._after_ADInplaceOrView_keyset

    def kernel(keyset, *arguments):
        torch.autograd.graph.increment_version(written(*arguments))
        return operator.redispatch(keyset & below, *arguments)

    _library.impl(operator, kernel, "ADInplaceOrView", with_keyset=True)


def register(operators: ops.Operators) -> None:
    """Make `attention` differentiable and subject to autocast, and what `forward_out` writes noticed."""
    _register_autograd(operators)
    _register_autocast(operators)
    if operators.forward_out is not None:
        register_version_bump(operators.forward_out, lambda q, k, v, out, *rest: (out,))
