"""Sinks and ALiBi slopes: what they are equal to, and what they must not disturb."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, build
from harness import complaints, expectations, run
from reference import attend, distances

import flash_attn_ext as fae

BASE = dict(batch=2, heads=(4, 2), seq=(45, 70), dim=(20, 24))
NAN, INF = float("nan"), float("inf")


def call(inputs, target, **changes):
    kwargs = {**inputs.kwargs(), **changes}
    q, k, v = (kwargs.pop(n, getattr(inputs, n)) for n in ("q", "k", "v"))
    return fae.flash_attention(q, k, v, return_lse=True, backend=target.backend, **kwargs)


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window=(9, 2), softcap=3.0)], ids=str)
def test_slopes_are_a_bias(options, extended_target):
    inputs = build(Case("slopes", **BASE, **options), torch.float64)
    for slopes in (torch.rand(4), torch.rand(2, 4).double() - 0.5):
        bias = -slopes.double()[..., None, None] * distances(45, 70)
        torch.testing.assert_close(
            call(inputs, extended_target, alibi_slopes=slopes), call(inputs, extended_target, bias=bias)
        )


@pytest.mark.cuda
def test_slopes_see_distances_within_the_shifted_diagonal(extended_target):
    """One key has all the weight: that at i + seq_kv - seq_q, whatever the causal alignment."""
    q, k, v = torch.zeros(1, 3, 1, 4), torch.zeros(1, 5, 1, 4), torch.eye(5)[None, :, None]
    for causal in (False, True):
        out = fae.flash_attention(
            q, k, v, causal, alibi_slopes=torch.tensor([1e4]), backend=extended_target.backend
        )
        assert torch.equal(out[0, :, 0].argmax(-1), torch.tensor([2, 3, 4]))


@pytest.mark.parametrize(
    "options", [{}, dict(causal=True), dict(mask="b1qk"), dict(scale=-2.0, softcap=1.0)], ids=str
)
def test_a_sink_is_a_key_without_a_value(options, extended_target):
    """One more key, seen by every row: its score, whatever q is, is the sink, and its value is 0."""
    inputs = build(Case("sink", **BASE, **options), torch.float64)
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = call(inputs, extended_target, sinks=sinks)
    exact = attend(inputs.q, inputs.k, inputs.v, **inputs.oracle())
    share = torch.sigmoid(exact.lse - sinks[:, None])  # of the weight, what the keys keep
    torch.testing.assert_close(out, exact.out * share.transpose(1, 2)[..., None])
    torch.testing.assert_close(lse, torch.logaddexp(exact.lse, sinks[:, None].expand_as(lse)))


@pytest.mark.cuda
def test_a_row_without_keys_has_the_lse_of_its_sink(extended_target):
    inputs = build(Case("blind", **BASE, lengths=(0, 33)), torch.float32)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, torch.randn(4))]
    options = dict(kv_lengths=inputs.kv_lengths, return_lse=True, backend=extended_target.backend)
    for cut in (70, 0):  # hidden keys, and none at all
        q, k, v, sinks = leaves[0][:1], leaves[1][:1, :cut], leaves[2][:1, :cut], leaves[3]
        out, lse = fae.flash_attention(q, k, v, sinks=sinks, **{**options, "kv_lengths": torch.tensor([0])})
        assert not out.any() and torch.equal(lse, sinks.detach()[None, :, None].expand_as(lse))
        grads = torch.autograd.grad(
            (out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)), allow_unused=True
        )
        assert not any(g.any() for g in grads)


@pytest.mark.cuda
@pytest.mark.parametrize("size", [-1e30, -1e4, 80.0, 1e4, 1e30])
def test_far_sinks(size, extended_target):
    """A sink beyond exp's range on either side of the scores."""
    inputs = build(Case("far", **BASE), torch.float32)
    sinks = torch.full((4,), size)
    out, lse = call(inputs, extended_target, sinks=sinks)
    plain, plain_lse = call(inputs, extended_target)
    if size < 0:
        torch.testing.assert_close((out, lse), (plain, plain_lse))
    else:
        assert out.abs().max() < 1e-25 and torch.equal(lse, torch.full_like(lse, size))


