"""Keys cut into ranges that blocks of the CUDA kernels work on side by side."""

from __future__ import annotations

import pytest
import torch
from conftest import EMULATED

import flash_attn_ext as fae
from flash_attn_ext import dispatch


@pytest.mark.parametrize("extended", [False, True], ids=["plain", "extended"])
def test_ranges_of_keys(extended, caplog, emulator, monkeypatch):
    """As many as the config says; chosen for few queries and many keys; never for batch_invariant."""
    monkeypatch.setattr(dispatch, "_logged", set())
    q, (k, v) = torch.randn(2, 3, 4, 40).half(), torch.randn(2, 2, 900, 2, 40).half()
    options = {"causal": True, "backend": EMULATED.backend}
    if extended:
        options["sinks"] = torch.randn(4)
    config = fae.AttentionConfig(num_splits=5)
    assert fae.explain(q, k, v, **options, config=config).splits == 5
    assert fae.explain(q, k, v, **options).splits == 3  # of 256 keys at least
    assert fae.explain(q, k, v, **options, config=config, batch_invariant=True).splits == 1
    wanted = fae.flash_attention(q.double(), k.double(), v.double(), **options | {"backend": "standard"})
    results = [
        fae.flash_attention(q, k, v, **options, **more)
        for more in ({}, {"config": config}, {"config": config, "batch_invariant": True})
    ]
    for out in results:
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-3)
    assert not torch.equal(results[1], results[2])
    alone = fae.flash_attention(q[:, 2:], k, v, **options, config=config, batch_invariant=True)
    assert torch.equal(results[2][:, 2:], alone)
    assert "num_splits" not in caplog.text
