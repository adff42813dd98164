"""`flash_attention_with_kvcache`: attention over a cache of keys and values, to which a call may append."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cache_call, _errors, dispatch
from ._problem import lse_dtype
from ._run import check_types
from ._windows import CAUSAL, window_bounds

_TENSORS = (
    "k", "v", "cache_lengths", "block_table", "cache_batch_idx", "cache_leftpad", "rotary_cos", "rotary_sin",
    "alibi_slopes", "sinks",
)  # fmt: skip


def flash_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_lengths: int | Tensor,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool | str = True,
    num_splits: int = 0,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the cache, in place, then attends to what is in it; without gradients.

    The keys of sequence b are those of its entry of the cache from cache_leftpad[b] up to
    cache_lengths[b] + seq_new; seq_kv, for causal, window and alibi_slopes, is their number.

    Args:
        q: (batch, seq_q, heads_q, dim); float16, bfloat16, float32 or float64, as all that follow.
        k_cache: (entries, capacity, heads_kv, dim), entries >= batch. With `block_table` a pool of pages,
            (pages, page_size, heads_kv, dim), of any size. Any strides.
        v_cache: the same with dim_v.
        k, v: (batch, seq_new, heads_kv, dim) and (..., dim_v), written at cache_lengths; both or none.
        cache_lengths: (batch,) int32 or int64, or an int: how much of each entry is filled before the
            call, left padding included. It is not changed.
        block_table: (batch, n) int32 or int64: the pages of a sequence, in order. Entries that hold no
            key of it may be anything, such as -1.
        cache_batch_idx: (batch,) int32 or int64: the entry that each sequence has; default its own place.
            Of sequences that share an entry the last one's k and v stay.
        cache_leftpad: (batch,) int32 or int64: so many places at the begin of an entry hold no key.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), floating: turn the first rotary_dim elements
            of k, at position cache_lengths + i, and of q, at the same (where the call is
            neither causal nor has a window, every query at i = 0). rotary_dim <= dim. Needs k and v.
        rotary_interleaved: pairs are elements (0, 1), (2, 3), ... (GPT-J), instead of
            (0, rotary_dim / 2), ... (GPT-NeoX, Llama).
        causal: True or "bottom_right" (default), "top_left", or False.
        num_splits: ranges of keys that are worked on side by side for few queries; 0 chooses.
        batch_invariant: results must not depend on the batch size or on num_splits.
        scale, window, softcap, alibi_slopes, sinks: as for `flash_attention`.

    Returns:
        out, (batch, seq_q, heads_q, dim_v), q's dtype; with `return_lse` also the LSE,
        (batch, heads_q, seq_q) float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong call, by the argument's name. RuntimeError: block_table has too few
        pages. On the CPU all is checked before anything is written.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 2, 1024, 8, 64).unbind(0)
        >>> lengths = torch.tensor([7, 400], dtype=torch.int32)
        >>> q, k, v = torch.randn(2, 1, 32, 64), *torch.randn(2, 2, 1, 8, 64).unbind(0)
        >>> flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_lengths=lengths).shape
        torch.Size([2, 1, 32, 64])

    Source: the interface is that of Dao's flash_attn, https://github.com/Dao-AILab/flash-attention; pages:
    Kwon et al., PagedAttention, 2023, arXiv:2309.06180; rotary embedding: Su et al., 2021, arXiv:2104.09864.
    """
    try:
        cache_length, lengths = 0, cache_lengths
        if not isinstance(cache_lengths, Tensor):
            cache_length, lengths = _int_of("cache_lengths", cache_lengths), None
            if torch.compiler.is_compiling():
                # An operator's numbers are constants, and a call would be compiled again for each.
                lengths = torch.full((q.shape[0],), cache_length, dtype=torch.int32, device=q.device)
                cache_length = 0
        if k is not None and torch.is_grad_enabled() and (k_cache.requires_grad or v_cache.requires_grad):
            name = "k_cache" if k_cache.requires_grad else "v_cache"
            raise ValueError(
                f"{name} must not require grad where k and v are appended: "
                "use torch.no_grad() to write into it"
            )
        if not isinstance(rotary_interleaved, bool):
            raise TypeError(f"rotary_interleaved must be a bool, got {rotary_interleaved!r}")
        num_splits = _int_of("num_splits", num_splits)
        if num_splits < 0:
            raise ValueError(f"num_splits must be at least 0, got {num_splits}")
        left, right = (-1, -1) if window is None else window_bounds(window)
        call = (
            q, k_cache, v_cache, k, v, lengths, block_table, cache_batch_idx, cache_leftpad, rotary_cos,
            rotary_sin, None, alibi_slopes, sinks, cache_length, -1, rotary_interleaved, CAUSAL[causal], left,
            right, scale, softcap, return_lse, num_splits, batch_invariant,
        )  # fmt: skip
        out, lse = _attend(call)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        lengths = cache_lengths if isinstance(cache_lengths, Tensor) else None
        tensors = (lengths, block_table, cache_batch_idx, cache_leftpad, rotary_cos, rotary_sin)
        _check_types(q, k_cache, v_cache, (k, v, *tensors, alibi_slopes, sinks), causal, scale, softcap)
        raise _errors.translate(error) from None
    return (out, lse) if return_lse else out


