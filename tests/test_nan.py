"""What is hidden is never read; what is visible propagates, but only to the rows that see it."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Inputs, build
from conftest import STANDARD, Target
from harness import complaints, expectations, run
from reference import attend
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_ext as fae

NAN, INF = float("nan"), float("inf")
# Ways to hide keys 40..69 of 70 (and sometimes more) from some or all of 45 queries.
HIDING = {
    "mask-keys": Case("keys", mask="b11k"),
    "mask-full": Case("full", mask="bhqk"),
    "mask-per-batch": Case("per-batch", mask="b1qk"),
    "mask-expanded": Case("expanded", mask="11qk"),
    "bias-neg-inf": Case("neg-inf", bias="bhqk", bias_neg_inf=True),
    "bias-neg-inf-keys": Case("neg-inf-keys", bias="11k", bias_neg_inf=True),
    "lengths": Case("lengths", lengths=(40, 13)),
    "lengths-zero": Case("lengths-zero", lengths=(0, 70), lengths_dtype="int64"),
    "causal": Case("causal", causal=True),
    "top-left": Case("top-left", causal="top_left"),
    "window": Case("window", window=(4, 3)),
    "window-causal": Case("window-causal", window=(9, None), causal=True),
    "all": Case(
        "all", mask="b11k", bias="1hqk", bias_neg_inf=True, lengths=(60, 13), causal=True, window=(30, 0)
    ),
    "softcap": Case("softcap", mask="b1qk", softcap=3.0, lengths=(66, 50)),
}
BASE = dict(batch=2, heads=(4, 2), seq=(45, 70), dim=(20, 24))


def hiding(name: str, layout: str = "bshd") -> Case:
    options = {k: v for k, v in vars(HIDING[name]).items() if k not in (*BASE, "layout")}
    return Case(**{**options, **BASE, "layout": layout})


def check(dirty: Inputs, clean: Inputs, target: Target, schedule: int | None = None):
    """Against the fp64 rules, with the error that the unfused computation makes on the clean inputs; with one
    schedule of the target, or all."""
    exact = attend(dirty.q, dirty.k, dirty.v, dout=dirty.dout, dlse=dirty.dlse, **dirty.oracle())
    how = {"lse_dtype": clean.q.dtype} if target == STANDARD else {}  # see test_standard_backend
    _, errors = expectations([clean, *(build(clean.case, clean.q.dtype, n) for n in (1, 2))], **how)
    for options in target.schedules() if schedule is None else [target.one_schedule(schedule)]:
        found = complaints(run(dirty, target.backend, **options), dirty, exact, errors)
        assert not found, "\n".join([str(options), *found])


def poison(x: torch.Tensor, rows: torch.Tensor, layout: str, value: float) -> torch.Tensor:
    """A copy of `x` with `value` in some elements of the chosen rows: bool (B, H, S)."""
    x = x.clone()
    view = x.transpose(1, 2) if layout == "bshd" else x
    spots = rows[..., None] & (torch.arange(view.shape[-1]) % 5 == 2)
    view[spots] = value
    return x


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("hide", HIDING)
def test_hidden_keys_and_values_are_not_read(hide, dtype, any_target):
    """NaN and Inf in every key and value that no query of its group sees, and in every row that sees nothing.

    Not a bit may change, but on CUDA the last ones: rows of a tile with such values are computed in another way there.
    """
    layout = "bhsd" if dtype == torch.float32 else "bshd"
    clean = build(hiding(hide, layout), dtype)
    seen = attend(clean.q, clean.k, clean.v, **clean.oracle()).visible
    blind = ~seen.any(-1)
    unseen = ~seen.any(-2).unflatten(1, (2, 2)).any(2)
    for turn, value in enumerate((NAN, INF, -INF)):
        dirty = build(clean.case, dtype)
        dirty.k = poison(dirty.k, unseen, layout, value)
        dirty.v = poison(dirty.v, unseen, layout, value)
        dirty.q = poison(dirty.q, blind, layout, value)
        dirty.dout = poison(dirty.dout, blind, layout, value)
        dirty.dlse = dirty.dlse.masked_fill(blind, value)
        if any_target.on_cuda_kernels:
            check(dirty, clean, any_target, turn)
            continue
        got, expected = run(dirty, any_target.backend), run(clean, any_target.backend)
        for name in got:
            assert torch.equal(got[name], expected[name]), (name, value)
    if not any_target.on_cuda_kernels:
        check(dirty, clean, any_target)


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["k", "v", "kv", "q", "dout", "dlse"])
@pytest.mark.parametrize("hide", HIDING)
def test_a_visible_nan_touches_only_the_rows_that_see_it(hide, where, any_target):
    """In partially masked tiles too, forward and backward."""
    clean, dirty = build(hiding(hide), torch.float32), build(hiding(hide), torch.float32)
    keys, queries = torch.zeros(2, 2, 70, dtype=torch.bool), torch.zeros(2, 4, 45, dtype=torch.bool)
    keys[0, 1, 20] = keys[1, 0, 11] = keys[1, 1, 41] = True
    queries[0, 2, 7] = queries[1, 1, 44] = True
    for name in ("k", "v"):
        if name in where:
            setattr(dirty, name, poison(getattr(dirty, name), keys, "bshd", NAN))
    if where in ("q", "dout"):
        setattr(dirty, where, poison(getattr(dirty, where), queries, "bshd", NAN))
    if where == "dlse":
        dirty.dlse = dirty.dlse.masked_fill(queries, NAN)
    check(dirty, clean, any_target, len(hide) + len(where))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_bias_values_are_not_read(dtype, target):
    case = Case("bias", **BASE, bias="bhqk", mask="b1qk", lengths=(60, 20), causal=True)
    clean, dirty = build(case, dtype), build(case, dtype)
    seen = attend(clean.q, clean.k, clean.v, **clean.oracle()).visible
    dirty.bias = dirty.bias.masked_fill(~seen, NAN)
    got, expected = (run(x, target.backend, **target.repeatable) for x in (dirty, clean))
    assert all(torch.equal(got[n], expected[n]) for n in got)
    dirty.bias[1, 2, 44, 3] = dirty.bias[0, 3, 30, 30] = NAN
    check(dirty, clean, target)


@pytest.mark.cuda
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", ["k", "v"])
def test_partly_visible_values_are_hidden_from_the_others(where, value, target):
    """A causal batch: a bad value in the last key, which only the last query sees."""
    case = Case("last", heads=(2, 1), seq=(130, 130), dim=(16, 16), causal=True)
    clean, dirty = build(case, torch.float32), build(case, torch.float32)
    getattr(dirty, where)[:, -1] = value
    clean, dirty = clean.to(target.device), dirty.to(target.device)
    got = fae.flash_attention(dirty.q, dirty.k, dirty.v, causal=True, backend=target.backend)
    expected = fae.flash_attention(clean.q, clean.k, clean.v, causal=True, backend=target.backend)
    slack = 2e-6 if target.on_cuda_kernels else 0  # see test_hidden_keys_and_values_are_not_read
    torch.testing.assert_close(got[:, :-1], expected[:, :-1], rtol=0, atol=slack)
    assert not torch.isfinite(got[:, -1]).all()


@pytest.mark.cuda
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_at_finfo_min_give_the_mean_of_v(dtype, bias_dtype, any_target):
    """The way many models write masks; the size of finfo.min in fp32 stays finite in base-2 scores too."""
    if bias_dtype == torch.float64 and dtype != torch.float64:
        low = torch.finfo(torch.float32).min
    else:
        low = torch.finfo(bias_dtype).min
    inputs = build(Case("min", heads=(4, 2), seq=(20, 70), dim=(16, 16)), dtype)
    inputs.bias = torch.zeros(20, 70, dtype=bias_dtype)
    inputs.bias[4:9] = low
    inputs.bias[9:, 30:] = low
    inputs = inputs.to(any_target.device)
    got = fae.flash_attention(inputs.q, inputs.k, inputs.v, bias=inputs.bias, backend=any_target.backend)
    mean = inputs.v.double().mean(1).repeat_interleave(2, 1)[:, None].expand(1, 5, 4, 16)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(got[:, 4:9].double(), mean, rtol=0, atol=tolerance)
    cut = fae.flash_attention(inputs.q[:, 9:], inputs.k[:, :30], inputs.v[:, :30], backend=any_target.backend)
    torch.testing.assert_close(got[:, 9:], cut, rtol=0, atol=max(tolerance, 5e-7))


@pytest.mark.cuda
@pytest.mark.parametrize("low", ["min", -1e9, -6e4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_rows_at_a_low_bias(dtype, low, any_target):
    """Where the log-sum-exp cannot hold the logarithm of the sum, every key still has its share, and no more."""
    if dtype == torch.float16 and low == -1e9:
        low = -3e4  # what float16 holds
    elif low == "min":
        low = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min
    case = Case("low", heads=(4, 2), seq=(20, 400), dim=(16, 24), bias="1hqk")
    draws = [build(case, dtype, draw) for draw in range(3)]
    for inputs in draws:
        inputs.bias[:, :, 4:9] = low
        inputs.bias[:, 1:, 9:, 30:] = low
    how = {"lse_dtype": dtype} if any_target == STANDARD else {}
    found = complaints(run(draws[0], any_target.backend), draws[0], *expectations(draws, **how))
    assert not found, "\n".join(found)


@pytest.mark.cuda
def test_a_bias_beyond_the_range_of_the_inputs_is_low_and_visible(any_target):
    """float16 cannot hold -1e6: two keys at that bias share their row, forward and backward."""
    case = Case("beyond", heads=(2, 2), seq=(1, 2), dim=(8, 8), bias="hqk", bias_dtype="float32")
    inputs = build(case, torch.float16)
    inputs.q, inputs.bias = torch.zeros_like(inputs.q), torch.full_like(inputs.bias, -1e6)
    got = run(inputs, any_target.backend)
    torch.testing.assert_close(got["out"], inputs.v.mean(1, keepdim=True), rtol=0, atol=2e-3)
    dp = torch.einsum("bqhd,bkhd->hqk", inputs.dout.double(), inputs.v.double())
    share = (dp - dp.mean(-1, keepdim=True) + inputs.dlse[0, :, :, None].double()) / 2
    torch.testing.assert_close(got["dbias"].double(), share, rtol=0, atol=5e-3)


def test_rows_at_finfo_min_as_torch_has_them(target):
    """The same next to torch's own unfused SDPA."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (12, 40, 40))
    bias = torch.zeros(12, 40)
    bias[3:5] = torch.finfo(torch.float32).min

    def torch_sdpa(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):  # its flash kernel lets such a row's weights add up to 40
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def ours(q, k, v):
        return fae.flash_attention(q, k, v, layout="bhsd", bias=bias, backend=target.backend)

    grads = []
    for fn in (torch_sdpa, ours):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fn(*leaves)
        grads.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
