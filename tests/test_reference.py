"""The oracle itself: its hand-written gradients against autograd, its rules against the definition."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import CASES, build
from harness import NAMES, OPTION_GRADS
from reference import attend, complaint, relative_error, ulp, unfused, visibility


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_formulas_agree_with_autograd(case):
    inputs = build(case, torch.float64)
    for name in OPTION_GRADS:
        if getattr(inputs, name) is not None:
            setattr(inputs, name, getattr(inputs, name).double())
    grads = {"dout": inputs.dout, "dlse": inputs.dlse}
    exact = attend(inputs.q, inputs.k, inputs.v, **grads, **inputs.oracle())
    for formulation in (False, True):
        plain = unfused(inputs.q, inputs.k, inputs.v, **grads, **inputs.oracle(), other=formulation)
        for name in NAMES:
            a, b = getattr(exact, name), getattr(plain, name)
            if a is None:
                assert b is None
                continue
            finite = torch.isfinite(a)
            assert torch.equal(finite, torch.isfinite(b)) and torch.equal(a[~finite], b[~finite])
            torch.testing.assert_close(a[finite], b[finite], rtol=1e-11, atol=1e-12)


def test_agrees_with_torch():
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 9, 9))
    mask = torch.rand(2, 1, 5, 9) < 0.6
    mask[..., 0] = True
    torch.testing.assert_close(
        attend(q, k, v, layout="bhsd", mask=mask).out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )
    torch.testing.assert_close(
        attend(q, k, v, layout="bhsd", causal="top_left").out,
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


def test_two_rows_by_hand():
    q = torch.tensor([[1.0], [2.0]])
    k = torch.tensor([[0.0], [math.log(3.0)]])
    v = torch.tensor([[4.0], [8.0]])
    result = attend(q, k, v, scale=1.0, causal=True)
    torch.testing.assert_close(result.out, torch.tensor([[4.0], [(4 + 9 * 8) / 10]], dtype=torch.float64))
    torch.testing.assert_close(result.lse, torch.tensor([0.0, math.log(10.0)], dtype=torch.float64))


def test_bands():
    def picture(**kw):
        return ["".join(".x"[int(c)] for c in row) for row in visibility((1, 1, 3, 5), **kw)[0, 0]]

    assert picture(causal=True) == ["xxx..", "xxxx.", "xxxxx"]
    assert picture(causal="top_left") == ["x....", "xx...", "xxx.."]
    assert picture(window=(1, 0)) == [".xx..", "..xx.", "...xx"]
    assert picture(window=(None, 1)) == ["xxxx.", "xxxxx", "xxxxx"]
    assert picture(window=(1, -1), causal=True) == [".xx..", "..xx.", "...xx"]
    assert picture(window=(2, 1), causal="top_left") == ["x....", ".x...", "..x.."]
    assert picture(kv_lengths=torch.tensor([2])) == ["xx...", "xx...", "xx..."]


def test_hidden_values_are_not_read():
    q, k, v, dout = (torch.randn(1, n, 2, 4) for n in (3, 6, 6, 3))
    mask = torch.ones(6, dtype=torch.bool)
    mask[[1, 4]] = False
    clean = attend(q, k, v, mask=mask, dout=dout)
    k[:, 1], v[:, 4] = float("nan"), float("inf")
    dirty = attend(q, k, v, mask=mask, dout=dout)
    for name in NAMES[:5]:
        torch.testing.assert_close(getattr(clean, name), getattr(dirty, name))


def test_the_rule_catches_one_ulp_too_many(monkeypatch):
    monkeypatch.setattr(reference, "LUCK", {})
    want = torch.tensor([1.0, 1.5], dtype=torch.float64)
    ok = want.float() + 4 * torch.finfo(torch.float32).eps
    bad = want.float() + 5 * torch.finfo(torch.float32).eps
    assert complaint("x", ok, want) is None
    assert "error" in complaint("x", bad, want)
    assert complaint("x", bad, want, relative_error(bad, want)) is None
    assert "isnan" in complaint("x", bad * float("nan"), want)
    assert "shape" in complaint("x", bad[:1], want)
    assert ulp(1.5, torch.bfloat16) == 2**-7 and ulp(2.0, torch.float16) == 2**-9
