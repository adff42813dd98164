"""`scaled_dot_product_attention` against torch's, under all of torch's rules."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from reference import SLACK_ULPS, attend, largest, ulp
from torch.nn.attention import bias

import flash_attn_ext as fae
from flash_attn_ext import sdpa

# (query, key, value) shapes that torch takes.
SHAPES = [
    ((2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 16)),
    ((1, 1, 1, 64), (1, 1, 300, 64), (1, 1, 300, 64)),
    ((2, 4, 47, 16), (2, 4, 33, 16), (2, 4, 33, 24)),
    ((33, 16), (47, 16), (47, 8)),
    ((4, 33, 16), (4, 47, 16), (4, 47, 16)),
    ((2, 1, 3, 4, 9, 8), (2, 1, 3, 4, 11, 8), (2, 1, 3, 4, 11, 6)),
    ((0, 4, 9, 8), (0, 4, 11, 8), (0, 4, 11, 8)),
    ((2, 4, 0, 8), (2, 4, 11, 8), (2, 4, 11, 8)),
    ((2, 4, 9, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
]


def shape_id(shapes):
    return "-".join("x".join(map(str, s)) for s in shapes)


def inputs(shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


def compare(leaves, *, extra=(), **kwargs):
    """Ours and torch's output and gradients, each no further from fp64 than torch's plus the last bits."""
    leaves = [*leaves, *extra]
    results = []
    wide_leaves = [x.detach().double().requires_grad_() for x in leaves]
    for fn, xs in [
        (F.scaled_dot_product_attention, wide_leaves),
        (F.scaled_dot_product_attention, leaves),
        (fae.scaled_dot_product_attention, leaves),
    ]:
        options = dict(kwargs, attn_mask=xs[3]) if extra else kwargs
        out = fn(*xs[:3], **options)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, xs, weight)])
    for name, exact, theirs, ours in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert torch.equal(torch.isfinite(ours), torch.isfinite(exact)), name
        # dq of one key, or dmask of a broadcast mask, is a sum that cancels: no smaller than what it adds up.
        size = max(largest(exact), 1.0 if name in ("dq", "dk", "dmask") else 0.0)
        allowed = 2 * (largest(theirs.double() - exact) + SLACK_ULPS[ours.dtype] * ulp(size, ours.dtype))
        assert largest(ours.double() - exact) <= allowed, name


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shapes", SHAPES, ids=shape_id)
def test_against_torch(shapes, causal, dtype, cpu_target):
    compare(inputs(shapes, dtype), is_causal=causal)


MASKS = [
    (33, 47),
    (1, 47),
    (33, 1),
    (4, 33, 47),
    (4, 1, 47),
    (2, 1, 33, 47),
    (2, 4, 33, 47),
    (2, 1, 1, 47),
    (1, 1),
]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_bool_masks(shape, cpu_target):
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    compare(inputs(SHAPES[0]), attn_mask=mask)
    compare(inputs(SHAPES[0], torch.bfloat16), attn_mask=mask)


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_float_masks_and_their_gradients(shape, cpu_target):
    compare(inputs(SHAPES[0]), extra=[torch.randn(shape).requires_grad_()])
    hidden = torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -math.inf)
    hidden[..., 0] = 0.0
    out = fae.scaled_dot_product_attention(*inputs(SHAPES[0]), attn_mask=hidden)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs(SHAPES[0]), attn_mask=hidden))


def test_one_dimensional_masks_broadcast():
    """torch takes them on some paths only; here they broadcast as everywhere."""
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    for mask in (torch.arange(47) < 40, torch.randn(47), torch.tensor(0.5)):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(33, 47))
        torch.testing.assert_close(fae.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)


def test_fully_masked_rows_are_zero_as_in_torch(cpu_target):
    q, k, v = inputs(SHAPES[0])
    mask = torch.ones(33, 47, dtype=torch.bool)
    mask[5:9] = False
    ours, theirs = (
        f(q, k, v, attn_mask=mask) for f in (fae.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    assert torch.equal(ours[..., 5:9, :], torch.zeros(2, 4, 4, 16))
    torch.testing.assert_close(ours, theirs)


def test_causal_is_top_left():
    q, k, v = inputs([(1, 1, 3, 8), (1, 1, 5, 8), (1, 1, 5, 8)])
    out = fae.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, 0])
    q, k, v = (x.detach().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(attend(q, k, v, causal="top_left").out.float(), out.detach().transpose(1, 2))


@pytest.mark.parametrize("strict", [None, False, True])
@pytest.mark.parametrize("make", [bias.causal_upper_left, bias.causal_lower_right])
def test_masks_that_only_stand_for_a_triangle(make, strict):
    """Nothing was ever written into their memory."""
    q, k, v = (torch.randn(1, 2, n, 8) for n in (4, 6, 6))
    mask = make(4, 6)
    call, context = F.scaled_dot_product_attention, fae.use_flash_attention(strict=bool(strict))
    if strict is None:
        call, context = fae.scaled_dot_product_attention, contextlib.nullcontext()
    with context:
        got = call(q, k, v, attn_mask=mask)
    assert type(got) is torch.Tensor and sdpa._why_torch(q, k, v, mask) is None
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    with pytest.raises(ValueError, match="attn_mask"):
        fae.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True)
    for backend in ("auto", "portable"):
        with pytest.raises(TypeError, match="bias .*CausalBias.*causal"):
            fae.flash_attention(q, k, v, layout="bhsd", bias=mask, backend=backend)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0, 2.0])
def test_scale(scale):
    compare(inputs(SHAPES[0]), scale=scale)


@pytest.mark.parametrize(("heads_q", "heads_kv"), [(4, 2), (8, 1), (6, 3), (4, 4)])
def test_enable_gqa(heads_q, heads_kv, cpu_target):
    shapes = [(2, heads_q, 9, 16), (2, heads_kv, 21, 16), (2, heads_kv, 21, 16)]
    compare(inputs(shapes), enable_gqa=True)
    compare(inputs(shapes), enable_gqa=True, attn_mask=torch.rand(2, heads_q, 9, 21) < 0.9)


def test_batch_dims_broadcast_as_in_torch():
    compare(inputs([(2, 3, 9, 8), (1, 3, 11, 8), (1, 3, 11, 8)]))
    compare(inputs([(2, 3, 9, 8), (2, 1, 11, 8), (2, 1, 11, 8)]))
    compare(inputs([(3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8)]))


def test_mask_of_a_call_with_many_leading_dims():
    shapes = [(2, 5, 3, 9, 8), (2, 5, 3, 11, 8), (2, 5, 3, 11, 8)]
    for shape in [(9, 11), (3, 9, 11), (5, 1, 9, 11), (2, 1, 3, 1, 11), (2, 5, 3, 9, 11)]:
        mask = torch.rand(shape) < 0.8
        mask[..., 0] = True
        compare(inputs(shapes), attn_mask=mask)
        compare(inputs(shapes), extra=[torch.randn(shape).requires_grad_()])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_strides_of_the_result_follow_torch(order, grad):
    q, k, v = inputs([(2, 3, 5, 8)] * 3 if order == "bhsd" else [(2, 5, 3, 8)] * 3)
    if order == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not grad:
        q, k, v = (x.detach() for x in (q, k, v))
    theirs, ours = (f(q, k, v) for f in (F.scaled_dot_product_attention, fae.scaled_dot_product_attention))
    assert ours.stride() == theirs.stride()


def test_many_axes_give_a_contiguous_result_as_in_torch():
    for q in (torch.randn(2, 3, 6, 4, 8).transpose(2, 3), torch.randn(3, 2, 4, 6, 8).transpose(0, 1)):
        theirs, ours = (
            f(q, q, q) for f in (F.scaled_dot_product_attention, fae.scaled_dot_product_attention)
        )
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(9, 8), (3, 9, 8)], ids=str)
def test_strided_inputs_of_few_axes(shape):
    """A slice of columns, and a transposed matrix."""
    for q in (torch.randn(*shape[:-1], 16)[..., :8], torch.randn(*shape[:-2], 8, 9).mT):
        assert not q.is_contiguous()
        compare([q.detach().requires_grad_() for _ in range(3)])
        got = fae.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, q, q, is_causal=True))


def test_strided_inputs():
    packed = torch.randn(2, 33, 3, 4, 16, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    for fn in (fae.scaled_dot_product_attention, F.scaled_dot_product_attention):
        packed.grad = None
        fn(q, k, v, is_causal=True).square().sum().backward(retain_graph=True)
        if fn is fae.scaled_dot_product_attention:
            ours = packed.grad
    torch.testing.assert_close(ours, packed.grad, rtol=1e-5, atol=1e-5)


def test_a_scale_has_no_gradient():
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    for scale in (torch.tensor(0.5), torch.tensor(0.5, requires_grad=True)):
        for fn in (fae.scaled_dot_product_attention, F.scaled_dot_product_attention):
            if scale.requires_grad:
                with pytest.raises(TypeError, match=r"\bscale\b"):
                    fn(q, k, v, scale=scale)
            else:
                torch.testing.assert_close(fn(q, k, v, scale=scale), fn(q, k, v, scale=0.5))


def test_keyword_only_arguments_are_torchs():
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    expected = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.5)
    torch.testing.assert_close(
        fae.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.5), expected
    )
    same = fae.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=0.5, enable_gqa=False
    )
    torch.testing.assert_close(same, expected)


def test_jagged_hidden_values_are_not_read():
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    mask = torch.arange(47) < 40
    expected = fae.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    k[:, :, 40:], v[:, :, 40:] = math.nan, math.inf
    assert torch.equal(fae.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 0.9, 1.0, True])
def test_dropout(dropout_p):
    """The rule is torch's, which keeps what its own generator says; with 1 nothing is left, no gradient either."""
    leaves = inputs(SHAPES[2])
    torch.manual_seed(1)
    state = fae.testing.next_rng_state()
    out = fae.scaled_dot_product_attention(*leaves, dropout_p=dropout_p)
    grads = torch.autograd.grad(out.sum(), leaves)
    if dropout_p == 1.0:
        assert not any(t.any() for t in (out, *grads, F.scaled_dot_product_attention(*leaves, dropout_p=1.0)))
        return
    q, k, v = (x.detach().double() for x in leaves)
    kept = fae.testing.dropout_mask(state, 2, 4, 47, 33, dropout_p) / (1 - dropout_p)
    expected = (torch.softmax(q @ k.mT / 4, -1) * kept) @ v
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_dropout_of_many_batch_axes_and_heads():
    """No two of them drop the same weights, whatever strides make of the axes."""
    for permuted in (False, True):
        q = torch.zeros(3, 2, 4, 5, 64, 8)
        q = q.transpose(0, 1).contiguous().transpose(0, 1) if permuted else q
        v = torch.randn(5, 64, 8).expand(3, 2, 4, 5, 64, 8)
        out = fae.scaled_dot_product_attention(q, q, v, dropout_p=0.5)
        rows = out.flatten(0, 3).flatten(1)
        assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def jagged(heads, lengths, dim=8, seed=0):
    """(batch, heads, seq, dim) with a leaf behind it."""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, heads, dim, generator=g) for n in lengths]
    leaf = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    return leaf, leaf.transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [4, 2, 1])
