"""Dropout: which weights are kept is a function of the seed and of their place, on every path."""

from __future__ import annotations

import math

import numpy as np
import philox as oracle
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flash_attn_ext as fae
from flash_attn_ext import _philox

# Random123's known answers of Philox4x32 with 7 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]
STATES = [(0, 0), (1, 0), (0, 1), (-1, -1), (2**63 - 1, -(2**63)), (-5_000_000_000, 123_456_789_012)]


def qkv(*shape, kv=None, dtype=torch.float64, grad=False):
    shapes = (shape, kv or shape, kv or shape)
    return [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    as_tensors = [[torch.tensor(n) for n in part] for part in (counter, key)]
    assert tuple(int(w) for w in _philox.philox(*as_tensors)) == words
    assert tuple(int(w) for w in oracle.philox(counter, key)) == words


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("p", [0.0, 1e-12, 0.1, 0.5, 0.999, 1 - 2**-40])
def test_the_mask_is_the_definition(state, p):
    state = torch.tensor(state)
    for sizes in ((2, 3, 7, 13), (1, 1, 1, 4), (3, 2, 5, 1), (1, 2, 0, 5), (1, 1, 3, 0)):
        ours, theirs = fae.testing.dropout_mask(state, *sizes, p), oracle.keep_mask(state, *sizes, p)
        assert ours.dtype == torch.bool and torch.equal(ours, theirs)


def test_a_tile_is_a_part_of_the_whole():
    key = _philox.call_key(torch.tensor([7, 8]))
    whole = _philox.keep_tile(key, 0.4, range(3), range(5), range(40), range(50))
    for b, h, i, j in [
        ((0, 3), (0, 5), (3, 9), (1, 2)),
        ((1, 2), (4, 5), (0, 40), (5, 50)),
        ((2, 3), (1, 3), (39, 40), (7, 43)),
    ]:
        tile = _philox.keep_tile(key, 0.4, range(*b), range(*h), range(*i), range(*j))
        assert torch.equal(tile, whole[slice(*b), slice(*h), slice(*i), slice(*j)])


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8])
def test_statistics(p):
    """Kept as often as 1 - p says, in every row, column, head and batch, and independently of the neighbours."""
    shape = (4, 4, 256, 256)
    kept = fae.testing.dropout_mask(torch.tensor([11, 22]), *shape, p).double()
    spread = math.sqrt(p * (1 - p))
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):
        share = kept.mean(axes)
        count = kept.numel() / share.numel()
        assert (share - (1 - p)).abs().max() < 5 * spread / math.sqrt(count), axes
    centred = (kept - (1 - p)) / spread
    for axis in range(4):
        for step in (1, 2, 3):
            pairs = centred.narrow(axis, step, shape[axis] - step) * centred.narrow(
                axis, 0, shape[axis] - step
            )
            assert pairs.mean().abs() < 5 / math.sqrt(pairs.numel()), (axis, step)


def test_seeds_and_offsets_differ():
    masks = [fae.testing.dropout_mask(torch.tensor(state), 1, 1, 64, 64, 0.5) for state in STATES]
    for n, mask in enumerate(masks):
        for other in masks[n + 1 :]:
            assert 0.45 < (mask == other).double().mean() < 0.55


def test_torch_seeds_it(extended_target):
    q, k, v = qkv(1, 20, 2, 8)
    call = lambda: fae.flash_attention(q, k, v, dropout_p=0.5, backend=extended_target.backend)  # noqa: E731
    torch.manual_seed(1)
    state = fae.testing.next_rng_state()
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(fae.testing.next_rng_state(), state)
    assert torch.equal(call(), first) and torch.equal(call(), second) and not torch.equal(first, second)


