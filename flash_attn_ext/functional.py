"""`flash_attention` and `merge_states`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _errors, _extended, autograd, dispatch, forward_mode, ops
from ._merge import merge
from ._problem import AS_GIVEN, LAYOUTS, OPERATOR_LAYOUTS, lse_dtype, lse_shape
from ._run import check_constants, check_types, own_arguments, run
from ._windows import CAUSAL, window_bounds
from .config import AttentionConfig
from .masks import Mask

_NO_CONFIG = AttentionConfig()
_AS_GIVEN = OPERATOR_LAYOUTS[AS_GIVEN]
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active
# Tracers among others, for which `_run.run` has the operator that is differentiable wherever it runs again.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_trace = torch._C._get_tracing_state
_call_kernel = ops.KERNELS.call
_apply = autograd.apply_eager


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    *,
    scale: float | None = None,
    layout: str = "bshd",
    mask: Tensor | Mask | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
    config: AttentionConfig | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale q k^T + bias) v, in memory linear in the sequence lengths.

    Args:
        q: queries, (batch, seq_q, heads_q, dim); float16, bfloat16, float32 or float64.
        k: keys, (batch, seq_kv, heads_kv, dim). heads_q must be a multiple of heads_kv.
        v: values, (batch, seq_kv, heads_kv, dim_v). Strides are free, lengths may be 0.
        causal: True or "bottom_right": query i sees keys <= i + seq_kv - seq_q.
            "top_left": keys <= i.
        scale: factor of q k^T; default 1 / sqrt(dim).
        layout: "bshd" as above, or "bhsd": heads before sequence. In both, q, k and v may go
            without batch (rank 3), or be one head (seq, dim) (rank 2). All three may be jagged
            nested tensors, (batch, seq, heads, dim) or in "bhsd" (batch, heads, seq, dim): then so
            is the result, and all else is as in `flash_attention_varlen`.
        mask: bool, broadcastable to (batch, heads_q, seq_q, seq_kv), True = may attend; or one of
            `flash_attn_ext.masks`.
        bias: floating, broadcastable likewise, added to the scores; -inf hides a key.
        window: (left, right): query i sees keys in [i - left, i + right] + seq_kv - seq_q;
            None or -1 is unbounded on that side.
        softcap: scores become softcap * tanh(scores / softcap) when > 0; before bias.
        alibi_slopes: (heads_q,) or (batch, heads_q), floating; adds -slope * |i + seq_kv - seq_q - j|
            to the scores, with bias (Press et al., ALiBi, 2022, arXiv:2108.12409).
        sinks: (heads_q,), floating: the score, not scaled, of one more key per head that every query
            sees and that has no value; it takes part in the LSE (Xiao et al., 2024, arXiv:2309.17453).
        kv_lengths: (batch,) int32 or int64; keys at or past the length are hidden.
        dropout_p: the probability in [0, 1) with which a weight is dropped after the softmax; others
            count 1 / (1 - dropout_p) times. Which ones is drawn anew in every call, as
            `torch.manual_seed` governs, and is the same on all backends; see `testing.dropout_mask`.
        return_lse: also return the log-sum-exp of every row of scores.
        deterministic: True asks for gradients that are bitwise equal from run to run; None
            asks when `torch.use_deterministic_algorithms` is on. The CPU's always are; on CUDA
            it takes more time.
        batch_invariant: results must not depend on batch size or on how queries are chunked
            ("portable" then takes one query at a time; "standard" refuses).
        backend: "auto", "cpu", "cuda", "portable" (blockwise torch operations, any device) or
            "standard" (the unfused O(seq_q * seq_kv) computation).
        config: advice on tiles; see `AttentionConfig`. An argument given here goes before it.
        out: where to write the result; shape (batch, seq_q, heads_q, dim_v) in `layout`.

    Returns:
        out, contiguous, q's dtype; with `return_lse` also the LSE: natural logarithm,
        (batch, heads_q, seq_q) float32 (float64 for float64). A row that sees no key gives
        0 and -inf, or its sink. Both are differentiable with respect to q, k, v, bias,
        alibi_slopes and sinks.

    Raises:
        TypeError, ValueError, NotImplementedError: a wrong call; nothing was written. The
            message names the argument.

    Example:
        >>> q = torch.randn(2, 1024, 8, 64); k = v = torch.randn(2, 1024, 2, 64)
        >>> flash_attention(q, k, v, causal=True).shape
        torch.Size([2, 1024, 8, 64])

    Source: Dao et al., FlashAttention, 2022, arXiv:2205.14135; Dao, FlashAttention-2, 2023,
    arXiv:2307.08691.
    """
    if (
        dropout_p != 0.0
        or alibi_slopes is not None
        or sinks is not None
        or (mask is not None and not isinstance(mask, Tensor))
        or getattr(q, "is_nested", False)
    ):
        arguments = _extended.Arguments(
            causal, scale, layout, mask, bias, window, softcap, alibi_slopes, sinks, kv_lengths, dropout_p,
            return_lse, deterministic, batch_invariant, backend, config, out,
        )  # fmt: skip
        return _extended.attention(q, k, v, arguments)
    compiling = _is_compiling()
    try:
        left, right = (-1, -1) if window is None else window_bounds(window)
        if deterministic is not None and not isinstance(deterministic, bool):
            raise TypeError(f"deterministic must be a bool or None, got {deterministic!r}")
        if _is_any_autocast_enabled():
            q, k, v = autograd.autocast(q, k, v)
        if (
            backend == "auto"
            and config is None
            and not batch_invariant
            and q.is_cpu
            and dispatch.takes_cpu(compiling)
        ):
            name, own = "cpu", ()
        else:
            check_types(q, k, v, (mask, bias, kv_lengths, out), layout, causal, scale, softcap, config)
            config = config or _NO_CONFIG
            name = dispatch.resolve(backend, config.backend, dispatch.Request.of(q, v, batch_invariant))
            own = own_arguments(name, config, batch_invariant, deterministic, q.dtype)
            scale = config.softmax_scale if scale is None else scale
        if bias is not None:
            _errors.check_tensor("bias", bias)
        needs_grad = _is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (bias is not None and bias.requires_grad)
            or (out is None and not compiling and _are_transforms_active())  # vmap's tensors do not tell
        )
        numbers = (OPERATOR_LAYOUTS[layout], CAUSAL[causal], left, right, scale, softcap)
        if (
            name == "cpu"
            and out is None
            and not (return_lse or compiling or _dispatch_modes() or forward_mode.is_active())
            and _jit_trace() is None
            and not (needs_grad and _are_transforms_active())
        ):
            # A small call is over by now. What is default is left out, for every argument takes its time.
            if own or not (mask is bias is kv_lengths is window is scale is None and softcap == 0.0):
                few = None
                check_constants(scale=scale, softcap=softcap)
            else:
                few = () if numbers[0] == numbers[1] == 0 else (None, None, None, numbers[0], numbers[1])
            if needs_grad:
                return _apply(ops.KERNELS, (*numbers, True, *own), few, q, k, v, mask, bias, kv_lengths)[0]
            if few is None:
                return _call_kernel(q, k, v, mask, bias, kv_lengths, *numbers, False, *own)[0]
            return _call_kernel(q, k, v, *few)[0]
        check_constants(scale=scale, softcap=softcap)
        call = (q, k, v, mask, bias, kv_lengths, *numbers)
        return run(name, ops.BY_BACKEND[name], call, return_lse, needs_grad, own, out)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        check_types(q, k, v, (mask, bias, kv_lengths, out), layout, causal, scale, softcap, config)
        raise _errors.translate(error) from None


