"""A call on a cache of keys and values: its operators, and the same in plain torch operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, _errors, portable, reference
from ._load import load_operators
from ._options import Options
from ._problem import kernel_lse_dtype, no_autocast
from .autograd import register_version_bump

load_operators()


class CacheCall(NamedTuple):
    """The operators' arguments, in their order; see `flash_attention_with_kvcache`."""

    q: Tensor  # with cu_seqlens_q packed: (total_q, heads_q, dim)
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    cache_lengths: Tensor | None = None  # none: cache_length
    block_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    cache_length: int = 0
    max_seqlen_q: int = -1
    rotary_interleaved: bool = False
    causal: int = 1
    window_left: int = -1
    window_right: int = -1
    scale: float | None = None
    softcap: float = 0.0
    return_lse: bool = False
    num_splits: int = 0
    batch_invariant: bool = False

    def check(self, on_host: CacheCall | None = None) -> None:
        """Raise what the kernels' operator would raise. `on_host`: with integers that can be read."""
        source = on_host or self
        desc: dict = {
            name: _errors.describe(value, with_address=value.device.type == "cpu")
            for name, value in zip(self._fields, source, strict=True)
            if isinstance(value, Tensor)
        }
        if on_host:
            desc = {name: (*fields[:3], "cpu", *fields[4:]) for name, fields in desc.items()}
        numbers = ("cache_length", "max_seqlen_q", "causal", "scale", "softcap")
        desc |= {name: getattr(self, name) for name in numbers}
        desc["window"] = (self.window_left, self.window_right)
        _errors.raise_if(_C.validate_cache(desc))


_INTEGERS = ("cache_lengths", "block_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q")


class _Entry(NamedTuple):
    """One sequence's place in the cache."""

    index: int  # of the batch
    first: int  # its keys are those from here
    filled: int  # up to here, before the call
    place: int | Tensor  # entry of the cache, or its pages

    def rows(self, cache: Tensor, begin: int, end: int) -> tuple:
        """What to index `cache` with for the keys [begin, end) of the entry."""
        if isinstance(self.place, int):
            return self.place, slice(begin, end)
        size = cache.shape[1]
        row = torch.arange(begin, end, device=cache.device)
        return self.place[row // size], row % size


def _entries(call: CacheCall, host: CacheCall) -> Iterator[_Entry]:
    batch = call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    for b in range(batch):
        first = 0 if host.cache_leftpad is None else int(host.cache_leftpad[b])
        filled = host.cache_length if host.cache_lengths is None else int(host.cache_lengths[b])
        if call.block_table is not None:
            place = call.block_table[b].long()
        else:
            place = b if host.cache_batch_idx is None else int(host.cache_batch_idx[b])
        yield _Entry(b, first, filled, place)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., seq, heads, dim) with the first 2 n elements of a row turned by the angles of cos and sin
    (..., seq, n), rounded once.

    Source: Su et al., RoFormer, 2021, arXiv:2104.09864, equation 34.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = cos.shape[-1]
    cos, sin = (t.to(wide).unsqueeze(-2) for t in (cos, sin))
    turned = x[..., : 2 * pairs].to(wide)
    turned = turned.unflatten(-1, (pairs, 2)) if interleaved else turned.unflatten(-1, (2, pairs)).mT
    a, b = turned.unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if interleaved else -2).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 2 * pairs :]), -1)


def _plain(call: CacheCall, attention: Callable) -> tuple[Tensor, Tensor]:
    """Sequence by sequence; to read lengths and tables waits for their device."""
    call.check()
    host = call._replace(**{n: t.cpu() for n in _INTEGERS if (t := getattr(call, n)) is not None})
    if call.q.device.type != "cpu":
        call.check(host)
    with torch.no_grad(), no_autocast(call.q.device):
        entries = list(_entries(call, host))
        for entry in entries if call.k is not None else ():
            _append(call, entry)
        return _attend(call, host, entries, attention)