def test_without_dropout_no_generator_is_touched(extended_target):
    q, k, v = qkv(1, 20, 2, 8, grad=True)
    before = torch.get_rng_state()
    for options in ({}, {"dropout_p": 0.0}, {"dropout_p": 0, "sinks": torch.zeros(2)}):
        fae.flash_attention(q, k, v, backend=extended_target.backend, **options).sum().backward()
    fae.explain(q, k, v, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_path_keeps_the_same(extended_target):
    """Whatever the tiles, the threads, the layout and the backend, with and without grad, into `out`."""
    q, k, v = qkv(2, 45, 4, 8, kv=(2, 70, 2, 8))
    backend = extended_target.backend

    def call(*tensors, **options):
        torch.manual_seed(5)
        return fae.flash_attention(*tensors, dropout_p=0.4, causal=True, **{"backend": backend, **options})

    expected = call(q, k, v, backend="standard")
    leaf = q.clone().requires_grad_()
    swapped = [t.transpose(1, 2) for t in (q, k, v)]
    others = [
        call(q, k, v), call(leaf, k, v).detach(), call(q, k, v, out=torch.empty_like(q)), call(q, k, v, return_lse=True)[0],
        call(*swapped, layout="bhsd").transpose(1, 2), call(q, k, v, batch_invariant=True),
        *(call(q, k, v, config=fae.AttentionConfig(block_q=bq, block_kv=bk)) for bq, bk in ((1, 3), (16, 24), (7, 70))),
    ]  # fmt: skip
    torch.set_num_threads(1)
    for other in [*others, call(q, k, v)]:
        torch.testing.assert_close(other, expected)


def test_backward_uses_what_forward_drew(extended_target):
    q, k, v = qkv(1, 30, 2, 8, grad=True)
    torch.manual_seed(3)
    kept = fae.testing.dropout_mask(fae.testing.next_rng_state(), 1, 2, 30, 30, 0.3)
    out = fae.flash_attention(q, k, v, dropout_p=0.3, backend=extended_target.backend)
    torch.manual_seed(99)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    weights = torch.softmax(heads[0] @ heads[1].mT / math.sqrt(8), -1) * kept / 0.7
    plain = torch.autograd.grad((weights @ heads[2]).square().sum(), (q, k, v))
    torch.testing.assert_close(grads, plain)


def test_gradcheck(extended_target):
    q, k, v = qkv(1, 5, 2, 3, kv=(1, 7, 1, 3), grad=True)
    bias = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)

    def fn(q, k, v, bias):
        torch.manual_seed(4)
        return fae.flash_attention(
            q, k, v, bias=bias, softcap=2.0, dropout_p=0.4, return_lse=True, backend=extended_target.backend
        )

    assert torch.autograd.gradcheck(fn, (q, k, v, bias))


def test_the_mean_is_attention_without_dropout(extended_target):
    q, k, v = qkv(1, 4, 1, 8, kv=(1, 12, 1, 8))
    plain = fae.flash_attention(q, k, v)
    many_q, many_k, many_v = (t.expand(400, -1, -1, -1) for t in (q, k, v))
    outs = [
        fae.flash_attention(many_q, many_k, many_v, dropout_p=0.5, backend=extended_target.backend)
        for _ in range(5)
    ]
    outs = torch.cat(outs)
    error = (outs.mean(0) - plain[0]).abs() / (outs.std(0) / math.sqrt(len(outs)))
    assert error.max() < 5


def test_lse_is_without_dropout(extended_target):
    q, k, v = qkv(1, 9, 2, 8)
    _, lse = fae.flash_attention(q, k, v, dropout_p=0.9, return_lse=True, backend=extended_target.backend)
    torch.testing.assert_close(lse, fae.flash_attention(q, k, v, return_lse=True)[1])


