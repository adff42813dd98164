"""The matrix that flash_attn's `return_attn_probs` asks for: O(seq_q * seq_k), and for looking at only."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .._philox import call_key, keep_tile
from .._windows import window_bounds


def signed_probabilities(
    q: Tensor,
    k: Tensor,
    rng_state: Tensor,
    dropout_p: float,
    *,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    scale: float | None,
    sinks: Tensor | None = None,
    starts: tuple[list[int], list[int]] | None = None,
) -> Tensor:
    """exp(score - largest score of the row), negative where dropout drops it, 0 where it is hidden, in q's
    dtype. flash_attn scales by what is the largest so far, block by block: here a row is one block.

    Args:
        q, k: (batch, seq, heads, dim), or packed (total, heads, dim) with `starts`, the two cu_seqlens.

    Returns:
        (batch, heads_q, seq_q, seq_k), of packed sequences up to the longest.
    """
    del sinks
    key = call_key(rng_state)
    bounds = window_bounds(window) if window is not None else (-1, -1)
    if starts is None:
        spans = [(slice(None), slice(None))] * q.shape[0]
        longest = (q.shape[1], k.shape[1])
    else:
        spans = [
            (slice(*ends_q), slice(*ends_k))
            for ends_q, ends_k in zip(*(pairwise(s) for s in starts), strict=True)
        ]
        longest = tuple(max((s.stop - s.start for s in side), default=0) for side in zip(*spans, strict=True))
    result = q.new_zeros(len(spans), q.shape[-2], *longest)
    for b, (rows, keys) in enumerate(spans):
        queries, known = (q[b], k[b]) if starts is None else (q[rows], k[keys])
        heads, seq_q, seq_k = queries.shape[1], len(queries), len(known)
        slopes = None if alibi_slopes is None else alibi_slopes.expand(len(spans), heads)[b]
        p = _probabilities(queries, known, causal, bounds, softcap, slopes, scale)
        kept = keep_tile(key, dropout_p, range(b, b + 1), range(heads), range(seq_q), range(seq_k))[0]
        result[b, :, :seq_q, :seq_k] = torch.where(kept, p, -p)
    return result


def _probabilities(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    slopes: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Of one sequence: (heads, seq_q, seq_k) float32."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k = k.repeat_interleave(q.shape[1] // max(1, k.shape[1]), 1)
    s = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    place = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    ahead = torch.arange(len(k), device=q.device) - place  # of the query
    if slopes is not None:
        s = s - slopes.float()[:, None, None] * ahead.abs()
    left, right = window
    right = 0 if causal and (right < 0 or right > 0) else right
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    if s.shape[-1] == 0:
        return s
    s = s.masked_fill(hidden, -math.inf)
    return (s - s.amax(-1, keepdim=True)).exp().masked_fill(hidden, 0.0)
