"""flash_attn's functions in compiled code."""

from __future__ import annotations

import torch

from flash_attn_ext.compat.flash_attn import flash_attn_func


def test_probabilities_of_a_compiled_call():
    q, k, v = torch.randn(3, 2, 9, 4, 16)

    def call(q):
        return flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)

    out, lse, signed = torch.compile(call, backend="aot_eager", fullgraph=True)(q)
    torch.testing.assert_close(lse, flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[1])
    probabilities = signed / signed.abs().sum(-1, keepdim=True)
    kept = probabilities.clamp(min=0) / 0.6 @ v.transpose(1, 2)
    torch.testing.assert_close(kept.transpose(1, 2), out)
    assert (signed < 0).any()