@pytest.mark.cuda
def test_a_sink_of_minus_infinity_is_none(extended_target):
    inputs = build(Case("none", **BASE, lengths=(0, 33)), torch.float32)
    torch.testing.assert_close(
        call(inputs, extended_target, sinks=torch.full((4,), -INF)),
        call(inputs, extended_target),
        rtol=0,
        atol=1e-6,
    )


def test_keys_may_be_split_with_the_sink_on_one_side(extended_target):
    inputs = build(Case("split", **BASE), torch.float64)
    sinks = torch.randn(4, dtype=torch.float64)
    parts = []
    for keys, given in ((slice(0, 31), sinks), (slice(31, 70), None)):
        parts += call(inputs, extended_target, k=inputs.k[:, keys], v=inputs.v[:, keys], sinks=given)
    torch.testing.assert_close(fae.merge_states(*parts), call(inputs, extended_target, sinks=sinks))


def test_gradients_flow_through_merged_states_into_sinks(extended_target):
    inputs = build(Case("merged", **BASE), torch.float64)
    results = []
    for cut in (None, 31):
        sinks = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
        if cut is None:
            pair = call(inputs, extended_target, sinks=sinks)
        else:
            left = call(inputs, extended_target, k=inputs.k[:, :cut], v=inputs.v[:, :cut], sinks=sinks)
            right = call(inputs, extended_target, k=inputs.k[:, cut:], v=inputs.v[:, cut:])
            pair = fae.merge_states(*left, *right)
        results.append(torch.autograd.grad(pair, sinks, (inputs.dout, inputs.dlse)))
    torch.testing.assert_close(*results)


GRADCHECK = [
    Case(
        "alibi",
        heads=(2, 1),
        seq=(4, 6),
        dim=(3, 2),
        alibi="h",
        alibi_dtype="float64",
        softcap=2.0,
        causal=True,
    ),
    Case(
        "batch", batch=2, heads=(2, 2), seq=(4, 6), dim=(3, 2), alibi="bh", alibi_dtype="float64", bias="1h1k"
    ),
    Case("sinks", heads=(2, 1), seq=(4, 6), dim=(3, 2), sinks="float64", causal=True),
    Case(
        "both",
        heads=(2, 1),
        seq=(4, 6),
        dim=(3, 2),
        alibi="h",
        alibi_dtype="float64",
        sinks="float64",
        typed=("trees",),
    ),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda c: c.name)
def test_gradcheck(case, extended_target):
    inputs = build(case, torch.float64)
    names = [n for n in ("q", "k", "v", "bias", "alibi_slopes", "sinks") if getattr(inputs, n) is not None]
    leaves = [getattr(inputs, n).requires_grad_() for n in names]
    fixed = {n: t for n, t in inputs.kwargs().items() if n not in names}

    def fn(*tensors):
        given = dict(zip(names, tensors, strict=True))
        out, lse = fae.flash_attention(**given, **fixed, return_lse=True, backend=extended_target.backend)
        return out, torch.where(lse == -INF, 0.0, lse)

    assert torch.autograd.gradcheck(fn, leaves)


HIDING = {
    "documents": Case("documents", typed=("scattered",), sinks="float32"),
    "trees": Case("trees", typed=("trees",), alibi="h"),
    "prefixes": Case("prefixes", typed=("prefixes",), sinks="float32", softcap=3.0),
    "blocks": Case("blocks", typed=("head-blocks",), alibi="bh", sinks="same"),
    "dropout": Case("dropout", mask="b1qk", lengths=(60, 13), dropout_p=0.3),
    "all": Case("all", typed=("documents", "prefix"), causal=True, alibi="h", sinks="float32", dropout_p=0.5, bias="1hqk", bias_neg_inf=True),
}  # fmt: skip


