"""`flash_attn.bert_padding`: between padded batches and packed sequences, on any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of a (rows, ...) tensor.

    Example:
        >>> index_first_axis(torch.arange(6.0).view(3, 2), torch.tensor([2, 0]))
        tensor([[4., 5.],
                [0., 1.]])
    """
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A (first_axis_dim, ...) tensor that holds `values` in rows `indices`, and 0 elsewhere."""
    output = values.new_zeros(first_axis_dim, *values.shape[1:])
    return output.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens of a padded batch, one sequence behind the other.

    Args:
        hidden_states: (batch, seq, ...).
        attention_mask: (batch, seq), bool or integer; nonzero marks a token.
        unused_mask: (batch, seq), likewise: further tokens, which are packed along but not counted.

    Returns:
        The tokens (total, ...); their places in the flattened batch, int64 (total,); cu_seqlens int32
        (batch + 1,); the longest sequence's length; and the number of tokens of `attention_mask` in each
        sequence, int32 (batch,).

    Example:
        >>> x = torch.randn(2, 3, 8)
        >>> packed, indices, cu_seqlens, longest, used = unpad_input(x, torch.tensor([[1, 1, 0], [1, 1, 1]]))
        >>> packed.shape, cu_seqlens.tolist(), longest
        (torch.Size([5, 8]), [0, 2, 5], 3)
    """
    taken = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = taken.bool().sum(-1, dtype=torch.int32)
    used = attention_mask.bool().sum(-1, dtype=torch.int32)
    indices = taken.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: (total, ...) tokens to their places in (batch, seqlen, ...), 0 elsewhere."""
    output = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return output.unflatten(0, (batch, seqlen))