def test_fully_hidden_rows(target):
    case = Case(
        "blind", heads=(4, 2), seq=(70, 33), dim=(16, 16), causal=True
    )  # the first 37 rows see nothing
    inputs = build(case, torch.float32)
    got = run(inputs, target.backend)
    assert torch.equal(got["out"][:, :37], torch.zeros(1, 37, 4, 16))
    assert torch.equal(got["lse"][..., :37], torch.full((1, 4, 37), -INF))
    assert torch.equal(got["dq"][:, :37], torch.zeros(1, 37, 4, 16))
    assert torch.isfinite(got["lse"][..., 37:]).all()


FEW_ROWS = dict(batch=2, heads=(4, 2), seq=(3, 2100), dim=(20, 24))


FEW_ROWS_HIDING = [
    dict(mask="bhqk"), dict(bias="11k", bias_neg_inf=True), dict(causal="top_left"), dict(lengths=(1500, 13)),
    dict(window=(9, 0)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", FEW_ROWS_HIDING, ids=lambda o: next(iter(o)))
def test_few_rows_do_not_read_what_is_hidden(options, dtype, cpu_target):
    """Decoding reads keys where they lie, by ranges of which several may hold nothing that is seen."""
    inputs = build(Case("few", **FEW_ROWS, **options), dtype)
    clean = run(inputs, "cpu")
    visible = attend(inputs.q, inputs.k, inputs.v, **inputs.oracle()).visible
    unseen = ~visible.any(-2).unflatten(1, (2, 2)).any(2).mT
    assert unseen.any()
    for value in (NAN, INF):
        inputs.k[unseen], inputs.v[unseen] = value, value
        for name, result in run(inputs, "cpu").items():
            assert torch.equal(result, clean[name]), (name, value)


@pytest.mark.parametrize("where", ["k", "v", "q", "dout"])
@pytest.mark.parametrize("options", FEW_ROWS_HIDING, ids=lambda o: next(iter(o)))
def test_a_visible_nan_among_few_rows(options, where, cpu_target):
    """It touches the rows and keys that see each other alone, where gradients of keys are sums over few rows."""
    clean, dirty = (build(Case("few", **FEW_ROWS, **options), torch.float32) for _ in range(2))
    keys, queries = torch.zeros(2, 2, 2100, dtype=torch.bool), torch.zeros(2, 4, 3, dtype=torch.bool)
    keys[0, 1, 0] = keys[0, 0, 2095] = keys[1, 1, 11] = True
    queries[0, 2, 1] = queries[1, 1, 0] = True
    setattr(dirty, where, poison(getattr(dirty, where), keys if where in "kv" else queries, "bshd", NAN))
    check(dirty, clean, cpu_target)


@pytest.mark.parametrize("seq_q", [1, 20])
def test_a_visible_nan_without_weight(seq_q, any_target):
    """0 * NaN is NaN, also where one range of keys has all the weight and another one the NaN."""
    q, k, v = torch.full((1, seq_q, 1, 8), 10.0), torch.zeros(1, 2300, 1, 8), torch.ones(1, 2300, 1, 8)
    k[:, 5] = 100.0
    v[:, 2000, :, 3] = NAN
    out = fae.flash_attention(q, k, v, backend=any_target.backend)
    assert out[..., 3].isnan().all()
    assert torch.equal(out[..., :3], torch.ones(1, seq_q, 1, 3))
