"""`flash_attn.bert_padding`: between padded batches and packed sequences, on any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices`, int32 or int64, of a (rows, ...) tensor.

    Example:
        >>> index_first_axis(torch.arange(6.0).view(3, 2), torch.tensor([2, 0]))
        tensor([[4., 5.],
                [0., 1.]])
    """
    return input[indices]


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`index_first_axis(input, indices)`, and input itself, for a residual connection around what follows."""
    return index_first_axis(input, indices), input.view_as(input)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A (first_axis_dim, ...) tensor that holds `values` in rows `indices`, and 0 elsewhere."""
    output = values.new_zeros(first_axis_dim, *values.shape[1:])
    return output.index_put((indices,), values)


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
    return *_packed(hidden_states, taken, lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` where a row of the batch has several sequences, one behind the other, then padding.

    Args:
        hidden_states: (batch, seq, ...).
        attention_mask_in_length: (batch, seq), integer: a row's entries above 0 are the lengths of its
            sequences, in their order; where among the zeros they stand says nothing.

    Returns:
        The tokens (total, ...); their places in the flattened batch, int64 (total,); cu_seqlens int32
        (sequences + 1,); and the longest sequence's length.

    Example:
        >>> lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
        >>> x = torch.randn(2, 6, 8)
        >>> packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
        >>> packed.shape, cu_seqlens.tolist(), longest
        (torch.Size([11, 8]), [0, 2, 5, 11], 6)
    """
    used = attention_mask_in_length.sum(-1, keepdim=True)
    places = torch.arange(attention_mask_in_length.shape[1], device=used.device)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    return _packed(hidden_states, places < used, lengths)


def _packed(hidden_states: Tensor, taken: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens where `taken` (batch, seq) is not 0, their places, cu_seqlens, the longest of `lengths`."""
    indices = taken.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: (total, ...) tokens to their places in (batch, seqlen, ...), 0 elsewhere."""
    output = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return output.unflatten(0, (batch, seqlen))