def test_jagged_tensors(heads_kv, causal):
    leaf_q, q = jagged(4, [7, 1, 12])
    leaf_k, k = jagged(heads_kv, [7, 1, 12], seed=1)
    gqa = {"enable_gqa": heads_kv != 4}
    out = fae.scaled_dot_product_attention(q, k, k, is_causal=causal, **gqa)
    assert out.shape == q.shape and out.layout == torch.jagged
    out.values().square().sum().backward()
    for b, part in enumerate(out.unbind()):
        one_q, one_k = (t.unbind()[b].detach()[None].requires_grad_() for t in (q, k))
        expected = F.scaled_dot_product_attention(one_q, one_k, one_k, is_causal=causal, **gqa)
        torch.testing.assert_close(part, expected[0])
        expected.square().sum().backward()
        for leaf, one in ((leaf_q, one_q), (leaf_k, one_k)):
            torch.testing.assert_close(
                leaf.grad.unbind()[b], one.grad[0].transpose(0, 1), rtol=1e-5, atol=1e-5
            )


def test_jagged_tensors_that_do_not_go_together():
    (_, q), (_, k), (_, other) = jagged(4, [7, 1]), jagged(2, [7, 1]), jagged(4, [5, 3])
    for arguments, pattern in [
        ((q, k, k), "enable_gqa"), ((q, q, other), "value.*lengths"), ((q, torch.randn(2, 4, 9, 8), q), "key.*jagged"),
        ((q, jagged(4, [7, 1, 1])[1], jagged(4, [7, 1, 1])[1]), "sequences"), ((torch.randn(2, 4, 9, 8), q, q), "key.*dense"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=pattern):
            fae.scaled_dot_product_attention(*arguments)


BAD = {
    "mask-and-causal": (dict(attn_mask=torch.ones(33, 47, dtype=torch.bool), is_causal=True), "attn_mask"),
    "mask-int": (dict(attn_mask=torch.ones(33, 47, dtype=torch.int32)), "attn_mask.*int32"),
    "mask-shape": (dict(attn_mask=torch.ones(33, 48, dtype=torch.bool)), r"attn_mask.*\(33, 48\)"),
    "mask-heads": (dict(attn_mask=torch.zeros(3, 33, 47)), r"attn_mask.*\(3, 33, 47\)"),
    "mask-list": (dict(attn_mask=[1]), "attn_mask.*list"),
    "dropout-2": (dict(dropout_p=2.0), "dropout_p.*2"),
    "dropout-negative": (dict(dropout_p=-0.1), "dropout_p.*-0.1"),
    "dropout-nan": (dict(dropout_p=math.nan), "dropout_p.*nan"),
    "dropout-text": (dict(dropout_p="0.1"), "dropout_p.*str"),
    "scale-nan": (dict(scale=math.nan), "scale.*nan"),
    "causal-text": (dict(is_causal="top_left"), "is_causal.*top_left"),
    "causal-none": (dict(is_causal=None), "is_causal.*None"),
    "gqa-int": (dict(enable_gqa=1), "enable_gqa.*1"),
    "key-dim": (dict(key=torch.randn(2, 4, 47, 8)), r"key.*\(2, 4, 47, 8\)"),
    "value-seq": (dict(value=torch.randn(2, 4, 46, 16)), r"value.*\(2, 4, 46, 16\)"),
    "value-dtype": (dict(value=torch.randn(2, 4, 47, 16).double()), "value.*float64"),
    "query-rank": (
        dict(query=torch.randn(16), key=torch.randn(16), value=torch.randn(16)),
        r"query.*\(16,\)",
    ),
    "query-type": (dict(query=[1.0]), "query.*list"),
    "heads-without-gqa": (dict(query=torch.randn(2, 8, 33, 16)), r"key.*\(2, 4, 47, 16\)|enable_gqa"),
    "heads-ratio": (
        dict(query=torch.randn(2, 6, 33, 16), enable_gqa=True),
        r"\(2, 4, 47, 16\)|\(2, 6, 33, 16\)",
    ),
    "int": (dict(query=torch.ones(2, 4, 33, 16, dtype=torch.int32)), "query.*int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input(name):
    changes, pattern = BAD[name]
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    with pytest.raises(RuntimeError, match=pattern) as raised:  # as torch's, and of the kind it is
        fae.scaled_dot_product_attention(**{"query": q, "key": k, "value": v, **changes})
    assert isinstance(raised.value, (ValueError, TypeError, NotImplementedError))
