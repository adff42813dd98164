"""torch's `scaled_dot_product_attention`, served by this package."""

from __future__ import annotations

import logging
import re

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from . import _errors, _mha
from .dispatch import is_auto, log_once
from .functional import flash_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, by its own rules.

    Args:
        query: (..., heads_q, seq_q, dim), any number of leading axes, none included.
        key: (..., heads_kv, seq_kv, dim); value: (..., heads_kv, seq_kv, dim_v). Leading axes
            broadcast; so do heads, unless `enable_gqa`.
        attn_mask: broadcastable to (..., heads_q, seq_q, seq_kv): bool with True = may attend,
            or floating, added to the scores.
        dropout_p: must be 0.
        is_causal: query i sees keys <= i (aligned top left); not together with `attn_mask`.
        scale: factor of the scores; default 1 / sqrt(dim).
        enable_gqa: heads_q may be any multiple of heads_kv.

    Returns:
        (..., heads_q, seq_q, dim_v) in query's dtype. Its strides have the order of query's, as
        torch's do; contiguous when dim_v differs from dim.

    Raises:
        TypeError, ValueError, NotImplementedError: a wrong call, naming the argument.

    Example:
        >>> q = k = v = torch.randn(2, 8, 1024, 64)
        >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 8, 1024, 64])
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _errors.check_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 axes, got shape {tuple(tensor.shape)}")
    if dropout_p != 0.0:
        if not 0.0 < dropout_p <= 1.0:
            raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
        raise NotImplementedError(f"dropout_p must be 0.0: dropout is not implemented, got {dropout_p}")
    if attn_mask is not None:
        _errors.check_tensor("attn_mask", attn_mask)
        if is_causal:
            raise ValueError("attn_mask must be None when is_causal=True")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask must be bool or floating, got {attn_mask.dtype}")
    causal = "top_left" if is_causal else False
    query, key, value = _broadcast(query, key, value, enable_gqa)
    if attn_mask is not None and query.dim() > 4:
        attn_mask = _with_leading_axes(attn_mask, query)
    try:
        return _attention(query, key, value, attn_mask, causal, scale)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise type(error)(_in_torch_terms(str(error))) from None


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views with equal leading axes; heads are one of them unless `enable_gqa`."""
    tensors = query, key, value
    own = 3 if enable_gqa else 2  # trailing axes that do not broadcast
    if query.shape[:-own] == key.shape[:-own] == value.shape[:-own]:
        return tensors
    try:
        leading = torch.broadcast_shapes(*(t.shape[:-own] for t in tensors))
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(
            f"query, key and value have shapes {shapes}, whose leading axes do not broadcast"
            + ("" if enable_gqa else "; different numbers of heads need enable_gqa=True")
        ) from None
    return tuple(t.expand(*leading, *t.shape[-own:]) for t in tensors)


def _with_leading_axes(attn_mask: Tensor, query: Tensor) -> Tensor:
    """(..., 1 or heads_q, 1 or seq_q, 1 or seq_kv) with query's leading axes."""
    padded = attn_mask[(None,) * max(0, query.dim() - attn_mask.dim())]
    try:
        return padded.expand(*query.shape[:-3], *padded.shape[-3:])
    except RuntimeError:
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, "
            f"whose leading axes do not broadcast to {tuple(query.shape[:-3])}"
        ) from None


