"""`flash_attention` and `merge_states`."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from . import _cuda, _errors, autograd, dispatch, ops, portable, reference
from ._problem import LAYOUTS, lse_dtype, lse_shape
from .config import AttentionConfig

CAUSAL = {False: 0, True: 1, "bottom_right": 1, "top_left": 2}
_NO_CONFIG = AttentionConfig()
_FAR = 1 << 62  # a window that reaches this far is unbounded, and fits an operator's int


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    *,
    scale: float | None = None,
    layout: str = "bshd",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    kv_lengths: Tensor | None = None,
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
            without batch (rank 3), or be one head (seq, dim) (rank 2).
        mask: bool, broadcastable to (batch, heads_q, seq_q, seq_kv); True = may attend.
        bias: floating, broadcastable likewise, added to the scores; -inf hides a key.
        window: (left, right): query i sees keys in [i - left, i + right] + seq_kv - seq_q;
            None or -1 is unbounded on that side.
        softcap: scores become softcap * tanh(scores / softcap) when > 0; before bias.
        kv_lengths: (batch,) int32 or int64; keys at or past the length are hidden.
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
        0 and -inf. Both are differentiable with respect to q, k, v and bias.

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
    compiling = torch.compiler.is_compiling()
    try:
        left, right = (-1, -1) if window is None else window_bounds(window)
        if deterministic is not None and not isinstance(deterministic, bool):
            raise TypeError(f"deterministic must be a bool or None, got {deterministic!r}")
        if torch._C._is_any_autocast_enabled():
            q, k, v = autograd.autocast(q, k, v)
        if backend == "auto" and config is None and q.is_cpu and dispatch.is_auto():
            name, own = "cpu", ()
            if not compiling:
                dispatch.log_auto_cpu()
        else:
            _check_types(q, k, v, mask, bias, kv_lengths, out, layout, causal, scale, softcap, config)
            config = config or _NO_CONFIG
            name = dispatch.resolve(backend, config.backend, dispatch.Request.of(q, v, batch_invariant))
            own = _own_arguments(name, config, batch_invariant, deterministic, q.dtype)
            scale = config.softmax_scale if scale is None else scale
        needs_grad = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
        )
        call = (q, k, v, mask, bias, kv_lengths, LAYOUTS[layout], CAUSAL[causal], left, right, scale, softcap)
        need_lse = return_lse or needs_grad
        if out is not None:
            lse = _write(name, call, need_lse, own, out, needs_grad)
        elif name == "standard":
            if not compiling:
                _errors.check_call(*call)
            out, lse = reference.attention(*call, return_lse)
        else:
            operators = ops.BY_BACKEND[name]
            if compiling:
                out, lse = operators.attention(*call, need_lse, *own)
            elif not needs_grad:
                out, lse = operators.forward(*call, need_lse, *own)
            else:
                out, lse = autograd.attention(operators, *call, need_lse, *own)
        return (out, lse.to(lse_dtype(q))) if return_lse else out
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        _check_types(q, k, v, mask, bias, kv_lengths, out, layout, causal, scale, softcap, config)
        raise _errors.translate(error) from None


def _own_arguments(
    name: str,
    config: AttentionConfig,
    batch_invariant: bool,
    deterministic: bool | None,
    dtype: torch.dtype,
) -> tuple:
    """What a backend's operators want to be told beyond the options: their last arguments."""
    blocks = dispatch.blocks(name, config, batch_invariant)
    if name == "cpu":
        return (False, False, *blocks) if any(blocks) else ()
    if name in _cuda.BACKENDS:
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        return deterministic, dtype == torch.float32 and _cuda.tf32_is_allowed()
    return blocks


def _write(name: str, call: tuple, need_lse: bool, own: tuple, out: Tensor, needs_grad: bool) -> Tensor:
    """Computes into `out` and returns the LSE."""
    if needs_grad:
        raise ValueError(
            "out must be None when q, k, v or bias requires grad: gradients do not flow through it; "
            "use torch.no_grad() to write into it all the same"
        )
    if name == "portable":
        return portable.forward(*call, need_lse, *own, out=out)[1]
    if name != "standard":
        return ops.BY_BACKEND[name].forward_out(*call[:3], out, *call[3:], need_lse, *own)
    _errors.check_call(*call, out=out)
    result, lse = reference.attention(*call, need_lse)
    out.copy_(result)
    return lse


def window_bounds(window: object) -> tuple[int, int]:
    """(left, right) with -1 for None."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be None or a pair (left, right), got {window!r}")
    return _window_side(window[0], window), _window_side(window[1], window)


def _window_side(side: object, window: tuple | list) -> int:
    if side is None:
        return -1
    if not isinstance(side, int):
        if not hasattr(side, "__index__"):
            raise TypeError(f"window must hold ints or None, got {window!r}")
        side = operator.index(side)
    return -1 if side >= _FAR else side


def _check_types(q, k, v, mask, bias, kv_lengths, out, layout, causal, scale, softcap, config) -> None:
    """Raises for an argument that the validator, which reads tensors and numbers, could not even be given."""
    for name, value in {"q": q, "k": k, "v": v}.items():
        _errors.check_tensor(name, value)
    for name, value in {"mask": mask, "bias": bias, "kv_lengths": kv_lengths, "out": out}.items():
        if value is not None:
            _errors.check_tensor(name, value)
    _errors.choice("layout", layout, LAYOUTS)
    _errors.choice("causal", causal, CAUSAL)
    for name, value in {"scale": 0.0 if scale is None else scale, "softcap": softcap}.items():
        if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not hasattr(
            value, "__float__"
        ):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if config is not None and not isinstance(config, AttentionConfig):
        raise TypeError(f"config must be an AttentionConfig or None, got {type(config).__name__}")


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
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    # The shift cancels out of the result, so no gradient is due to it.
    shift = torch.maximum(lse_a, lse_b).detach()
    shift = shift.masked_fill(shift == -math.inf, 0)
    weight_a, weight_b = (lse_a - shift).exp(), (lse_b - shift).exp()
    total = weight_a + weight_b
    nothing = total == 0
    total = total.masked_fill(nothing, 1)

    def columns(t: Tensor) -> Tensor:
        """(..., heads, seq) to the axes of out, dim_v being 1."""
        return (t.mT if layout == "bshd" and t.dim() > 1 else t).unsqueeze(-1)

    out = sum(
        out.to(dtype).masked_fill(columns(lse == -math.inf), 0) * columns(weight / total)
        for out, lse, weight in ((out_a, lse_a, weight_a), (out_b, lse_b, weight_b))
    )
    return out.to(out_a.dtype), (shift + total.log()).masked_fill(nothing, -math.inf)
