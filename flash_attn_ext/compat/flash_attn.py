"""`flash_attn`'s functions, signatures and semantics as of 2.8, on CPUs and NVIDIA GPUs, for any dtype, head
dim and strides that `flash_attention` takes.

    from flash_attn_ext.compat.flash_attn import flash_attn_func

or, for models that insist on the package itself, `install()` before they are imported.

Tensors are (batch, seq, heads, dim), or packed (total, heads, dim). `causal` is aligned bottom right, windows
are (left, right) with -1 for unbounded, ALiBi adds -slope * |i + seq_k - seq_q - j|. With
`return_attn_probs` a function returns (out, softmax_lse, S_dmask): the LSE in float32, (batch, heads, seq) or
(heads, total), and for dropout_p > 0 the probabilities (batch, heads, seq_q, seq_k), each row's scaled so
that the largest is 1, negative where dropped. `sinks` is what forks of the package know: one more logit per
head, (heads,), without a value. A ValueError or TypeError is a RuntimeError, too, as flash_attn's are.

Source: https://github.com/Dao-AILab/flash-attention; Dao, FlashAttention-2, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import _extended
from .._philox import draw_state
from .._run import check_constants
from ..functional import flash_attention
from ..kvcache import flash_attention_with_kvcache
from ..varlen import packing_of
from . import _cached
from ._errors import as_runtime_errors
from ._installed import install
from ._probabilities import signed_probabilities
from ._raw import (  # noqa: F401 - other packages import them from flash_attn
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _get_block_size_n,
)
from ._scores import scores_of
from .bert_padding import index_first_axis, pad_input, unpad_input

__version__ = "2.8.3"  # whose interface this is
__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "install",
    "pad_input",
    "unpad_input",
]

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def _attend(
    attention: Callable,
    q: Tensor,
    k: Tensor,
    scores: dict,
    dropout_p: float,
    deterministic: bool,
    return_attn_probs: bool,
    starts: tuple[Tensor, Tensor] | None = None,
) -> Result:
    check_constants(softmax_scale=scores["scale"], softcap=scores["softcap"])
    options = {**scores, "dropout_p": dropout_p, "deterministic": deterministic or None}
    if not return_attn_probs:
        return attention(**options)
    if not dropout_p > 0:
        out, lse = attention(**options, return_lse=True)
        return out, lse.float(), q.new_empty(0)
    state = draw_state(q.device)  # the mask is a function of it
    out, lse = attention(**options, return_lse=True, draw=lambda device: state)
    lists = None if starts is None else tuple(cu.tolist() for cu in starts)
    signed = signed_probabilities(q.detach(), k.detach(), state, dropout_p, **scores, starts=lists)
    return out, lse.float(), signed


@as_runtime_errors
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
) -> Result:
    """Attention of (batch, seq, heads, dim) tensors; k and v may have fewer heads.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_ext.flash_attention`.

    Example:
        >>> q = torch.randn(2, 128, 8, 64); k = v = torch.randn(2, 128, 2, 64)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes) | {"sinks": sinks}

    def attention(draw=None, **options):
        if draw is None:  # the shortest way
            return flash_attention(q, k, v, **options)
        return _extended.attention(q, k, v, _extended.Arguments(**options), draw=draw)

    return _attend(attention, q, k, scores, dropout_p, deterministic, return_attn_probs)


@as_runtime_errors
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
) -> Result:
    """`flash_attn_func` on the two slices of kv (batch, seq, 2, heads, dim)."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, *kv.unbind(2), *options, return_attn_probs, sinks=sinks)


@as_runtime_errors
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
) -> Result:
    """`flash_attn_func` on the three slices of qkv (batch, seq, 3, heads, dim)."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(*qkv.unbind(2), *options, return_attn_probs, sinks=sinks)


@as_runtime_errors
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
) -> Result:
    """Attention of packed sequences: q (total_q, heads, dim), sequence b in rows cu_seqlens_q[b] up to
    cu_seqlens_q[b + 1], and k, v likewise; or, with block_table (batch, n), k and v in pages
    (pages, page_size, heads, dim), without gradients.

    Raises:
        NotImplementedError: a dropout together with block_table. Others as
        `flash_attn_ext.flash_attention_varlen` and `flash_attn_ext.flash_attention_with_kvcache`.
    """
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes) | {"sinks": sinks}
    starts = (cu_seqlens_q, cu_seqlens_k)
    if block_table is not None:
        if dropout_p:
            raise NotImplementedError(f"dropout_p must be 0 together with block_table, got {dropout_p}")
        out, lse = _cached.varlen(q, k, v, *starts, max_seqlen_q, scores, block_table)
        return (out, lse.float(), q.new_empty(0)) if return_attn_probs else out

    packing = packing_of(*starts, max_seqlen_q, max_seqlen_k)

    def attention(draw=draw_state, **options):
        return _extended.attention(q, k, v, _extended.Arguments(**options), packing, draw)

    return _attend(attention, q, k, scores, dropout_p, deterministic, return_attn_probs, starts)


@as_runtime_errors
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
) -> Result:
    """`flash_attn_varlen_func` with kv (total_k, 2, heads, dim)."""
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_varlen_func(q, *kv.unbind(1), *packing, *options, return_attn_probs, sinks=sinks)


@as_runtime_errors
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
) -> Result:
    """`flash_attn_varlen_func` on the three slices of qkv (total, 3, heads, dim)."""
    packing = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_varlen_func(*qkv.unbind(1), *packing, *options, return_attn_probs, sinks=sinks)


@as_runtime_errors
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the caches, in place, then attends: `flash_attn_ext.flash_attention_with_kvcache`,
    where cache_seqlens is cache_lengths. Without it the caches are full.

    Returns:
        out, or (out, softmax_lse), (batch, heads, seq_q) float32.
    """
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens must be given together with k, which is written there")
        pages = 1 if block_table is None else block_table.shape[-1]
        cache_seqlens = pages * k_cache.shape[1]
    result = flash_attention_with_kvcache(
        q, k_cache, v_cache, k, v,
        cache_lengths=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        sinks=sinks,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
        **scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )  # fmt: skip
    return (result[0], result[1].float()) if return_softmax_lse else result


USE_TRITON_ROCM = False
