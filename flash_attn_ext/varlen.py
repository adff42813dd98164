"""`flash_attention_varlen`: sequences of different lengths, packed one after the other."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from . import _extended
from .config import AttentionConfig
from .masks import Mask


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    causal: bool | str = False,
    *,
    scale: float | None = None,
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
    """`flash_attention` of every sequence by itself, without padding.

    Args:
        q: (total_q, heads_q, dim): the queries of all sequences, one sequence after the other.
        k: (total_k, heads_kv, dim); v: (total_k, heads_kv, dim_v).
        cu_seqlens_q: (batch + 1,) int32 or int64, on q's device: sequence b has the rows from
            cu_seqlens_q[b] up to cu_seqlens_q[b + 1]. It starts at 0 and never decreases; a length
            may be 0, and rows past the last sequence belong to none.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q, max_seqlen_k: no sequence is longer. An int, a 0-d tensor (read only where that
            waits for no device) or None. Typed masks need ints, or cu_seqlens on the CPU.
        Others: as for `flash_attention`. Positions count within a sequence, and seq_q and seq_kv are
            its own: for causal, window, alibi_slopes, dropout. mask and bias broadcast to
            (batch, heads_q, max_seqlen_q, max_seqlen_k), kv_lengths is (batch,).

    Returns:
        out, (total_q, heads_q, dim_v); with `return_lse` also the LSE, (heads_q, total_q). Rows of no
        sequence are 0 and -inf; their gradients, and those of keys of no sequence, are 0.

    Raises:
        What `flash_attention` raises; ValueError for values of cu_seqlens that cannot be.

    Example:
        >>> lengths = torch.tensor([3, 0, 5])
        >>> cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        >>> q = k = v = torch.randn(8, 4, 64)
        >>> flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True).shape
        torch.Size([8, 4, 64])

    Source: the interface is that of Dao's flash_attn, https://github.com/Dao-AILab/flash-attention.
    """
    packing = packing_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    mask, bias = (_of_longest(t, packing, q, k) for t in (mask, bias))
    arguments = _extended.Arguments(
        causal, scale, "bshd", mask, bias, window, softcap, alibi_slopes, sinks, kv_lengths, dropout_p,
        return_lse, deterministic, batch_invariant, backend, config, out,
    )  # fmt: skip
    return _extended.attention(q, k, v, arguments, packing)


def _of_longest(scores: object, packing: _extended.Packing, q: object, k: object) -> object:
    """A mask or bias for sequences as long as max_seqlen_q and max_seqlen_k, cut to what the operators take:
    to the longest sequence where its length can be read, else to all rows that there are."""
    if not isinstance(scores, Tensor) or torch.compiler.is_compiling():
        return scores
    for axis, cu_seqlens, given, rows in (
        (-2, packing.cu_seqlens_q, packing.max_seqlen_q, q),
        (-1, packing.cu_seqlens_k, packing.max_seqlen_k, k),
    ):
        # Anything else is for the validator to judge.
        if scores.dim() < -axis or scores.shape[axis] != given or given < 2 or not isinstance(rows, Tensor):
            continue
        longest = min(given, len(rows))
        if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type == "cpu" and cu_seqlens.dim() == 1:
            longest = min(longest, max(cu_seqlens.diff().tolist(), default=0))
        scores = scores.narrow(axis, 0, max(longest, 0))
    return scores


def packing_of(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: object, max_seqlen_k: object
) -> _extended.Packing:
    longest = (_max_seqlen("max_seqlen_q", max_seqlen_q), _max_seqlen("max_seqlen_k", max_seqlen_k))
    return _extended.Packing(cu_seqlens_q, cu_seqlens_k, *longest)


def _max_seqlen(name: str, value: object) -> int:
    """-1 for what is not known, or is not to be asked."""
    if value is None:
        return -1
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_floating_point() or value.dtype == torch.bool:
            shown = f"shape {tuple(value.shape)} and {value.dtype}"
            raise TypeError(f"{name} must be an int, a 0-d integer Tensor or None, got a Tensor of {shown}")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return -1
        value = int(value)
    elif isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            given = type(value).__name__
            raise TypeError(f"{name} must be an int, a 0-d integer Tensor or None, got {given}")
        value = operator.index(value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    # A compiled call would be compiled again for each.
    return -1 if torch.compiler.is_compiling() else value