def hiding(name: str) -> Case:
    return Case(**{**{n: value for n, value in vars(HIDING[name]).items() if n not in BASE}, **BASE})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hide", HIDING)
def test_hidden_keys_and_values_are_not_read(hide, dtype, extended_target):
    """NaN and Inf in every key and value that no query of its group sees, and in rows that see nothing: not a
    bit may change."""
    clean = build(hiding(hide), dtype)
    seen = attend(clean.q, clean.k, clean.v, **clean.oracle()).visible
    unseen = ~seen.any(-2).unflatten(1, (2, 2)).any(2).transpose(1, 2)
    blind = ~seen.any(-1)
    expected = run(clean, extended_target.backend)
    for value in (NAN, INF, -INF):
        dirty = build(clean.case, dtype)
        dirty.k[unseen], dirty.v[unseen] = value, value
        dirty.q[blind.transpose(1, 2)], dirty.dout[blind.transpose(1, 2)] = value, value
        dirty.dlse = dirty.dlse.masked_fill(blind, value)
        got = run(dirty, extended_target.backend)
        for name in got:
            assert torch.equal(got[name], expected[name]), (name, value)


@pytest.mark.parametrize("where", ["k", "v", "q", "dout"])
@pytest.mark.parametrize("hide", [name for name in HIDING if not HIDING[name].dropout_p])
def test_a_visible_nan_touches_only_the_rows_that_see_it(hide, where, extended_target):
    clean, dirty = build(hiding(hide), torch.float32), build(hiding(hide), torch.float32)
    poisoned = getattr(dirty, where)
    poisoned[0, 20, 1, 3] = poisoned[1, 41, 0, 7] = NAN
    dirty.alibi_slopes = dirty.sinks = clean.alibi_slopes = clean.sinks = (
        None  # their gradients would all be NaN
    )
    exact = attend(dirty.q, dirty.k, dirty.v, dout=dirty.dout, dlse=dirty.dlse, **dirty.oracle())
    _, errors = expectations([clean])
    assert not complaints(run(dirty, extended_target.backend), dirty, exact, errors)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_a_nan_in_one_head_stays_there(name, extended_target):
    inputs = build(Case("head", **BASE), torch.float32)
    option = torch.zeros(4)
    option[2] = NAN
    out, lse = call(inputs, extended_target, **{name: option})
    assert out[:, :, 2].isnan().all() and lse[:, 2].isnan().all()
    rest = [0, 1, 3]
    clean, clean_lse = call(inputs, extended_target, **{name: torch.zeros(4)})
    assert torch.equal(out[:, :, rest], clean[:, :, rest]) and torch.equal(lse[:, rest], clean_lse[:, rest])


def test_strided_options(extended_target):
    inputs = build(Case("strided", **BASE), torch.float32)
    for shape, name in (((4,), "sinks"), ((4,), "alibi_slopes"), ((2, 4), "alibi_slopes")):
        option = torch.rand(shape)
        wide = torch.full((*shape, 3), NAN)
        wide[..., 1] = option
        for strided in (wide[..., 1], option.flip(-1).flip(-1), option[..., :1].expand(shape)):
            got = call(inputs, extended_target, **{name: strided})
            assert all(map(torch.equal, got, call(inputs, extended_target, **{name: strided.clone()})))


def test_slopes_of_the_paper():
    """2^(-8 h / heads): in them, no distance loses its sign or overflows in half precision."""
    slopes = torch.tensor([2 ** (-8 * h / 4) for h in range(1, 5)])
    q, k, v = (torch.randn(1, 3000, 4, 8, dtype=torch.float16) for _ in range(3))
    out = fae.flash_attention(q[:, -5:], k, v, causal=True, alibi_slopes=slopes)
    exact = attend(q[:, -5:], k, v, causal=True, alibi_slopes=slopes).out
    assert (out.double() - exact).abs().max() < 2e-3 and math.isfinite(float(out.abs().max()))
