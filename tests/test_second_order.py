"""Gradients of gradients, against those of the unfused computation, which torch differentiates itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import functional, grad, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import hessian, jacfwd, jacrev, vjp, vmap
from torch.utils.checkpoint import checkpoint

import flash_attn_ext as fae
from flash_attn_ext import ops
from flash_attn_ext._options import Options

SEQ_Q, SEQ_KV = 5, 7
SOME = torch.rand(2, 1, SEQ_Q, SEQ_KV, generator=torch.Generator().manual_seed(1)) < 0.5
CASES = {
    "plain": {},
    "causal": dict(causal=True, window=(3, 1)),
    "top-left": dict(causal="top_left", scale=-0.4),
    "softcap": dict(softcap=1.5),
    "masks": dict(mask=SOME, kv_lengths=torch.tensor([7, 2])),
    "typed": dict(mask=fae.masks.DocumentMask(torch.arange(SEQ_Q) // 3, torch.arange(SEQ_KV) // 3)),
    "dropout": dict(dropout_p=0.4, causal=True),
    "blind rows": dict(mask=torch.arange(SEQ_Q)[:, None] > torch.tensor([1] * SEQ_KV)),
    "bhsd": dict(layout="bhsd"),
}
NAMES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
BACKENDS = ["cpu", "portable"]


def inputs(layout="bshd", dtype=torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, SEQ_Q, 4, 6), (2, SEQ_KV, 2, 6), (2, SEQ_KV, 2, 4), (4, 1, SEQ_KV), (4,), (4,)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    if layout == "bhsd":
        tensors[:3] = (t.transpose(1, 2).contiguous() for t in tensors[:3])
    return {name: t.requires_grad_() for name, t in zip(NAMES, tensors, strict=True)}


def second_order(values: dict, backend: str, *, return_lse=True, **options) -> tuple[torch.Tensor, ...]:
    """Of a function of all gradients, in all inputs."""
    torch.manual_seed(5)  # of the dropout
    out, lse = fae.flash_attention(**values, return_lse=True, backend=backend, **options)
    total = (out.double() * 3).sin().sum()
    if return_lse:  # rows without a key have -inf
        total = total + lse.double().masked_fill(lse == -math.inf, 0).square().sum()
    leaves = tuple(values.values())
    first = grad(total, leaves, create_graph=True)
    return grad(sum((g.double() * 2).cos().sum() for g in first), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("extended", [False, True], ids=["plain", "modified"])
def test_as_unfused(options, extended, backend):
    values = inputs(options.get("layout", "bshd"))
    if not extended:
        del values["alibi_slopes"], values["sinks"]
    got, want = (second_order(values, b, **options) for b in (backend, "standard"))
    for name, g, w in zip(values, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradgradcheck(backend):
    """By differences; of `out` alone, too."""
    q, k, v, bias, _, _ = inputs().values()

    def call(q, k, v, bias):
        return fae.flash_attention(q, k, v, True, bias=bias, softcap=3.0, backend=backend)

    assert gradgradcheck(call, (q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    """No worse than the unfused computation of the same dtype, against that of fp64."""
    values = inputs(dtype=dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in values.items()}
    want = second_order(exact, "standard", causal=True)
    got, unfused = (second_order(values, b, causal=True) for b in ("cpu", "standard"))
    for name, g, u, w in zip(values, got, unfused, want, strict=True):
        assert g.dtype == dtype
        allowed = 2 * (u.double() - w).abs().max() + 4 * torch.finfo(dtype).eps * w.abs().max()
        assert (g.double() - w).abs().max() <= allowed, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_hessians(backend):
    q, k, v = (t.detach()[:1, :3, :2] for t in list(inputs().values())[:3])

    def total(x, backend=backend):
        return fae.flash_attention(x, k[..., :2, :], v[..., :2, :], True, backend=backend).sin().sum()

    want = hessian(lambda x: total(x, "standard"))(q)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacrev, jacrev)):
        torch.testing.assert_close(outer(inner(total))(q), want)
    with pytest.raises(NotImplementedError, match="jacfwd of jacrev"):  # torch would return something wrong
        jacfwd(jacfwd(total))(q)
    vectors = torch.randn(4, *q.shape, dtype=q.dtype)
    got = vmap(lambda x: vjp(torch.func.grad(total), q)[1](x)[0])(vectors)
    torch.testing.assert_close(got, torch.stack([torch.tensordot(want, x, q.dim()) for x in vectors]))
    torch.testing.assert_close(functional.hessian(total, q), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend):
    """Sequences of no length, and rows behind the last one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 4, generator=g, dtype=torch.float64).requires_grad_() for n in (9, 11, 11))
    cu_q, cu_k = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 4, 6, 10], dtype=torch.int32)

    def both(backend):
        out = fae.flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True, backend=backend)
        first = grad(out.sin().sum(), (q, k, v), create_graph=True)
        return grad(sum(f.square().sum() for f in first), (q, k, v))

    got, want = both(backend), both("standard")
    torch.testing.assert_close(got, want)
    assert got[0][8:].eq(0).all() and got[1][10:].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_hidden_is_not_read(bad, backend):
    """Padding holds anything."""
    values = inputs()
    options = dict(kv_lengths=torch.tensor([6, 2]), mask=SOME)
    want = second_order(values, backend, **options)
    padding = torch.arange(SEQ_KV) >= options["kv_lengths"][:, None]
    for name in ("k", "v"):
        values[name] = values[name].detach().masked_fill(padding[..., None, None], bad).requires_grad_()
    got = second_order(values, backend, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("extended", [False, True], ids=["plain", "extended"])
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
def test_operators_themselves(return_lse, extended):
    """Also where the log-sum-exp has to be made again."""
    q, k, v, *_ = (t for t in inputs().values())
    family = ops.EXTENDED_BY_BACKEND if extended else ops.BY_BACKEND

    def both(call):
        first = grad(call().sin().sum(), (q, k, v), create_graph=True)
        return grad(sum(f.square().sum() for f in first), (q, k, v))

    options = Options(causal=1) if extended else Options(causal=1).plain()
    got = both(lambda: family["cpu"].attention(q, k, v, *options, return_lse)[0])
    want = both(lambda: fae.flash_attention(q, k, v, True, backend="standard"))
    torch.testing.assert_close(got, want)


def test_gradient_penalty_trains():
    """As in a training step: backward() of a loss that holds a gradient."""
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))

    def penalty(call):
        for t in (q, k, v):
            t.grad = None
        out = call()
        (g,) = grad(out.square().sum(), q, create_graph=True)
        (out.sum() + (g.norm() - 1) ** 2).backward()
        return [t.grad.clone() for t in (q, k, v)]

    got = penalty(lambda: fae.flash_attention(q, k, v, True))
    torch.testing.assert_close(got, penalty(lambda: fae.flash_attention(q, k, v, True, backend="standard")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_third_order_is_refused(backend):
    values = inputs()
    leaves = tuple(values.values())
    out = fae.flash_attention(**values, backend=backend)
    (first,) = grad(out.sin().sum(), values["q"], create_graph=True)
    for second in grad(first.sin().sum(), leaves, create_graph=True):
        with pytest.raises(NotImplementedError, match="third-order"):
            grad(second.sin().sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_with_vectors(backend):
    """hvp goes backward twice for the sake of the direction, which is no third order; hessian in batches."""
    values = inputs()
    leaves = tuple(t.detach() for t in values.values())
    directions = tuple(torch.randn_like(t) for t in leaves)

    def total(*tensors, backend=backend):
        call = dict(zip(NAMES, tensors, strict=True))
        out, lse = fae.flash_attention(**call, causal=True, return_lse=True, backend=backend)
        return out.sin().sum() + lse.sin().sum()

    def unfused(*tensors):
        return total(*tensors, backend="standard")

    for product in (functional.hvp, functional.vhp):
        torch.testing.assert_close(
            product(total, leaves, directions)[1], product(unfused, leaves, directions)[1]
        )
    batched = functional.hessian(total, leaves, vectorize=True)
    torch.testing.assert_close(batched, functional.hessian(unfused, leaves))
    moving = tuple(t.requires_grad_() for t in leaves)
    _, products = functional.hvp(total, moving, directions, create_graph=True)
    with pytest.raises(NotImplementedError, match="third-order"):
        products[0].sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["checkpoint", "save_on_cpu"])
def test_hooks_on_saved_tensors(way, backend):
    """They are asked to keep what the graph keeps, and are there again after it."""
    q = inputs()["q"].detach().requires_grad_()
    kept = []

    def gradient(q):
        out = fae.flash_attention(q, q, q, causal=True, backend=backend)
        return grad(out.square().sum(), q, create_graph=True)[0]

    def product(q):
        return grad(gradient(q).sin().sum(), q, create_graph=True)[0]

    def hooked(function):
        if way == "checkpoint":
            return checkpoint(function, q, use_reentrant=False)
        with save_on_cpu(), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            result = function(q)
            before = len(kept)
            torch.exp(q)
            assert 0 < before == len(kept) - 1
        return result

    torch.testing.assert_close(hooked(product), product(q))
    torch.testing.assert_close(*(grad(t.sin().sum(), q)[0] for t in (hooked(gradient), gradient(q))))