def _in_torch_terms(text: str) -> str:
    """An error text with the names of torch's arguments."""
    for name, torch_name in (("q", "query"), ("k", "key"), ("v", "value"), ("(?:mask|bias)", "attn_mask")):
        text = re.sub(rf"(?<![\w.']){name}\b(?!'(?!s))", torch_name, text)
    return text


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal: bool | str,
    scale: float | None,
) -> Tensor:
    """Equal leading axes, which `attn_mask` has as well when there are two or more."""
    if query.dim() > 4:
        return _many_batch_axes(query, key, value, attn_mask, causal, scale)
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    options = {
        "causal": causal,
        "mask": attn_mask if is_bool else None,
        "bias": None if is_bool else attn_mask,
        "scale": scale,
    }
    order = _stride_order(query) if value.shape[-1] == query.shape[-1] else []
    natural = sorted(order)
    if order == natural:
        return flash_attention(query, key, value, layout="bhsd", **options)
    if order[-2:] == natural[-1:-3:-1]:
        # Heads inside sequence: the other layout, so that nothing is copied.
        try:
            q, k, v = (t.transpose(-3, -2) for t in (query, key, value))
            return flash_attention(q, k, v, **options).transpose(-3, -2)
        except (TypeError, ValueError):
            # Again, for the same complaint in terms of the caller's layout.
            flash_attention(query, key, value, layout="bhsd", **options)
            raise
    out = flash_attention(query, key, value, layout="bhsd", **options)
    return out.permute(*order, 3).contiguous().permute(*map(order.index, natural), 3)


def _stride_order(t: Tensor) -> list[int]:
    """The axes before the last, outermost first; as they come where strides leave it open."""
    order = list(range(t.dim() - 1))
    if t.stride(-1) != 1 or 0 in t.stride():
        return order
    wide = [axis for axis in order if t.shape[axis] > 1]
    for end in range(len(wide), 1, -1):  # bubble sort: comparing two strides can be traced, sort() cannot
        for i in range(1, end):
            if t.stride(wide[i - 1]) < t.stride(wide[i]):
                wide[i - 1], wide[i] = wide[i], wide[i - 1]
    return [wide.pop(0) if t.shape[axis] > 1 else axis for axis in order]


def _many_batch_axes(query, key, value, attn_mask, causal, scale) -> Tensor:
    """Several batch axes: as one where the strides allow it, else one after another, never by a copy."""
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    try:
        merged = [t.view(-1, *t.shape[-3:]) for t in tensors]
    except RuntimeError:
        slices = zip(*tensors, strict=True)
        return torch.stack([_attention(*(*parts, None)[:4], causal, scale) for parts in slices])
    return _attention(*(*merged, None)[:4], causal, scale).unflatten(0, query.shape[:-3])


class use_flash_attention(TorchFunctionMode):
    """Inside this context, `F.scaled_dot_product_attention` is this package's.

    Also where torch's own modules call it: `nn.MultiheadAttention(...)(need_weights=False)`,
    `nn.TransformerEncoderLayer` and so on, and inside functions that `torch.compile` traces
    here. It holds for the current thread, nests, and leaves nothing behind.

    Args:
        strict: raise where this package cannot serve a call. Otherwise such a call goes to
            torch, and the reason is logged once at WARNING (logger "flash_attn_ext").

    Example:
        >>> with use_flash_attention():
        ...     output = model(inputs)
    """

    def __init__(self, strict: bool = False):
        super().__init__()
        self.strict = strict

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _serve(self.strict, *args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            with self:
                return _mha.multi_head_attention_forward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _serve(strict: bool, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
    """Ours, or torch's with the reason logged."""
    if strict:
        return scaled_dot_product_attention(query, key, value, *args, **kwargs)
    tensors = (query, key, value, *args, *kwargs.values())
    reason = _why_torch(query.device, *(t for t in tensors if isinstance(t, Tensor)))
    if reason is None:
        try:
            return scaled_dot_product_attention(query, key, value, *args, **kwargs)
        except (NotImplementedError, TypeError, ValueError) as error:
            reason = str(error)
    log_once(logging.WARNING, f"scaled_dot_product_attention goes to torch: {reason}")
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def _why_torch(device: torch.device, *tensors: Tensor) -> str | None:
    """Why torch would do better than this package, if it would."""
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter, FakeTensor):
            return f"tensors of type {type(t).__name__} are not served"
        if t.is_nested or t.layout != torch.strided:
            return f"tensors of layout {'nested' if t.is_nested else t.layout} are not served"
    if is_auto() and device.type not in ("cpu", "meta"):
        return f"there are no kernels for device {device.type!r} in this build"
    return None
