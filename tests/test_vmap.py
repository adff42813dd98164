"""torch.func.vmap: what each sample's own call gives, without torch's warning of a loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_ext as fae

SAMPLES, BATCH, SEQ_Q, SEQ_KV = 3, 2, 5, 7
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True, window=(3, 0), softcap=2.0),
    "shared": dict(mask=torch.rand(4, SEQ_Q, SEQ_KV) < 0.7, bias=torch.randn(1, SEQ_KV), sinks=torch.randn(4)),
    "slopes": dict(alibi_slopes=torch.rand(4)),
    "typed": dict(mask=fae.masks.DocumentMask(torch.arange(SEQ_Q) // 2, torch.arange(SEQ_KV) // 3)),
}  # fmt: skip
OF_A_BATCH = {
    "mask": dict(mask=torch.rand(BATCH, 1, SEQ_Q, SEQ_KV) < 0.7),
    "kv_lengths": dict(kv_lengths=torch.tensor([3, 7])),
    "slopes": dict(alibi_slopes=torch.rand(BATCH, 4)),
    "dropout": dict(dropout_p=0.4),
}


def samples(rank=4, layout="bshd", axis=0, batch=BATCH) -> list[torch.Tensor]:
    """q, k, v with samples in `axis`."""
    g = torch.Generator().manual_seed(0)
    tensors = []
    for seq, heads, dim in ((SEQ_Q, 4, 8), (SEQ_KV, 2, 8), (SEQ_KV, 2, 6)):
        shape = {2: (seq, dim), 3: (seq, heads, dim), 4: (batch, seq, heads, dim)}[rank]
        t = torch.randn(SAMPLES, *shape, generator=g)
        t = t.transpose(-3, -2) if layout == "bhsd" and rank > 2 else t
        tensors.append(t.contiguous().movedim(0, axis))
    return tensors


def assert_as_each(call, tensors, axis=0) -> None:
    """vmap(call) gives what `call` gives of each sample; so for gradients, and no warning."""

    def total(*given):
        out, lse = call(*given)
        return out.sin().sum() + lse.square().sum()

    places = tuple(range(len(tensors)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = (*vmap(call, axis)(*tensors), *vmap(grad(total, places), axis)(*tensors))
    each = [[t.select(axis, n) for t in tensors] for n in range(SAMPLES)]
    want = [(*call(*one), *grad(total, places)(*one)) for one in each]
    for g, w in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(w))


@pytest.mark.parametrize("backend", ["cpu", "portable"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("rank", [4, 3])
def test_each_has_its_own(rank, layout, options, backend):
    assert_as_each(
        lambda q, k, v: fae.flash_attention(q, k, v, layout=layout, return_lse=True, backend=backend, **options),
        samples(rank, layout),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_head_and_other_axes(axis, layout):
    mask = torch.rand(SEQ_Q, SEQ_KV) < 0.7
    for rank in (2, 4):
        assert_as_each(
            lambda q, k, v: fae.flash_attention(q, k, v, layout=layout, mask=mask, return_lse=True),
            samples(rank, layout, axis),
            axis,
        )


@pytest.mark.parametrize("options", OF_A_BATCH.values(), ids=OF_A_BATCH)
def test_options_of_a_batch(options):
    def call(q, k, v):
        return fae.flash_attention(q, k, v, return_lse=True, **options)

    if "dropout_p" not in options:
        return assert_as_each(call, samples())
    tensors = samples()
    torch.manual_seed(0)
    got = vmap(call, randomness="same")(*tensors)
    for n in range(SAMPLES):
        torch.manual_seed(0)
        for g, w in zip(got, call(*(t[n] for t in tensors)), strict=True):
            torch.testing.assert_close(g[n], w)
    return None


def test_gradients_of_what_is_shared():
    """Each sample has its own, of a bias, of sinks, and of keys that all share."""
    tensors, bias, sinks = samples(), torch.randn(4, 1, SEQ_KV), torch.randn(4)
    k = tensors[1][0]

    def total(q, v, k, bias, sinks):
        return fae.flash_attention(q, k, v, bias=bias, sinks=sinks).sin().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call = grad(total, (0, 1, 2, 3, 4))
        got = vmap(call, (0, 0, None, None, None))(tensors[0], tensors[2], k, bias, sinks)
    want = [call(q, v, k, bias, sinks) for q, v in zip(tensors[0], tensors[2], strict=True)]
    for g, w in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(w))


class Shapes(TorchDispatchMode):
    """Those of q in every call of an operator of this package."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flash_attn_ext":
            self.seen.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


CALLS = {
    "plain": lambda a: fae.flash_attention(a, a, a),
    "sdpa": lambda a: fae.scaled_dot_product_attention(a, a, a, is_causal=True),
    "extended": lambda a: fae.flash_attention(a, a, a, sinks=torch.ones(a.shape[-2])),
    "portable": lambda a: fae.flash_attention(a, a, a, backend="portable", return_lse=True)[1],
    "packed": lambda a: fae.flash_attention_varlen(*[a[0]] * 3, torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5])),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_gradients_through_it(name):
    """A batched tensor does not tell whether what it holds requires grad."""
    call = CALLS[name]
    q = torch.randn(SAMPLES, BATCH, SEQ_Q, 2, 4, dtype=torch.double, requires_grad=True)
    factor = torch.ones((), dtype=torch.double, requires_grad=True)
    expected = torch.autograd.grad(sum(call(x * factor).sin().sum() for x in q), (q, factor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        through = torch.autograd.grad(vmap(lambda x: call(x * factor))(q).sin().sum(), (q, factor))
    torch.testing.assert_close(through, expected)
    torch.testing.assert_close(grad(lambda x: vmap(call)(x).sin().sum())(q), expected[0])
    with torch.no_grad():
        torch.testing.assert_close(vmap(call)(q), torch.stack([call(x) for x in q]))


def test_samples_are_one_call():
    """Not a loop; unless keys are shared, which would have to be repeated."""
    q, k, v = samples()
    with Shapes() as shapes:
        vmap(fae.flash_attention)(q, k, v)
    assert shapes.seen == [(SAMPLES * BATCH, SEQ_Q, 4, 8)]
    with Shapes() as shapes:
        vmap(fae.flash_attention, (0, None, None))(q, k[0], v[0])
    assert shapes.seen == [(BATCH, SEQ_Q, 4, 8)] * SAMPLES


def test_packed_and_none():
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v = samples(3)

    def call(q, k, v):
        return fae.flash_attention_varlen(q, k[:SEQ_Q], v[:SEQ_Q], starts, starts, return_lse=True)

    assert_as_each(call, (q, k, v))
    empty = [t[:0] for t in samples()]
    out, lse = vmap(lambda *t: fae.flash_attention(*t, return_lse=True))(*empty)
    assert out.shape == (0, BATCH, SEQ_Q, 4, 6) and lse.shape == (0, BATCH, 4, SEQ_Q)