def attend(call: _cache_call.CacheCall) -> tuple[Tensor, Tensor]:
    """(out, lse) by the backend that serves the call; lse is empty unless asked for."""
    try:
        return _attend(call)
    except RuntimeError as error:
        raise _errors.translate(error) from None


def _attend(call: tuple) -> tuple[Tensor, Tensor]:
    """`call`: what a `CacheCall` holds, in its order."""
    q, k_cache, v_cache, k, v, *rest = call
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(q.device.type):
        q, k, v = (t if t is None else t.to(k_cache.dtype) for t in (q, k, v))
        call = (q, k_cache, v_cache, k, v, *rest)
    compiling = torch.compiler.is_compiling()
    if compiling or (torch.is_grad_enabled() and torch._C._any_requires_grad(*call)):
        call = tuple(t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in call)
    *_, return_lse, _, batch_invariant = rest
    if q.is_cpu and not compiling and dispatch.takes_cpu(compiling):
        out, lse = _call_kernel(*call)
    else:
        name = dispatch.resolve("auto", "auto", dispatch.Request.of(q, v_cache, batch_invariant))
        out, lse = _cache_call.BY_BACKEND[name](*call)
    return out, lse.to(lse_dtype(q)) if return_lse else lse


# Without the frame of Python around it.
_call_kernel = getattr(_cache_call.KERNEL, "_op", _cache_call.KERNEL)


def _check_types(
    q: object,
    k_cache: object,
    v_cache: object,
    tensors: tuple,
    causal: object,
    scale: object,
    softcap: object,
) -> None:
    """Raises for what the operator could not even be given. `tensors`: all of `_TENSORS`."""
    for name, value in {"q": q, "k_cache": k_cache, "v_cache": v_cache}.items():
        _errors.check_tensor(name, value)
    for name, value in zip(_TENSORS, tensors, strict=True):
        if value is not None:
            _errors.check_tensor(name, value)
    check_types(q, k_cache, v_cache, (), "bshd", causal, scale, softcap, None)


def _int_of(name: str, value: object) -> int:
    """0 for a tensor, which the operator takes as such."""
    if isinstance(value, Tensor):
        _errors.check_tensor(name, value)
        return 0
    if isinstance(value, bool) or not (isinstance(value, _INTEGERS) or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an int or a Tensor, got {type(value).__name__}")
    return value if isinstance(value, _INTEGERS) else value.__index__()


# Traced ones cannot be asked whether they have an __index__.
_INTEGERS = (int, torch.SymInt)