def _append(call: CacheCall, entry: _Entry) -> None:
    k, v, n = call.k[entry.index], call.v[entry.index], call.k.shape[1]
    if call.rotary_cos is not None:
        angles = slice(entry.filled, entry.filled + n)
        k = rotate(k, call.rotary_cos[angles], call.rotary_sin[angles], call.rotary_interleaved)
    for cache, new in ((call.k_cache, k), (call.v_cache, v)):
        cache[entry.rows(cache, entry.filled, entry.filled + n)] = new


def _turned_queries(call: CacheCall, entry: _Entry, q: Tensor) -> Tensor:
    if call.rotary_cos is None:
        return q
    begin = entry.filled
    moving = call.causal != 0 or call.window_left >= 0 or call.window_right >= 0
    angles = slice(begin, begin + (len(q) if moving else 1))
    cos, sin = (t[angles].expand(len(q), -1) for t in (call.rotary_cos, call.rotary_sin))
    return rotate(q, cos, sin, call.rotary_interleaved)


def _attend(
    call: CacheCall, host: CacheCall, entries: list[_Entry], attention: Callable
) -> tuple[Tensor, Tensor]:
    out, lse = fake(*call)
    out.zero_()
    lse.fill_(-torch.inf)
    starts = None if host.cu_seqlens_q is None else host.cu_seqlens_q.tolist()
    for entry in entries:
        b = entry.index
        place = b if starts is None else slice(*starts[b : b + 2])
        keys = (entry.first, entry.filled + (0 if call.k is None else call.k.shape[1]))
        k, v = (cache[entry.rows(cache, *keys)] for cache in (call.k_cache, call.v_cache))
        slopes = call.alibi_slopes
        options = Options(
            alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
            sinks=call.sinks,
            causal=call.causal,
            window_left=call.window_left,
            window_right=call.window_right,
            scale=call.scale,
            softcap=call.softcap,
        )
        out[place], own = attention(_turned_queries(call, entry, call.q[place]), k, v, options)
        if call.return_lse:
            lse[place if starts is None else (slice(None), place)] = own
    return out, lse


def _portable(*arguments) -> tuple[Tensor, Tensor]:
    call = CacheCall(*arguments)
    block_q = 1 if call.batch_invariant else 0
    return _plain(call, lambda q, k, v, options: portable.forward(q, k, v, options, True, block_q, 0))


def _standard(*arguments) -> tuple[Tensor, Tensor]:
    return _plain(CacheCall(*arguments), lambda q, k, v, options: reference.attention(q, k, v, options, True))


def _check_meta(call: CacheCall) -> None:
    """Raises where some tensors have data and others none, a call that is no trace."""
    for name, t in zip(call._fields, call, strict=True):
        if isinstance(t, Tensor) and t.is_meta != call.q.is_meta:
            raise ValueError(f"{name} is on device {t.device}, but q is on {call.q.device}")


def fake(*arguments) -> tuple[Tensor, Tensor]:
    """Results of their shapes and dtypes, uninitialised."""
    call = CacheCall(*arguments)
    _check_meta(call)
    *lead, seq, heads, _ = call.q.shape
    out = call.q.new_empty((*call.q.shape[:-1], call.v_cache.shape[-1]))
    shape = (*lead, heads, seq) if call.return_lse else (0,)
    return out, call.q.new_empty(shape, dtype=kernel_lse_dtype(call.q))


KERNEL = torch.ops.flash_attn_ext.attention_kvcache.default
_library = torch.library.Library("flash_attn_ext", "FRAGMENT")
_library.define("portable_kvcache" + str(KERNEL._schema).removeprefix("flash_attn_ext::attention_kvcache"))
_library.impl("portable_kvcache", _portable, "CompositeExplicitAutograd")
PORTABLE = torch.ops.flash_attn_ext.portable_kvcache.default
for _operator in (KERNEL, PORTABLE):
    torch.library.register_fake(_operator, fake)


def _written(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, *rest
) -> tuple[Tensor, ...]:
    return () if k is None else (k_cache, v_cache)


register_version_bump(KERNEL, _written)  # the other one writes with torch's operations, which count
BY_BACKEND = {"cpu": KERNEL, "cuda": KERNEL, "portable": PORTABLE, "standard": _standard}
