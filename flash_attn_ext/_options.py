"""What the operators are told about a call, beyond q, k and v, in the order of their schemas.

There are two families of operators. The plain one has the options that most calls need, because every
argument costs a small call time; the extended one has all. Each lists tensors first and numbers after them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """All options of the extended operators. Shapes are in terms of batch, heads_q, seq_q and seq_kv."""

    mask: Tensor | None = None  # bool, broadcasts to (batch, heads_q, seq_q, seq_kv); see mask_block_q
    bias: Tensor | None = None  # floating, broadcasts likewise
    kv_lengths: Tensor | None = None  # (batch,)
    alibi_slopes: Tensor | None = None  # (heads_q,) or (batch, heads_q)
    sinks: Tensor | None = None  # (heads_q,)
    rng_state: Tensor | None = None  # int64 (2,): seed, offset; given when dropout_p > 0
    row_labels: Tensor | None = None  # int32 (n, batch or 1, seq_q)
    key_bounds: Tensor | None = (
        None  # int32 (n, batch or 1, seq_kv, 2): a key is seen where low <= label < high
    )
    cu_seqlens_q: Tensor | None = None  # (batch + 1,): q is packed, (total_q, heads_q, dim)
    cu_seqlens_k: Tensor | None = None
    layout: int = 0
    causal: int = 0  # 1 bottom right, 2 top left
    window_left: int = -1
    window_right: int = -1
    scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    mask_block_q: int = 1  # `mask` has one entry for so many queries
    mask_block_kv: int = 1
    max_seqlen_q: int = -1  # -1: unknown
    max_seqlen_k: int = -1

    def plain(self) -> tuple:
        """The options of the plain operators."""
        return tuple(getattr(self, name) for name in PLAIN)

    def is_extended(self) -> bool:
        """Whether something is given that the plain operators do not take."""
        tensors = (self.alibi_slopes, self.sinks, self.rng_state, self.row_labels, self.cu_seqlens_q)
        return any(t is not None for t in tensors) or (self.mask_block_q, self.mask_block_kv) != (1, 1)


PLAIN_TENSORS = ("mask", "bias", "kv_lengths")
PLAIN = (*PLAIN_TENSORS, "layout", "causal", "window_left", "window_right", "scale", "softcap")
EXTENDED_TENSORS = Options._fields[: Options._fields.index("layout")]
EXTENDED = Options._fields
EXTENDED_NUMBERS = Options._fields[Options._fields.index("dropout_p") :]
