"""Forward-mode derivatives against those of the unfused computation, which torch differentiates itself."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import flash_attn_ext as fae
from flash_attn_ext import ops
from flash_attn_ext._options import Options
from flash_attn_ext._windows import CAUSAL

NAMES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
CASES = {
    "plain": {},
    "causal": dict(causal=True, window=(6, 1), softcap=2.0),
    "top-left": dict(causal="top_left", scale=-0.4),
    "masks": dict(mask=torch.rand(2, 1, 9, 14, generator=torch.Generator().manual_seed(1)) < 0.5, kv_lengths=torch.tensor([14, 3])),
    "typed": dict(mask=fae.masks.DocumentMask(torch.arange(9) // 4, torch.arange(14) // 5), softcap=3.0),
    "dropout": dict(dropout_p=0.4, causal=True),
    "blind rows": dict(mask=torch.arange(9)[:, None] > torch.tensor([3] * 14)),
}  # fmt: skip


@pytest.fixture(params=["auto", "portable"])
def any_backend(request):
    return request.param


def inputs(dtype=torch.float64, layout="bshd", bias=(4, 9, 14)) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 9, 4, 8), (2, 14, 2, 8), (2, 14, 2, 6)]
    qkv = (torch.randn(shape, dtype=dtype) for shape in shapes)
    qkv = (t if layout == "bshd" else t.transpose(1, 2).contiguous() for t in qkv)
    options = (torch.randn(bias, dtype=dtype), torch.rand(4, dtype=dtype), torch.randn(4, dtype=dtype))
    return dict(zip(NAMES, (*qkv, *options), strict=True))


def changes(call, values: dict, moving: tuple[str, ...]):
    """(out, lse) and their tangents, `moving` along directions of their own."""
    torch.manual_seed(1)
    directions = {name: torch.randn_like(values[name]) for name in NAMES}
    fixed = {name: t for name, t in values.items() if name not in moving}
    torch.manual_seed(2)  # of the dropout
    return jvp(
        lambda *given: call(**fixed, **dict(zip(moving, given, strict=True)), return_lse=True),
        tuple(values[name] for name in moving),
        tuple(directions[name] for name in moving),
    )


def assert_same(got, want, **tolerance):
    for g, w in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        torch.testing.assert_close(g, w, equal_nan=True, **tolerance)


@pytest.mark.parametrize(
    "moving", [("q",), ("k", "v"), ("bias",), ("alibi_slopes", "sinks"), NAMES], ids="-".join
)
@pytest.mark.parametrize("name", CASES)
def test_all_scores(name, moving, any_backend):
    values = inputs(layout="bhsd" if name == "causal" else "bshd")
    options = {**CASES[name], "layout": "bhsd" if name == "causal" else "bshd"}
    got, want = (
        changes(
            lambda backend=backend, **x: fae.flash_attention(**x, **options, backend=backend), values, moving
        )
        for backend in (any_backend, "standard")
    )
    if name == "blind rows":  # where only a sink is seen, it is no sum that a sink moves
        blind = torch.arange(9) <= 3
        for result in (got, want):
            result[1][1][..., blind] = 0
    assert_same(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("moving", [("q",), ("v",), ("q", "k", "v", "bias")], ids="-".join)
def test_plain_operators(moving, any_backend):
    values = {**inputs(), "alibi_slopes": None, "sinks": None}
    got, want = (changes_of_plain(values, moving, backend) for backend in (any_backend, "standard"))
    assert_same(got, want, rtol=1e-9, atol=1e-10)


def changes_of_plain(values, moving, backend):
    kept = {name: t for name, t in values.items() if t is not None}
    torch.manual_seed(1)
    directions = tuple(torch.randn_like(kept[name]) for name in moving)

    def call(*given):
        return fae.flash_attention(
            **{**kept, **dict(zip(moving, given, strict=True))}, causal=True, return_lse=True, backend=backend
        )

    return jvp(call, tuple(kept[name] for name in moving), directions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, any_backend):
    values = inputs(dtype)
    got = changes(lambda **x: fae.flash_attention(**x, causal=True, backend=any_backend), values, NAMES)
    assert [t.dtype for t in (*got[0], *got[1])] == [dtype, torch.float32] * 2
    step = 1e-3
    torch.manual_seed(1)
    directions = {name: torch.randn_like(values[name]).double() for name in NAMES}
    ends = [
        fae.flash_attention(
            **{n: values[n].double() + sign * step * directions[n] for n in NAMES},
            causal=True,
            return_lse=True,
        )
        for sign in (1, -1)
    ]
    for g, ahead, behind in zip(got[1], *ends, strict=True):
        slope = (ahead - behind) / (2 * step)
        error = (g.double() - slope).abs().max() / slope.abs().max()
        assert error < 30 * max(torch.finfo(dtype).eps, 1e-7), float(error)


@pytest.mark.parametrize("lengths", [([4, 0, 7], [3, 5, 9]), ([11], [1])], ids=str)
def test_packed(lengths, any_backend):
    torch.manual_seed(0)
    cu = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in lengths]
    q, k, v = (
        torch.randn(n + 2, h, 8, dtype=torch.float64)
        for n, h in ((11, 4), (int(cu[1][-1]), 2), (int(cu[1][-1]), 2))
    )
    directions = tuple(torch.randn_like(t) for t in (q, k, v))

    def call(backend):
        torch.manual_seed(2)
        return jvp(
            lambda q, k, v: fae.flash_attention_varlen(
                q, k, v, *cu, causal=True, dropout_p=0.2, return_lse=True, backend=backend
            ),
            (q, k, v),
            directions,
        )

    assert_same(call(any_backend), call("standard"), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 3, 8), (7, 8)], ids=["no batch", "one head"])
def test_fewer_axes(shape, any_backend):
    torch.manual_seed(0)
    q, k, v, dq = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    got, want = (
        jvp(lambda x, b=b: fae.flash_attention(x, k, v, return_lse=True, backend=b), (q,), (dq,))
        for b in (any_backend, "standard")
    )
    assert_same(got, want, rtol=1e-9, atol=1e-10)


def test_jacobians_agree(any_backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in range(3))

    def call(q, k, v):
        return fae.flash_attention(q, k, v, causal=True, backend=any_backend)

    for argument in range(3):
        torch.testing.assert_close(jacfwd(call, argument)(q, k, v), jacrev(call, argument)(q, k, v))
    batch = torch.randn(3, 1, 3, 2, 4, dtype=torch.float64)
    got = vmap(lambda d: jvp(lambda x: call(x, k, v), (q,), (d,))[1])(batch)
    torch.testing.assert_close(got, torch.stack([jvp(lambda x: call(x, k, v), (q,), (d,))[1] for d in batch]))


def test_gradcheck(any_backend):
    torch.manual_seed(0)
    leaves = [torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: fae.flash_attention(q, k, v, causal=True, return_lse=True, backend=any_backend),
        leaves,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        check_batched_grad=True,
    )


def test_dual_numbers_keep_their_graph(any_backend):
    """Tangents beside gradients: the primal result is differentiable as ever."""
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    with forward_ad.dual_level():
        out = fae.flash_attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v, backend=any_backend)
        primal, tangent = forward_ad.unpack_dual(out)
        assert tangent is not None
        (dv,) = torch.autograd.grad(primal.sum(), v)
    plain = fae.flash_attention(q, k, v, backend=any_backend)
    assert torch.equal(primal, plain) and torch.equal(dv, torch.autograd.grad(plain.sum(), v)[0])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_tangents_of_gradients(return_lse, create_graph, any_backend):
    """Every gradient follows the one input that moves, also those of inputs that do not."""

    def of(backend):
        torch.manual_seed(0)
        q, k, v, change = (torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(4))
        with forward_ad.dual_level():
            moving = forward_ad.make_dual(k.detach().requires_grad_(), change.detach())
            out = fae.flash_attention(q, moving, v, True, return_lse=return_lse, backend=backend)
            total = sum(t.square().sum() for t in (out if return_lse else [out]))
            grads = torch.autograd.grad(total, (q, moving, v), create_graph=create_graph)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    torch.testing.assert_close(of(any_backend), of("standard"))


def test_linearized(any_backend):
    torch.manual_seed(0)
    q, k, v, *changes = (torch.randn(1, 4, 2, 6, dtype=torch.float64) for _ in range(6))

    def call(q, k, v):
        return fae.flash_attention(q, k, v, causal=True, backend=any_backend)

    _, linear = torch.func.linearize(call, q, k, v)
    torch.testing.assert_close(linear(*changes), jvp(call, (q, k, v), tuple(changes))[1])


def test_gradients_of_tangents(any_backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in range(3))

    def total(x, backend=any_backend):
        return fae.flash_attention(x, k, v, backend=backend).square().sum()

    got, want = (
        grad(lambda x, b=b: jvp(lambda y: total(y, b), (x,), (q,))[1])(q) for b in (any_backend, "standard")
    )
    torch.testing.assert_close(got, want)


def test_batched_tangents(any_backend):
    """As torch.autograd's own jacobian makes them, which is not torch.func."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 2, 4, dtype=torch.float64) for _ in range(3))

    def call(x):
        return fae.flash_attention(x, k, v, True, alibi_slopes=torch.tensor([0.5, 0.1]), backend=any_backend)

    got = torch.autograd.functional.jacobian(call, q, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(call, q))


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("extended", [False, True], ids=["plain", "extended"])
@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_operators_themselves(backend, extended, return_lse):
    """Under torch.func and with dual numbers, as the functions."""
    torch.manual_seed(3)
    q, k, v, direction = (torch.randn(2, 5, 2, 8) for _ in range(4))
    slopes = torch.rand(2) if extended else None
    options = Options(causal=CAUSAL[True], alibi_slopes=slopes)
    family, taken = (ops.EXTENDED_BY_BACKEND, options) if extended else (ops.BY_BACKEND, options.plain())

    def operator(x):
        return family[backend].attention(x, k, v, *taken, return_lse)[0].sin()

    def function(x):
        return fae.flash_attention(x, k, v, True, alibi_slopes=slopes, backend=backend).sin()

    def dual(call):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(q, direction))).tangent

    def dual_gradient(call):
        with forward_ad.dual_level():
            moving = forward_ad.make_dual(q.clone().requires_grad_(), direction)
            return forward_ad.unpack_dual(torch.autograd.grad(call(moving).sum(), moving)[0]).tangent

    def results(call):
        def total(x):
            return call(x).sum()

        several = torch.stack([q, 2 * q])
        return (
            jvp(call, (q,), (direction,))[1], dual(call), dual_gradient(call), grad(total)(q),
            vmap(grad(total))(several), vmap(call)(several), jacrev(call)(q), jacfwd(call)(q),
        )  # fmt: skip

    for got, want in zip(results(operator), results(function), strict=True):
        torch.testing.assert_close(got, want)