def kernels_alone(q: Tensor, k: Tensor, v: Tensor, causal: str | bool, scale: float | None) -> Tensor | None:
    """`flash_attention` of dense tensors in layout AS_GIVEN without further options, with less Python before
    it; None where there is something to trace, to convert or to differentiate, or to complain of."""
    if (
        not q.is_cpu
        or _is_compiling()
        or not dispatch.takes_cpu(compiling=False)
        or (
            _is_grad_enabled()
            and (q.requires_grad or k.requires_grad or v.requires_grad or _are_transforms_active())
        )
        or _is_any_autocast_enabled()
        or forward_mode.is_active()
        or _dispatch_modes()
        or _jit_trace() is not None
    ):
        return None
    if scale is None:
        few = ()
    elif isinstance(scale, Tensor):
        return None
    else:
        few = (-1, -1, scale)
    try:
        return _call_kernel(q, k, v, None, None, None, _AS_GIVEN, CAUSAL[causal], *few)[0]
    except (RuntimeError, TypeError):
        return None


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, layout: str = "bshd"
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each.

    Args:
        out_a, out_b: (batch, seq, heads, dim_v) in `layout`; or rank 3 without batch, or rank 2
            (seq, dim_v). Same shape.
        lse_a, lse_b: (batch, heads, seq) natural log-sum-exp, without the axes that out lacks;
            -inf marks a state without keys, whose out counts for nothing.
        layout: "bshd" or "bhsd".

    Returns:
        (out, lse) of the union, out in out_a's dtype, computed in float32 (float64 for float64);
        out 0 and lse -inf where both are empty. Associative and commutative up to rounding;
        differentiable with respect to all four.

    Raises:
        TypeError, ValueError: a shape or type that does not fit, by name.

    Example:
        >>> a = flash_attention(q, k[:, :512], v[:, :512], return_lse=True)
        >>> b = flash_attention(q, k[:, 512:], v[:, 512:], return_lse=True)
        >>> out, lse = merge_states(*a, *b)

    Source: the combination of Milakov and Gimelshein, 2018, arXiv:1805.02867, equation 4.
    """
    for name, value in {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}.items():
        _errors.check_tensor(name, value)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}")
    _errors.choice("layout", layout, LAYOUTS)
    if out_a.dim() not in (2, 3, 4):
        raise ValueError(f"out_a must have rank 2, 3 or 4, got shape {tuple(out_a.shape)}")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b has shape {tuple(out_b.shape)}, expected out_a's {tuple(out_a.shape)}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != lse_shape(out_a, LAYOUTS[layout]):
            expected = tuple(lse_shape(out_a, LAYOUTS[layout]))
            raise ValueError(f"{name} has shape {tuple(lse.shape)}, expected {expected}")
    dtype = lse_dtype(out_a)

    def columns(t: Tensor) -> Tensor:
        """(..., heads, seq) to the axes of out, dim_v being 1."""
        return (t.mT if layout == "bshd" and t.dim() > 1 else t).unsqueeze(-1)

    lse_a, lse_b = columns(lse_a.to(dtype)), columns(lse_b.to(dtype))
    out, lse = merge(out_a, lse_a, out_b, lse_b, dtype)
    lse = lse.squeeze(-1)
    return out.to(out_a.dtype), lse.mT if layout == "bshd" and lse.dim() > 1 else lse
