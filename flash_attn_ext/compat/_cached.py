"""Packed queries whose keys lie elsewhere: in pages, behind padding, or used in part."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cache_call import CacheCall
from .._windows import CAUSAL, window_bounds
from ..kvcache import attend


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    scores: dict,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse), without gradients.

    q: (total_q, heads_q, dim). k, v: (pages, page_size, heads, dim) with block_table (batch, n), else
    (total_k, heads, dim). The keys of sequence b begin leftpad_k[b] behind its start, and end seqused_k[b]
    behind it, or where it does. scores: scale, causal, window, softcap, alibi_slopes and sinks.
    """
    starts = cu_seqlens_k[:-1]
    batch_idx = None
    if block_table is None:
        # One long entry of a cache, which every sequence begins elsewhere.
        k, v = k[None], v[None]
        batch_idx = torch.zeros_like(starts)
        ends, first = cu_seqlens_k[1:], starts
    else:
        ends, first = cu_seqlens_k.diff(), torch.zeros_like(starts)
    if seqused_k is not None:
        ends = first + seqused_k
    if leftpad_k is not None:
        first = first + leftpad_k
    left, right = window_bounds(scores["window"])
    return attend(
        CacheCall(
            q=q,
            k_cache=k,
            v_cache=v,
            cache_lengths=ends.to(cu_seqlens_k.dtype),
            block_table=block_table,
            cache_batch_idx=batch_idx,
            cache_leftpad=first.to(cu_seqlens_k.dtype),
            cu_seqlens_q=cu_seqlens_q,
            alibi_slopes=scores["alibi_slopes"],
            sinks=scores.get("sinks"),
            max_seqlen_q=-1 if max_seqlen_q is None else int(max_seqlen_q),
            causal=CAUSAL[scores["causal"]],
            window_left=left,
            window_right=right,
            scale=scores["scale"],
            softcap=scores["softcap"],
            return_lse=True,
        )
    )
