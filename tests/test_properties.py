"""Laws that hold for any input: gradcheck, random problems, and pairs of calls that must agree."""

from __future__ import annotations

import pytest
import torch
from cases import PATTERNS, Case, build
from conftest import CPU_TARGETS, PORTABLE
from harness import complaints, prepared, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flash_attn_ext as fae

STEADY = settings(
    derandomize=True, deadline=None, max_examples=60, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
RECIPES = [
    "dense",
    "transposed",
    "d_slow",
    "step2",
    "rows2",
    "offset",
    "padded",
    "overlap",
    "expand0",
    "expand3",
]
BASE = dict(batch=2, heads=(4, 2), seq=(45, 70), dim=(20, 24))


@st.composite
def problems(draw) -> Case:
    """Any combination of options on small shapes."""
    batch, heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    seq = (draw(st.integers(0, 80)), draw(st.integers(0, 140)))
    side = st.one_of(st.none(), st.integers(-1, 90))
    return Case(
        name=f"drawn-{draw(st.integers(0, 2**16))}",
        batch=batch,
        heads=(heads_kv * group, heads_kv),
        seq=seq,
        dim=(draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        layout=draw(st.sampled_from(["bshd", "bhsd"])),
        causal=draw(st.sampled_from([False, True, "top_left", "bottom_right"])),
        window=draw(st.one_of(st.none(), st.tuples(side, side))),
        scale=draw(st.one_of(st.none(), st.floats(-1.5, 1.5))),
        softcap=draw(st.one_of(st.just(0.0), st.floats(0.5, 20.0))),
        mask=draw(st.one_of(st.none(), st.sampled_from(PATTERNS))),
        bias=draw(st.one_of(st.none(), st.sampled_from(PATTERNS))),
        bias_neg_inf=draw(st.booleans()),
        bias_dtype=draw(st.sampled_from(["same", "float32", "bfloat16"])),
        lengths=draw(st.one_of(st.none(), st.tuples(*[st.integers(-2, 150)] * batch))),
        strides=tuple(draw(st.sampled_from(RECIPES)) for _ in range(3)),
        out_grad_strides=draw(st.sampled_from(RECIPES)),
        use_lse=draw(st.booleans()),
    )


@STEADY
@given(case=problems(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_any_problem(target, case, dtype):
    inputs, exact, errors = prepared(case, dtype)
    found = complaints(run(inputs, target.backend), inputs, exact, errors)
    assert not found, "\n".join(found)


GRADCHECK = [
    Case("plain", heads=(2, 1), seq=(5, 9), dim=(3, 4)),
    Case("causal", heads=(4, 2), seq=(7, 6), dim=(5, 2), causal=True, layout="bhsd"),
    Case("softcap", heads=(2, 1), seq=(4, 7), dim=(3, 3), softcap=1.5, scale=-0.8, bias="hqk"),
    Case("bias", batch=2, heads=(2, 2), seq=(4, 6), dim=(2, 3), bias="b1q1", mask="11qk"),
    Case("lengths", batch=2, heads=(2, 1), seq=(4, 6), dim=(2, 3), bias="1", lengths=(3, 0), window=(3, 1)),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda c: c.name)
def test_gradcheck(case, target):
    inputs = build(case, torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.bias) if t is not None]
    kwargs = {n: t for n, t in inputs.kwargs().items() if n != "bias"}

    def fn(q, k, v, bias=None):
        out, lse = fae.flash_attention(q, k, v, bias=bias, return_lse=True, backend=target.backend, **kwargs)
        return out, torch.where(lse == float("-inf"), 0.0, lse)

    assert torch.autograd.gradcheck(fn, leaves)


def assert_near(a: torch.Tensor, b: torch.Tensor, what: str = ""):
    """Equal up to rounding in a different order, in units of the larger result."""
    loose = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[a.dtype]
    torch.testing.assert_close(
        a, b, rtol=0, atol=loose * max(1.0, float(b.abs().max())), equal_nan=True, msg=what or None
    )


def call(inputs, target, **changes):
    kwargs = {**inputs.kwargs(), **changes}
    q, k, v = (kwargs.pop(n, getattr(inputs, n)) for n in ("q", "k", "v"))
    return fae.flash_attention(q, k, v, return_lse=True, backend=target.backend, **kwargs)


PAIR_DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", PAIR_DTYPES, ids=str)
class TestPairs:
    def test_keys_may_come_in_any_order(self, target, dtype):
        inputs = build(Case("perm", **BASE, mask="bhqk", bias="1hqk"), dtype)
        order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
        out, lse = call(inputs, target)
        changed = dict(k=inputs.k[:, order], v=inputs.v[:, order])
        out2, lse2 = call(
            inputs, target, mask=inputs.mask[..., order], bias=inputs.bias[..., order], **changed
        )
        assert_near(out2, out)
        assert_near(lse2[lse.isfinite()], lse[lse.isfinite()])

    def test_batches_and_heads_do_not_touch_each_other(self, target, dtype):
        inputs = build(Case("alone", **BASE, causal=True, lengths=(66, 20)), dtype)
        out, lse = call(inputs, target)
        changed = dict(q=inputs.q.clone(), k=inputs.k.clone(), v=inputs.v.clone())
        changed["q"][1] = changed["k"][1] = changed["v"][1] = 7.0
        changed["k"][0, :, 1] = changed["v"][0, :, 1] = changed["q"][0, :, 2:] = -3.0
        out2, lse2 = call(inputs, target, **changed)
        assert torch.equal(out2[0, :, :2], out[0, :, :2]) and torch.equal(lse2[0, :2], lse[0, :2])
        assert not torch.equal(out2[1], out[1])

    def test_one_batch_at_a_time(self, target, dtype):
        inputs = build(Case("slices", **BASE, causal=True), dtype)
        out, lse = call(inputs, target)
        for b in range(2):
            for g in range(2):
                heads = slice(2 * g, 2 * g + 2)
                part = dict(q=inputs.q[b, :, heads], k=inputs.k[b, :, g : g + 1], v=inputs.v[b, :, g : g + 1])
                one, one_lse = call(inputs, target, **part)
                assert_near(one, out[b, :, heads])
                assert_near(one_lse, lse[b, heads])

    def test_queries_in_chunks(self, target, dtype):
        """A row's result does not depend on which rows it is computed with."""
        inputs = build(Case("chunks", **BASE), dtype)
        out, _ = call(inputs, target)
        for start in range(0, 45, 13):
            part, _ = call(inputs, target, q=inputs.q[:, start : start + 13])
            assert_near(part, out[:, start : start + 13])

    def test_layouts_agree(self, target, dtype):
        inputs = build(Case("layout", **BASE, causal=True, mask="bhqk"), dtype)
        out, lse = call(inputs, target)
        swapped = {n: getattr(inputs, n).transpose(1, 2) for n in "qkv"}
        out2, lse2 = call(inputs, target, layout="bhsd", **swapped)
        assert out2.is_contiguous() and torch.equal(out2, out.transpose(1, 2)) and torch.equal(lse, lse2)

    def test_groups_are_repeated_heads(self, target, dtype):
        inputs = build(Case("group", **BASE, causal=True), dtype)
        out, lse = call(inputs, target)
        repeated = {n: getattr(inputs, n).repeat_interleave(2, 2) for n in "kv"}
        out2, lse2 = call(inputs, target, **repeated)
        assert_near(out2, out)
        assert_near(lse2, lse)

    @pytest.mark.parametrize("seq", [(45, 70), (70, 45), (1, 140)], ids=str)
    def test_causal_is_a_window_is_a_mask(self, target, dtype, seq):
        inputs = build(Case(f"band-{seq}", **{**BASE, "seq": seq}), dtype)
        i, j = torch.arange(seq[0])[:, None], torch.arange(seq[1])[None]
        shift = seq[1] - seq[0]
        for as_option, as_mask in [
            (dict(causal=True), j <= i + shift),
            (dict(causal="top_left"), j <= i),
            (dict(window=(None, 0)), j <= i + shift),
            (dict(window=(11, 6)), (j >= i + shift - 11) & (j <= i + shift + 6)),
            (dict(window=(11, 6), causal=True), (j >= i + shift - 11) & (j <= i + shift)),
            (dict(window=(40, -1), causal="top_left"), (j >= i + shift - 40) & (j <= i)),
        ]:
            out, lse = call(inputs, target, **as_option)
            out2, lse2 = call(inputs, target, mask=as_mask)
            out3, lse3 = call(inputs, target, bias=torch.where(as_mask, 0.0, float("-inf")))
            for o, l in ((out2, lse2), (out3, lse3)):
                assert_near(o, out, str(as_option))
                assert torch.equal(l == float("-inf"), lse == float("-inf"))
                assert_near(
                    l[l.isfinite()], lse[lse.isfinite()], str(as_option)
                ) if l.isfinite().any() else None
        assert torch.equal(
            call(inputs, target, causal=True)[0], call(inputs, target, causal="bottom_right")[0]
        )

    def test_lengths_are_a_mask_and_a_shorter_call(self, target, dtype):
        inputs = build(Case("lengths", **BASE), dtype)
        lengths = torch.tensor([33, 70])
        out, lse = call(inputs, target, kv_lengths=lengths)
        out2, lse2 = call(inputs, target, mask=(torch.arange(70) < lengths[:, None])[:, None, None])
        out3, lse3 = call(inputs, target, q=inputs.q[:1], k=inputs.k[:1, :33], v=inputs.v[:1, :33])
        assert_near(out, out2)
        assert_near(lse, lse2)
        assert_near(out[:1], out3)
        assert_near(lse[:1], lse3)

    def test_scale_belongs_to_q(self, target, dtype):
        inputs = build(Case("scale", **BASE), dtype)
        a, _ = call(inputs, target, scale=0.25)
        b, _ = call(inputs, target, q=inputs.q * 0.5, scale=0.5)  # a power of two: exact in every dtype
        c, _ = call(inputs, target, q=-inputs.q, scale=-0.25)
        d, _ = call(inputs, target, scale=1.0 / 20**0.5)
        assert_near(a, b)
        assert_near(a, c)
        assert_near(d, call(inputs, target)[0])

    def test_zero_scale_is_the_mean(self, target, dtype):
        inputs = build(Case("mean", **BASE), dtype)
        out, lse = call(inputs, target, scale=0.0)
        mean = inputs.v.double().mean(1).repeat_interleave(2, 1)[:, None].expand(2, 45, 4, 24)
        assert_near(out, mean.to(dtype))
        assert_near(lse, torch.full_like(lse, 70.0).log())

    def test_a_huge_softcap_is_none_and_values_are_linear(self, target, dtype):
        inputs = build(Case("cap", **BASE), dtype)
        out, lse = call(inputs, target)
        capped, capped_lse = call(inputs, target, softcap=1e8)  # (s / cap)^3 is below the last bit
        assert_near(capped, out)
        assert_near(capped_lse, lse)
        doubled, _ = call(inputs, target, v=inputs.v * 2)
        assert torch.equal(doubled, out * 2)

    def test_a_constant_bias_moves_only_the_lse(self, target, dtype):
        inputs = build(Case("constant", **BASE), dtype)
        out, lse = call(inputs, target)
        out2, lse2 = call(inputs, target, bias=torch.full((1,), 2.5))
        assert_near(out2, out)
        assert_near(lse2, lse + 2.5)

    def test_merged_halves_are_the_whole(self, target, dtype):
        inputs = build(Case("merge", **BASE, mask="bhqk"), dtype)
        out, lse = call(inputs, target)
        for cut in (0, 1, 31, 64, 70):
            parts = []
            for keys in (slice(0, cut), slice(cut, 70)):
                parts += call(
                    inputs, target, k=inputs.k[:, keys], v=inputs.v[:, keys], mask=inputs.mask[..., keys]
                )
            merged, merged_lse = fae.merge_states(*parts)
            assert merged.dtype == dtype
            assert_near(merged, out)
            assert_near(merged_lse[lse.isfinite()], lse[lse.isfinite()])
            assert torch.equal(merged_lse.isfinite(), lse.isfinite())


@pytest.mark.parametrize("target", [CPU_TARGETS[-1], PORTABLE], ids=lambda t: t.name)
@STEADY
@given(
    seq=st.tuples(st.integers(1, 50), st.integers(1, 100)), cut=st.integers(0, 100),
    causal=st.sampled_from([False, "top_left"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_split_merges(target, seq, cut, causal, seed):
    """merge_states and its gradients, at any cut: top-left bands do not move when keys are cut off at the end."""
    inputs = build(Case(f"split-{seed}", heads=(2, 1), seq=seq, dim=(8, 8)), torch.float64)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    mask = (
        torch.arange(seq[1]) <= torch.arange(seq[0])[:, None] if causal else torch.ones(seq, dtype=torch.bool)
    )
    kwargs = dict(return_lse=True, backend=target.backend)
    whole = fae.flash_attention(*leaves, causal=causal, **kwargs)
    cut = min(cut, seq[1])
    halves = []
    for keys in (slice(0, cut), slice(cut, None)):
        halves += fae.flash_attention(
            leaves[0], leaves[1][:, keys], leaves[2][:, keys], mask=mask[:, keys], **kwargs
        )
    merged = fae.merge_states(*halves)
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(pair, leaves, (inputs.dout, inputs.dlse)) for pair in (merged, whole)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("seq_q", "seq_kv"), [(128, 8192), (12, 2048)])
def test_the_error_of_float32_grows_with_the_context_no_faster_than_unfused(seq_q, seq_kv, cpu_target):
    """Values of one sign, whose running sum would lose the most."""
    g = torch.Generator().manual_seed(7)
    q, k = torch.randn(seq_q, 64, generator=g), torch.randn(seq_kv, 64, generator=g)
    v = torch.rand(seq_kv, 64, generator=g)
    exact = torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()
    unfused = torch.softmax(q @ k.mT / 8, -1) @ v
    last_bits = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    error, allowed = ((x - exact).abs().max() for x in (fae.flash_attention(q, k, v), unfused))
    assert error <= allowed + last_bits
