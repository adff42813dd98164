"""`flash_attn.bert_padding`: batches to packed sequences and back."""

from __future__ import annotations

import pytest
import torch

from flash_attn_ext.compat import bert_padding as padding


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_padding_there_and_back(dtype):
    x = torch.randn(3, 5, 2, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]]).to(dtype)
    packed, indices, cu_seqlens, longest, used = padding.unpad_input(x, mask)
    assert cu_seqlens.tolist() == [0, 2, 2, 6] and cu_seqlens.dtype == torch.int32
    assert longest == 4 and used.tolist() == [2, 0, 4]
    assert torch.equal(packed, x[mask.bool()])
    padded = padding.pad_input(packed, indices, 3, 5)
    assert torch.equal(padded, x * mask.bool()[..., None, None])
    (gradient,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(gradient, mask.bool()[..., None, None].expand_as(x).float())
    unused = ~mask.bool() if dtype == torch.bool else 1 - mask
    everything, _, cu_seqlens, longest, used = padding.unpad_input(x, mask, unused)
    assert len(everything) == 15 and longest == 5 and used.tolist() == [2, 0, 4]
    assert torch.equal(padding.index_first_axis(x, torch.tensor([2, 0])), x[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_of_either_type(dtype):
    """Starts of sequences, which are int32, are indices, too."""
    x = torch.randn(3, 4, 16, requires_grad=True)
    got = padding.pad_input(x, torch.arange(3, dtype=dtype), 3, 1)
    assert torch.equal(got, x[:, None])
    order = torch.tensor([4, 0, 2], dtype=dtype)
    placed = padding.index_put_first_axis(x, order, 5)
    want = torch.zeros(5, 4, 16)
    want[order] = x.detach()
    assert torch.equal(placed, want)
    taken = padding.index_first_axis(placed, order)
    assert torch.equal(taken, x)
    dout = torch.randn_like(got)
    assert torch.equal(torch.autograd.grad(got, x, dout)[0], dout[:, 0])
    assert torch.equal(torch.autograd.grad(taken, x, dout[:, 0])[0], dout[:, 0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_and_the_residual(dtype):
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([3, 0], dtype=dtype)
    rows, residual = padding.index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[[3, 0]]) and torch.equal(residual, x)
    assert torch.autograd.gradcheck(lambda x: padding.index_first_axis_residual(x, indices), (x,))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_of_several_sequences(dtype):
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 0, 2, 0, 0, 0], [0] * 6, [6, 0, 0, 0, 0, 0]], dtype=dtype)
    x = torch.randn(4, 6, 2, 8, requires_grad=True)
    packed, indices, cu_seqlens, longest = padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32 and longest == 6
    assert indices.tolist() == [*range(5), *range(6, 11), *range(18, 24)]
    assert torch.equal(packed, torch.cat((x[0, :5], x[1, :5], x[3])))
    padded = padding.pad_input(packed, indices, 4, 6)
    (gradient,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(padded, x * gradient) and gradient.sum() == 16 * 2 * 8