def test_checkpoint(extended_target):
    q, k, v = qkv(1, 30, 2, 8, grad=True)

    def fn(q, k, v):
        return fae.flash_attention(q, k, v, dropout_p=0.3, backend=extended_target.backend).square()

    results = []
    for run in (fn, lambda *x: checkpoint(fn, *x, use_reentrant=False)):
        torch.manual_seed(6)
        results.append(torch.autograd.grad(run(q, k, v).sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiled_calls_draw_anew(engine):
    torch._dynamo.reset()
    q, k, v = qkv(1, 30, 2, 8, grad=True)
    fn = torch.compile(lambda *x: fae.flash_attention(*x, dropout_p=0.5), fullgraph=True, backend=engine)
    ones = torch.ones(1, 30, 2, 8, dtype=torch.float64)  # of values 1: what is kept, up to the weights
    torch.manual_seed(1)
    first, second = fn(q, k, v), fn(q, k, v)
    torch.manual_seed(1)
    again = fn(q, k, v)
    assert torch.equal(first, again) and not torch.equal(first, second)
    leaf = ones.requires_grad_()
    out = fn(torch.zeros_like(q), k, leaf)
    (dv,) = torch.autograd.grad(out[0, 3].sum(), leaf)
    # With equal weights, row 3 is the share that it keeps: the gradient of the values has it in the same places.
    torch.testing.assert_close(dv[0, :, 0].sum(0), out[0, 3, 0] * torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
@pytest.mark.parametrize("saving", ["nothing", "checkpoint", "budget"])
def test_compiled_calls_draw_as_eager_ones(engine, saving):
    """One seed, one mask, forward and backward, also where a compiled graph computes again what it did not
    keep."""

    def layer(x, k, v):
        return fae.flash_attention(x.sin(), k, v, dropout_p=0.5).tanh()

    def model(x, k, v):
        for _ in range(3):
            x = checkpoint(layer, x, k, v, use_reentrant=False) if saving == "checkpoint" else layer(x, k, v)
        return x

    given = qkv(1, 40, 2, 8, dtype=torch.float32, grad=True)
    budget = 0.5 if saving == "budget" else 1.0
    with torch._functorch.config.patch(activation_memory_budget=budget):
        results = []
        for function in (model, torch.compile(model, fullgraph=True, backend=engine)):
            torch.manual_seed(3)
            out = function(*given)
            results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("value", "kind", "pattern"),
    [(1.0, ValueError, r"\[0, 1\).*1\.0"), (-0.1, ValueError, "-0.1"), (math.nan, ValueError, "nan"), (2, ValueError, "2"),
     (math.inf, ValueError, "inf"), ("0.5", TypeError, "str"), (True, TypeError, "bool"), (None, TypeError, "NoneType"), ([0.5], TypeError, "list")],
)  # fmt: skip
def test_wrong_probabilities(value, kind, pattern):
    q, k, v = qkv(1, 5, 2, 4)
    before = torch.get_rng_state()
    for function in (fae.flash_attention, fae.explain):
        with pytest.raises(kind, match=f"dropout_p.*{pattern}"):
            function(q, k, v, dropout_p=value)
    assert torch.equal(torch.get_rng_state(), before)


def test_probabilities_of_numpy():
    q, k, v = qkv(1, 5, 2, 4)
    results = []
    for p in (0.25, np.float32(0.25), np.float64(0.25)):
        torch.manual_seed(0)
        results.append(fae.flash_attention(q, k, v, dropout_p=p))
        results.append(fae.scaled_dot_product_attention(q, k, v, dropout_p=p))
    assert all(torch.equal(a, b) for a, b in zip(results, results[:2] * 3, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q: fae.flash_attention(q, q.half(), q, dropout_p=0.5),
        lambda q: fae.flash_attention(q, q, q, dropout_p=0.5, mask=torch.ones(7, 7, dtype=torch.bool)),
        lambda q: fae.flash_attention(q, q, q, dropout_p=0.5, scale=float("nan")),
        lambda q: fae.flash_attention(q, q, q, dropout_p=0.5, backend="cuda"),
        lambda q: fae.flash_attention(q.requires_grad_(), q, q, dropout_p=0.5, out=torch.empty_like(q)),
        lambda q: fae.flash_attention_varlen(*[q[0]] * 3, *[torch.tensor([0, 9])] * 2, dropout_p=0.5),
        lambda q: fae.scaled_dot_product_attention(q, q.half(), q, dropout_p=0.5),
    ],
)
def test_what_raises_draws_nothing(wrong):
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        wrong(torch.zeros(1, 3, 2, 4))
    assert torch.equal(torch.get_rng_state(), state)
