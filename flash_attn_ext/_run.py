"""From a call whose backend is chosen to its result, for both families of operators."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cuda, _errors, autograd, dispatch, forward_mode, ops, portable, reference
from ._compiling import is_recorded
from ._problem import AS_GIVEN, LAYOUTS, lse_dtype
from ._windows import CAUSAL
from .config import AttentionConfig


def run(
    name: str,
    operators: ops.Operators,
    call: tuple,
    return_lse: bool,
    needs_grad: bool,
    own: tuple,
    out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`out`, or (out, lse). `call`: q, k, v and the options of the operators' family; `own`: what follows
    those in the operators' arguments."""
    may_have_tangents = forward_mode.is_active()
    if may_have_tangents and torch.compiler.is_compiling():
        raise NotImplementedError("a forward-mode derivative (jvp) cannot be compiled; take it in eager mode")
    with_tangents = may_have_tangents and name != "standard"
    if with_tangents and out is not None:
        forward_mode.check_none(operators.family, call)
    need_lse = return_lse or with_tangents or (needs_grad and name != "standard")
    if out is not None:
        lse = _write(name, operators, call, need_lse, own, out, needs_grad)
    else:
        out, lse = _compute(name, operators, call, need_lse, own, needs_grad or with_tangents)
    return (out, lse.to(lse_dtype(call[0]))) if return_lse else out


def _compute(
    name: str, operators: ops.Operators, call: tuple, need_lse: bool, own: tuple, differentiable: bool
) -> tuple[Tensor, Tensor]:
    if name == "standard":
        options, _ = operators.family.read(call[3:])
        if not torch.compiler.is_compiling():
            _errors.check_call(*call[:3], options)
        return reference.attention(*call[:3], options, need_lse)
    if torch.compiler.is_compiling():
        return operators.attention(*call, need_lse, *own)
    if is_recorded():  # with the LSE for gradients, which whoever runs it again may want
        return operators.attention(*call, True, *own)
    if not differentiable:
        return operators.forward(*call, need_lse, *own)
    return autograd.attention(operators, *call, need_lse, *own)


def _write(
    name: str,
    operators: ops.Operators,
    call: tuple,
    need_lse: bool,
    own: tuple,
    out: Tensor,
    needs_grad: bool,
) -> Tensor:
    """Computes into `out` and returns the LSE."""
    check_out(out, needs_grad)
    if name not in ("portable", "standard"):
        return operators.forward_out(*call[:3], out, *call[3:], need_lse, *own)
    options, _ = operators.family.read(call[3:])
    if name == "portable":
        return portable.forward(*call[:3], options, need_lse, *own, out=out)[1]
    _errors.check_call(*call[:3], options, out)
    result, lse = reference.attention(*call[:3], options, need_lse)
    out.copy_(result)
    return lse


def check_out(out: Tensor, needs_grad: bool) -> None:
    """Raises where a gradient would be lost by writing into `out`."""
    if needs_grad:
        raise ValueError(
            "out must be None when q, k, v or an option requires grad: gradients do not flow through it; "
            "use torch.no_grad() to write into it all the same"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must not require grad: use torch.no_grad() to write into it all the same")


def own_arguments(
    name: str,
    config: AttentionConfig,
    batch_invariant: bool,
    deterministic: bool | None,
    dtype: torch.dtype,
) -> tuple:
    """What a backend's operators want to be told beyond the options: their last arguments."""
    blocks = dispatch.blocks(name, config, batch_invariant)
    advice = (*blocks, config.num_splits or 0, batch_invariant)
    if name == "cpu":
        return (False, False, *advice) if any(advice) else ()
    if name in _cuda.BACKENDS:
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        own = (deterministic, dtype == torch.float32 and _cuda.tf32_is_allowed())
        return (*own, *advice) if any(advice) else own
    return blocks


def check_types(
    q: object,
    k: object,
    v: object,
    tensors: tuple,
    layout: object,
    causal: object,
    scale: object,
    softcap: object,
    config: object,
) -> None:
    """Raises for an argument that the validator, which reads tensors and numbers, could not even be given.
    `tensors`: mask, bias, kv_lengths, out, and what else of `_TENSORS` there is."""
    for name, value in {"q": q, "k": k, "v": v}.items():
        _errors.check_tensor(name, value)
    for name, value in zip(_TENSORS, tensors, strict=False):
        if value is not None:
            _errors.check_tensor(name, value)
    if layout != AS_GIVEN:
        _errors.choice("layout", layout, LAYOUTS)
    _errors.choice("causal", causal, CAUSAL)
    for name, value in {"scale": 0.0 if scale is None else scale, "softcap": softcap}.items():
        _check_number(name, value)
    if config is not None and not isinstance(config, AttentionConfig):
        raise TypeError(f"config must be an AttentionConfig or None, got {type(config).__name__}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name} must be a number, got a Tensor of shape {tuple(value.shape)}")
    if isinstance(value, int) and value.bit_length() > 1024:  # no float is as large
        raise ValueError(f"{name} must be finite, got an int of {value.bit_length()} bits")


def check_constants(**numbers: object) -> None:
    """Raises for a number with a gradient, which would be lost."""
    for name, value in numbers.items():
        if isinstance(value, Tensor) and value.requires_grad:
            instead = "detach it" if name == "softcap" else "multiply q by it instead"
            raise TypeError(f"{name} is a constant, got a Tensor that requires grad: {instead}")


_TENSORS = ("mask", "bias", "kv_lengths", "out", "alibi_slopes", "sinks")
