"""torch's `scaled_dot_product_attention`, served by this package."""

from __future__ import annotations

import logging
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from . import _errors, _mha
from ._extended import as_number
from ._problem import AS_GIVEN
from ._run import check_constants
from .dispatch import Request, is_auto, log_once, preferred
from .functional import flash_attention, kernels_alone


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
        query: (..., heads_q, seq_q, dim), any number of leading axes, none included; or, like key and
            value, a jagged nested tensor (batch, heads_q, seq_q, dim).
        key: (..., heads_kv, seq_kv, dim); value: (..., heads_kv, seq_kv, dim_v). Leading axes
            broadcast; so do heads, unless `enable_gqa`.
        attn_mask: broadcastable to (..., heads_q, seq_q, seq_kv): bool with True = may attend,
            or floating, added to the scores; or what `torch.nn.attention.bias` makes.
        dropout_p: the probability in [0, 1] with which a weight is dropped, also outside of training, as
            in torch; with 1 nothing is left. Which ones is drawn as in `flash_attention`.
        is_causal: query i sees keys <= i (aligned top left); not together with `attn_mask`.
        scale: factor of the scores; default 1 / sqrt(dim).
        enable_gqa: heads_q may be any multiple of heads_kv.

    Returns:
        (..., heads_q, seq_q, dim_v) in query's dtype. Its strides have the order of query's, as
        torch's do; contiguous when dim_v differs from dim.

    Raises:
        TypeError, ValueError, NotImplementedError: a wrong call, naming the argument; each is a RuntimeError,
            too, which is what torch mostly raises.

    Example:
        >>> q = k = v = torch.randn(2, 8, 1024, 64)
        >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 8, 1024, 64])
    """
    try:
        if not (is_causal.__class__ is enable_gqa.__class__ is bool):
            _check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
        if scale is not None:
            check_constants(scale=scale)
        if dropout_p != 0.0:
            dropout_p = _check_dropout(dropout_p)
        causal = "top_left" if is_causal else False
        if attn_mask is not None and (is_causal or attn_mask.dtype != torch.bool):
            _check_mask(attn_mask, is_causal)
            if variant := _errors.causal_variant(attn_mask):
                attn_mask, causal = None, variant
        if query.is_nested:
            return _nested(query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa)
        if attn_mask is None and dropout_p == 0.0:
            shape = query.shape
            if len(shape) == 4 and (enable_gqa or shape[1] == key.shape[1]):
                out = kernels_alone(query, key, value, causal, scale)  # a small call is over by now
                if out is not None:
                    return out
        own = 3 if enable_gqa else 2  # trailing axes that do not broadcast
        leading = tuple(query.shape)[:-own]
        if tuple(key.shape)[:-own] != leading or tuple(value.shape)[:-own] != leading:
            query, key, value = _broadcast(query, key, value, own)
        if attn_mask is not None and query.dim() > 4:
            attn_mask = _with_leading_axes(attn_mask, query)
        if dropout_p == 1.0:  # weights of 0, as in torch; a NaN stays one
            return 0.0 * _attention(query, key, value, attn_mask, causal, scale, 0.0)
        return _attention(query, key, value, attn_mask, causal, scale, dropout_p)
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise _in_torch_terms(error, query, key, value, attn_mask) from None


def _check_flags(**flags: object) -> None:
    """Raises for what only happens to have a truth value, such as is_causal="top_left"."""
    for name, value in flags.items():
        if not isinstance(value, (bool, torch.SymBool)):
            raise TypeError(f"{name} must be a bool, got {value!r}")


def _check_dropout(dropout_p: object) -> float:
    if not isinstance(dropout_p, bool):  # which is a number to torch
        dropout_p = as_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    return dropout_p


def _nested(query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa) -> Tensor:
    """Jagged (batch, heads, seq, dim) each."""
    jagged = all(isinstance(t, Tensor) and t.layout == torch.jagged and t.dim() == 4 for t in (query, key))
    heads_differ = jagged and key.shape[1] != query.shape[1]
    if heads_differ and not enable_gqa:
        raise ValueError(
            f"key has {key.shape[1]} heads, query has {query.shape[1]}; "
            "different numbers of heads need enable_gqa=True"
        )
    options = _mask_option(attn_mask) | {"scale": scale}
    if dropout_p == 1.0:
        return 0.0 * flash_attention(query, key, value, causal, layout="bhsd", **options)
    return flash_attention(query, key, value, causal, layout="bhsd", dropout_p=dropout_p, **options)


def _mask_option(attn_mask: Tensor | None) -> dict[str, Tensor | None]:
    """`attn_mask` as an argument of `flash_attention`."""
    is_bias = attn_mask is not None and attn_mask.dtype != torch.bool
    return {"bias" if is_bias else "mask": attn_mask}


def _check_mask(attn_mask: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ValueError("attn_mask must be None when is_causal=True")
    if not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating, got {attn_mask.dtype}")


def _check_tensors(query: object, key: object, value: object, attn_mask: object) -> None:
    """Raises for what is no tensor, or has too few axes to be asked about them."""
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        _errors.check_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 axes, got shape {tuple(tensor.shape)}")
    if attn_mask is not None and _errors.causal_variant(attn_mask) is None:
        _errors.check_tensor("attn_mask", attn_mask)


def _broadcast(query: Tensor, key: Tensor, value: Tensor, own: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views with equal leading axes, all but the last `own`."""
    _check_tensors(query, key, value, None)
    tensors = query, key, value
    try:
        leading = torch.broadcast_shapes(*(t.shape[:-own] for t in tensors))
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(
            f"query, key and value have shapes {shapes}, whose leading axes do not broadcast"
            + ("; different numbers of heads need enable_gqa=True" if own == 2 else "")
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


def _in_torch_terms(
    error: Exception, query: object, key: object, value: object, attn_mask: object
) -> Exception:
    """`error` as a RuntimeError too, with the names of torch's arguments; or what it comes of."""
    text = str(error)
    if not getattr(query, "is_nested", False):
        try:
            _check_tensors(query, key, value, attn_mask)
        except (TypeError, ValueError) as cause:
            return _errors.also_runtime_error(cause, str(cause))
    for name, torch_name in (("q", "query"), ("k", "key"), ("v", "value"), ("(?:mask|bias)", "attn_mask")):
        text = re.sub(rf"(?<![\w.']){name}\b(?!'(?!s))", torch_name, text)
    return _errors.also_runtime_error(error, text)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal: bool | str,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Equal leading axes, which `attn_mask` has as well when there are two or more."""
    if query.dim() > 4:
        return _many_batch_axes(query, key, value, attn_mask, causal, scale, dropout_p)
    if attn_mask is None:
        return flash_attention(query, key, value, causal, scale=scale, layout=AS_GIVEN, dropout_p=dropout_p)
    options = _mask_option(attn_mask) | {"scale": scale, "dropout_p": dropout_p}
    return flash_attention(query, key, value, causal, layout=AS_GIVEN, **options)


def _many_batch_axes(query, key, value, attn_mask, causal, scale, dropout_p) -> Tensor:
    """Several batch axes: as one where the strides allow it, else one after another, never by a copy. The
    result is contiguous, as torch's is with so many axes."""
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    batch = math.prod(query.shape[:-3])
    try:
        q, k, v, *mask = (t.view(batch, *t.shape[-3:]) for t in tensors)
    except RuntimeError:
        slices = zip(*tensors, strict=True)
        return torch.stack([_attention(*(*parts, None)[:4], causal, scale, dropout_p) for parts in slices])
    options = _mask_option(mask[0] if mask else None) | {"scale": scale, "dropout_p": dropout_p}
    return flash_attention(q, k, v, causal, layout="bhsd", **options).unflatten(0, query.shape[:-3])


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
    reason = _why_torch(query, key, value, *args, **kwargs)
    if reason is None:
        try:
            return scaled_dot_product_attention(query, key, value, *args, **kwargs)
        except (NotImplementedError, TypeError, ValueError) as error:
            reason = str(error)
    log_once(logging.WARNING, f"scaled_dot_product_attention goes to torch: {reason}")
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def _why_torch(
    query: object, key: object, value: object, attn_mask: object = None, *args, **kwargs
) -> str | None:
    """Why torch would do better than this package, if it would."""
    for t in (query, key, value, *(() if attn_mask is None else (attn_mask,))):
        if not isinstance(t, Tensor):  # such as a Proxy, of which nothing can be asked
            return f"a {type(t).__name__} is no Tensor"
        if t.layout == torch.jagged or _errors.causal_variant(t):
            continue
        if type(t) not in (Tensor, torch.nn.Parameter, FakeTensor):
            return f"tensors of type {type(t).__name__} are not served"
        if t.is_nested or t.layout != torch.strided:
            return f"tensors of layout {'nested' if t.is_nested else t.layout} are not served"
    if is_auto() and query.device.type not in ("cpu", "meta"):
        _, reasons = preferred(Request(query.device, query.dtype, 0, False))
        return "; ".join(reasons) or None
    return None
