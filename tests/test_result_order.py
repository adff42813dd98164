"""The layout of the SDPA function: results lie in memory as the tensors that they belong to."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn_ext as fae

BHSD, AS_GIVEN = 1, 2
ORDERS = list(itertools.permutations(range(3)))


def lying(order: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose axes before the last lie in memory in this order."""
    stored = torch.randn(*(shape[axis] for axis in order), *shape[len(order) :])
    return stored.permute(*(order.index(axis) for axis in range(len(order))), len(order))


def expected_strides(order: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty_permuted(shape, (*order, len(order))).stride()


def arguments(layout: int, options: int) -> tuple:
    """What follows q, k and v; `options`: how many tensors may be given."""
    return (*[None] * options, layout, 1, -1, -1, 0.5, 0.0)


def operator(name: str):
    return getattr(torch.ops.flash_attn_ext, name)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("name", ["attention", "portable"])
def test_operators(name, order):
    """Values to the bit those of "bhsd", and strides those of each tensor, with data and without."""
    shape = (2, 3, 5, 8)
    q, k, v = lying(order, shape), lying(ORDERS[order[0]], shape), lying((0, 1, 2), shape)
    dout = lying((0, 2, 1), shape)
    found = {}
    for layout in (BHSD, AS_GIVEN):
        rest = arguments(layout, 3)
        out, lse = operator(f"{name}_forward")(q, k, v, *rest, True)
        grads = operator(f"{name}_backward")(dout, None, q, k, v, out, lse, *rest, False)
        found[layout] = (out, lse, *grads)
    for plain, ours in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    out, _, dq, dk, dv, _ = found[AS_GIVEN]
    assert out.stride() == dq.stride() == expected_strides(order, shape)
    assert dk.stride() == expected_strides(ORDERS[order[0]], shape)
    assert dv.stride() == expected_strides((0, 1, 2), shape)
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(t) for t in (q, k, v)]
        rest = arguments(AS_GIVEN, 3)
        fake_out, fake_lse = operator(f"{name}_forward")(*inputs, *rest, True)
        fake = operator(f"{name}_backward")(
            mode.from_tensor(dout), None, *inputs, fake_out, fake_lse, *rest, False
        )
        for real, traced in zip((out, dq, dk, dv), (fake_out, *fake[:3]), strict=True):
            assert real.stride() == traced.stride()


@pytest.mark.parametrize("name", ["attention", "portable"])
def test_opcheck(name):
    q = lying((0, 2, 1), (2, 3, 5, 8)).requires_grad_()
    torch.library.opcheck(operator(name).default, (q, q, q, *arguments(AS_GIVEN, 3), True))


@pytest.mark.parametrize("name", ["attention_extended", "portable_extended"])
def test_extended_operators(name):
    shape = (2, 3, 5, 8)
    q = lying((2, 0, 1), shape)
    sinks = torch.randn(3)
    rest = (None, None, None, None, sinks, *[None] * 5, AS_GIVEN, 1, -1, -1, 0.5, 0.0, 0.0, 1, 1, -1, -1)
    out, lse = operator(f"{name}_forward")(q, q, q, *rest, True)
    expected, expected_lse = fae.flash_attention(
        q, q, q, True, layout="bhsd", scale=0.5, sinks=sinks, return_lse=True
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse.float(), expected_lse)
    grads = operator(f"{name}_backward")(out, None, q, q, q, out, lse, *rest, False, False, True)
    assert all(t.stride() == expected_strides((2, 0, 1), shape) for t in (out, *grads[:3]))


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 8), (1, 3, 5, 8), (2, 1, 5, 8), (2, 3, 1, 8), (1, 1, 1, 8), (2, 3, 0, 8)], ids=str
)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_function_follows_torch(order, shape):
    """Also where axes have one entry, whose strides mean nothing, or none."""
    q = lying(order, shape).requires_grad_()
    with torch.no_grad():
        theirs, ours = (
            f(q, q, q) for f in (F.scaled_dot_product_attention, fae.scaled_dot_product_attention)
        )
    if 1 not in shape and 0 not in shape:
        assert ours.stride() == theirs.stride()
    ours = fae.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(ours, theirs)
    torch.autograd.grad(ours.sum(), q)


@pytest.mark.parametrize("backend", ["cpu", "portable", "standard"])
@pytest.mark.parametrize("dims", [(8, 8), (8, 6)], ids=str)
def test_every_backend(backend, dims):
    """Another dim_v has a contiguous result, as in torch."""
    q, v = lying((0, 2, 1), (2, 3, 5, dims[0])), lying((0, 2, 1), (2, 3, 5, dims[1]))
    theirs = F.scaled_dot_product_attention(q, q, v)
    try:
        fae.set_backend(backend)
        ours = fae.scaled_dot_product_attention(q, q, v)
    finally:
        fae.set_backend("auto")
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs)


def test_expanded_and_overlapping_queries():
    for q in (
        torch.randn(1, 3, 5, 8).expand(2, 3, 5, 8),
        torch.randn(80).as_strided((2, 3, 5, 8), (7, 5, 3, 1)),
    ):
        torch.testing.assert_close(
            fae.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q)
        )


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(order, dynamic):
    """The compiler's strides are those of the kernels, forward and backward."""

    def both(q, k):
        return fae.scaled_dot_product_attention(q * 2, k, k, is_causal=True).transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for seq in (5, 9):
        q, k = (lying(order, (2, 3, seq, 8)).requires_grad_() for _ in range(2))
        results = []
        for function in (both, compiled):
            out = function(q, k)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k))))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


def test_no_other_layout():
    q = torch.randn(2, 3, 5, 8)
    with pytest.raises(ValueError, match="layout"):
        fae.flash_attention(q, q, q, layout="bhds")
    with pytest.raises(RuntimeError, match="layout is 3"):
        torch.ops.flash_attn_ext.attention_forward(q, q, q, *arguments(3, 3), True)
