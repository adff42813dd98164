"""Dense masks and biases of packed sequences."""

from __future__ import annotations

import pytest
import torch

import flash_attn_ext as fae


@pytest.mark.parametrize("backend", ["cpu", "portable", "standard"])
def test_they_may_be_for_longer_sequences_than_there_are(backend):
    """They have the size of max_seqlen, whatever the batch holds."""
    g = torch.Generator().manual_seed(3)
    starts_q, starts_k, longest = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 5, 7]), (9, 8)
    q, k, v, dout = (
        torch.randn(n, heads, 8, generator=g, dtype=torch.float64)
        for n, heads in ((5, 4), (7, 2), (7, 2), (5, 4))
    )
    mask = torch.rand(3, 1, *longest, generator=g) > 0.3
    bias = torch.randn(1, 4, *longest, generator=g, dtype=torch.float64, requires_grad=True)

    def attend(rows, keys):
        return fae.flash_attention_varlen(
            q, k, v, starts_q, starts_k, rows, keys,
            mask=mask[..., :rows, :keys], bias=bias[..., :rows, :keys], backend=backend,
        )  # fmt: skip

    got, want = attend(*longest), attend(3, 4)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(out, bias, dout)[0] for out in (got, want)]
    assert torch.equal(*grads) and grads[0].any() and not grads[0][..., 3:, :].any()