def test_out_would_lose_it():
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    with (
        forward_ad.dual_level(),
        pytest.raises(ValueError, match="out must be None when q has a tangent"),
    ):
        fae.flash_attention(forward_ad.make_dual(q, q), k, v, out=torch.empty_like(q))


@pytest.mark.parametrize(
    "options",
    [{}, {"sinks": torch.zeros(2)}, {"backend": "standard", "causal": True}],
    ids=["plain", "extended", "standard"],
)
def test_compiled_ones_are_refused(options):
    """Rather than lost."""
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))

    def tangent(x):
        return jvp(lambda y: fae.flash_attention(y, k, v, **options), (x,), (x,))[1]

    with pytest.raises(Exception, match="cannot be compiled"):
        torch.compile(tangent, backend="eager", fullgraph=True)(q)


def test_memory_stays_linear():
    """A tangent does not take the whole of the scores."""
    from harness import LargestResult

    q, k, v, d = (torch.randn(3000, 8) for _ in range(4))
    with LargestResult() as largest, forward_ad.dual_level():
        fae.flash_attention(forward_ad.make_dual(q, d), k, v)
    assert largest.elements < 3000 * 3000 / 8


def test_no_sequence_at_all(any_backend):
    """The gradient of what is empty, too."""
    starts = torch.zeros(1, dtype=torch.int32)
    for rows in (0, 3):
        q = torch.randn(rows, 2, 8, dtype=torch.float64, requires_grad=True)

        def call(x):
            return fae.flash_attention_varlen(x, x, x, starts, starts, backend=any_backend)

        got, change = jvp(call, (q.detach(),), (torch.ones(rows, 2, 8, dtype=torch.float64),))
        assert got.shape == change.shape == (rows, 2, 8) and change.eq(0).all()
        (first,) = torch.autograd.grad(call(q).sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), q)
        assert second.shape == q.shape and second.eq(0).all()
