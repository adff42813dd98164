"""flash_attn's functions below autograd as ring-attention packages use them: on a part of the keys."""

from __future__ import annotations

import pytest
import torch

import flash_attn_ext as fae
from flash_attn_ext.compat import flash_attn as compat


@pytest.mark.parametrize("backend", ["cpu", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_parts_add_up(backend, dtype):
    """Out and LSE are of all keys, and each call gives what its keys contribute."""
    q, k, v, dout = (torch.randn(2, 9, heads, 16).to(dtype) for heads in (4, 2, 2, 4))
    try:
        fae.set_backend(backend)
        out, lse, *_ = compat._flash_attn_forward(q, k, v, 0.0, None, False)
        whole, first, second = ([torch.empty_like(t) for t in (q, k, v)] for _ in range(3))
        rest = (0.0, None, False)
        compat._flash_attn_backward(dout, q, k, v, out, lse, *whole, *rest)
        for keys, grads in ((slice(0, 4), first), (slice(4, 9), second)):
            own = (grads[0], grads[1][:, keys], grads[2][:, keys])
            compat._flash_attn_backward(dout, q, k[:, keys], v[:, keys], out, lse, *own, *rest)
    finally:
        fae.set_backend("auto")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(first[0] + second[0], whole[0], atol=tolerance, rtol=tolerance)
    for n in (1, 2):
        parts = torch.cat([first[n][:, :4], second[n][:, 4:]], 1)
        torch.testing.assert_close(parts, whole[n], atol=tolerance, rtol=tolerance)
