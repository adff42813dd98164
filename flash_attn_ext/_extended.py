"""Attention with what the plain operators do not know: from the arguments of a call to `_run.run`."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _errors, _nested, autograd, dispatch, ops
from ._lowering import Lowering, Sizes
from ._options import Options
from ._philox import draw_state, no_state
from ._problem import OPERATOR_LAYOUTS, heads_first
from ._run import check_constants, check_out, check_types, own_arguments, run
from ._windows import CAUSAL, window_bounds
from .config import AttentionConfig
from .masks import Mask


class Arguments(NamedTuple):
    """What a caller says beyond q, k and v; see `flash_attention`."""

    causal: bool | str = False
    scale: float | None = None
    layout: str = "bshd"
    mask: Tensor | Mask | None = None
    bias: Tensor | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    kv_lengths: Tensor | None = None
    dropout_p: float = 0.0
    return_lse: bool = False
    deterministic: bool | None = None
    batch_invariant: bool = False
    backend: str = "auto"
    config: AttentionConfig | None = None
    out: Tensor | None = None


class Packing(NamedTuple):
    """Where packed sequences begin and end, and how long they are at most; -1 is unknown."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int = -1
    max_seqlen_k: int = -1


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arguments: Arguments,
    packing: Packing | None = None,
    draw: Callable[[torch.device], Tensor] = draw_state,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `flash_attention` does with these arguments, or `flash_attention_varlen` with `packing`. `draw`
    gives the state of a dropout."""
    a = arguments
    if packing is None and any(isinstance(t, Tensor) and t.is_nested for t in (q, k, v)):
        return _nested.attention(q, k, v, arguments, _attend_packed)
    mask = None if isinstance(a.mask, Mask) else a.mask
    tensors = (mask, a.bias, a.kv_lengths, a.out, a.alibi_slopes, a.sinks)
    checked = (tensors, a.layout, a.causal, a.scale, a.softcap, a.config)
    check_types(q, k, v, *checked)
    for name, cu_seqlens in zip(Packing._fields[:2], packing or (), strict=False):
        _errors.check_tensor(name, cu_seqlens)
    if a.deterministic is not None and not isinstance(a.deterministic, bool):
        raise TypeError(f"deterministic must be a bool or None, got {a.deterministic!r}")
    check_constants(scale=a.scale, softcap=a.softcap)
    a = a._replace(dropout_p=check_dropout(a.dropout_p))
    if torch._C._is_any_autocast_enabled():
        q, k, v = autograd.autocast(q, k, v)
    config, compiling = a.config or AttentionConfig(), torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    options = options_of(q, k, a, config, packing, draw=no_state)
    name = dispatch.resolve(a.backend, config.backend, dispatch.Request.of(q, v, a.batch_invariant))
    own = own_arguments(name, config, a.batch_invariant, a.deterministic, q.dtype)
    differentiable = (q, k, v, a.bias, a.alibi_slopes, a.sinks)
    needs_grad = torch.is_grad_enabled() and (
        any(t is not None and t.requires_grad for t in differentiable)
        or (transformed and a.out is None)  # vmap's tensors do not tell
    )
    if a.out is not None:
        check_out(a.out, needs_grad)
    if a.dropout_p > 0:
        if not (compiling or transformed or torch._C._len_torch_dispatch_stack()):
            _errors.check_call(q, k, v, options, a.out)  # what raises draws nothing
        options = options._replace(rng_state=draw(q.device))
    operators = (ops.EXTENDED_BY_BACKEND if options.is_extended() else ops.BY_BACKEND)[name]
    call = (q, k, v, *(options if options.is_extended() else options.plain()))
    try:
        return run(name, operators, call, a.return_lse, needs_grad, own, a.out)
    except RuntimeError as error:
        raise _errors.translate(error) from None


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, packing: tuple):
    return attention(q, k, v, arguments, Packing(*packing))


def check_dropout(dropout_p: object) -> float:
    """The probability as the operators take it."""
    dropout_p = as_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    return dropout_p


def as_number(name: str, value: object) -> float | torch.SymInt | torch.SymFloat:
    """A real number of any kind, NumPy's among them, as one of Python or of a trace."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def options_of(
    q: Tensor,
    k: Tensor,
    a: Arguments,
    config: AttentionConfig,
    packing: Packing | None = None,
    draw: Callable[[torch.device], Tensor] = draw_state,
) -> Options:
    """The options for the operators: typed masks lowered, and the state of a dropout drawn."""
    left, right = (-1, -1) if a.window is None else window_bounds(a.window)
    options = Options(
        mask=None if isinstance(a.mask, Mask) else a.mask,
        bias=a.bias,
        kv_lengths=a.kv_lengths,
        alibi_slopes=a.alibi_slopes,
        sinks=a.sinks,
        rng_state=draw(q.device) if a.dropout_p > 0 else None,
        layout=OPERATOR_LAYOUTS[a.layout],
        causal=CAUSAL[a.causal],
        window_left=left,
        window_right=right,
        scale=config.softmax_scale if a.scale is None else a.scale,
        softcap=a.softcap,
        dropout_p=a.dropout_p,
        **({} if packing is None else packing._asdict()),
    )
    if not isinstance(a.mask, Mask):
        return options
    sizes = _sizes(q, k, options.layout, packing)
    lowering = Lowering(options)
    a.mask._lower(lowering, sizes)
    return lowering.lowered(sizes.batch)


def _sizes(q: Tensor, k: Tensor, layout: int, packing: Packing | None) -> Sizes:
    """Those that a mask is for. What is wrong with tensors of another rank, the validator will say."""
    if packing is None:
        (batch, heads, seq_q, _), (_, _, seq_kv, _) = (
            heads_first(t, layout).shape if t.dim() in (2, 3, 4) else (1, 1, 0, 0) for t in (q, k)
        )
        return Sizes(batch, heads, seq_q, seq_kv, q.device)
    lengths = [cu.diff()[:, None] for cu in packing[:2]]
    longest = []
    for name, own, known in zip(("q", "k"), lengths, packing[2:], strict=True):
        if known < 0 and (own.device.type != "cpu" or torch.compiler.is_compiling()):
            raise ValueError(f"max_seqlen_{name} must be an int with a mask of masks.Mask, got none")
        longest.append(known if known >= 0 else int(own.max()) if len(own) else 0)
    heads = q.shape[1] if q.dim() == 3 else 1
    return Sizes(len(lengths[0]), heads, *longest, q.device, *lengths)
