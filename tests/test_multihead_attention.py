"""`nn.MultiheadAttention` against torch's module."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import flash_attn_ext as fae
from flash_attn_ext.nn import MultiheadAttention, replace_multihead_attention

EMBED, HEADS, BATCH, SEQ_Q, SEQ_KV = 16, 4, 2, 5, 7
KINDS = {
    "plain": {},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "widths": {"kdim": 6, "vdim": 10},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 16, "vdim": 9},
}
# torch says that masks of different types are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")


def pair(dtype=torch.float32, **options):
    """torch's module and ours with its parameters, none of them 0."""
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.4)
    ours = MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    return theirs, ours


def inputs(dtype=torch.float32, batch_first=True, batched=True, kdim=EMBED, vdim=EMBED, **_):
    sizes = ((SEQ_Q, EMBED), (SEQ_KV, kdim), (SEQ_KV, vdim))
    if batched:
        sizes = [(BATCH, s, w) if batch_first else (s, BATCH, w) for s, w in sizes]
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def attn_masks(dtype, batch=BATCH):
    """None, bool and floating, of both ranks. Every query sees its first key."""
    result = {"none": None}
    for name, shape in (("2d", (SEQ_Q, SEQ_KV)), ("3d", (batch * HEADS, SEQ_Q, SEQ_KV))):
        hidden = torch.rand(shape) < 0.4
        hidden[..., 0] = False
        result["bool-" + name] = hidden
        result["float-" + name] = torch.randn(shape, dtype=dtype).masked_fill(hidden, -math.inf)
    return result


def padding_masks(dtype):
    hidden = torch.arange(SEQ_KV) >= torch.tensor([[4], [SEQ_KV]])
    values = torch.randn(BATCH, SEQ_KV, dtype=dtype)
    return {
        "none": None,
        "bool": hidden,
        "inf": torch.zeros_like(values).masked_fill(hidden, -math.inf),
        "float": values.masked_fill(hidden, -math.inf),
    }


def results(module, leaves, **arguments):
    """Output, weights and all gradients; both results take part in them."""
    out, weights = module(*leaves, **arguments)
    total = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    if weights is not None:
        total = (
            total
            + (weights * torch.linspace(-1, 1, weights.numel(), dtype=out.dtype).view(weights.shape)).sum()
        )
    named = dict(module.named_parameters())
    masks = {n: m for n, m in arguments.items() if isinstance(m, torch.Tensor) and m.requires_grad}
    sources = [*leaves, *named.values(), *masks.values()]
    grads = torch.autograd.grad(total, sources, materialize_grads=True)
    names = ("query", "key", "value", *named, *masks)
    return {"out": out, "weights": weights, **dict(zip(names, grads, strict=True))}


def same(theirs, ours, **tolerance):
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            tolerance = tolerance or ({"rtol": 1e-4, "atol": 2e-5} if expected.dtype == torch.float32 else {})
            torch.testing.assert_close(ours[name], expected, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_parameters_and_state_dicts(kind):
    made = []
    for module in (torch.nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(3)
        made.append(module(EMBED, HEADS, **KINDS[kind]))
    theirs, ours = (m.state_dict() for m in made)
    assert list(theirs) == list(ours) and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    for a, b in (made, made[::-1]):
        assert str(a.load_state_dict(b.state_dict())) == "<All keys matched successfully>"
    assert isinstance(made[1], torch.nn.MultiheadAttention) and repr(made[1]) == repr(made[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_masks(kind, dtype):
    """Every product of an attn_mask and a key_padding_mask, with weights and without, in both orders of axes."""
    turns = itertools.cycle([True, False])
    for batch_first in (True, False):
        options = {**KINDS[kind], "batch_first": batch_first}
        theirs, ours = pair(dtype, **options)
        leaves = inputs(dtype, **options)
        for attn_mask, padding in itertools.product(
            attn_masks(dtype).values(), padding_masks(dtype).values()
        ):
            masks = {"attn_mask": attn_mask, "key_padding_mask": padding}
            masks |= {"need_weights": next(turns), "average_attn_weights": batch_first}
            expected, got = (results(m, leaves, **masks) for m in (theirs, ours))
            same(expected, got)
            assert batch_first or got["out"].is_contiguous()
        next(turns)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("width", [1022, 1023, 1024])
def test_floating_masks_of_both_kinds_beside_the_widest_heads(width, axes):
    """Scores of keys take two columns of the keys, where there are any left."""
    theirs = torch.nn.MultiheadAttention(width, 1, batch_first=True)
    ours = MultiheadAttention(width, 1, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, width)
    masks = dict(attn_mask=torch.randn((2, 5, 5)[-axes:]), key_padding_mask=torch.randn(2, 5))
    got, want = (module(x, x, x, **masks, need_weights=False)[0] for module in (ours, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_of_masks(need_weights):
    theirs, ours = pair(torch.float64, batch_first=True)
    leaves = inputs(torch.float64)
    attn_mask = torch.randn(SEQ_Q, SEQ_KV, dtype=torch.float64, requires_grad=True)
    padding = torch.randn(BATCH, SEQ_KV, dtype=torch.float64, requires_grad=True)
    for masks in ({"attn_mask": attn_mask}, {"key_padding_mask": padding},
                  {"attn_mask": attn_mask, "key_padding_mask": padding}):  # fmt: skip
        same(*(results(m, leaves, need_weights=need_weights, **masks) for m in (theirs, ours)))


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_without_batch(kind):
    theirs, ours = pair(**KINDS[kind])
    leaves = inputs(batched=False, **KINDS[kind])
    padding = torch.arange(SEQ_KV) >= 5
    for need_weights, attn_mask in itertools.product(
        (True, False), attn_masks(torch.float32, batch=1).values()
    ):
        masks = {"attn_mask": attn_mask, "key_padding_mask": padding, "need_weights": need_weights}
        same(*(results(m, leaves, average_attn_weights=False, **masks) for m in (theirs, ours)))


@pytest.mark.parametrize("kind", ["plain", "zero"])
@pytest.mark.parametrize("padded", [False, True])
def test_self_attention_with_the_causal_hint(padded, kind):
    theirs, ours = pair(**KINDS[kind], batch_first=True)
    x = torch.randn(BATCH, SEQ_Q, EMBED)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(SEQ_Q)
    masks = {"attn_mask": causal}
    if padded:
        masks["key_padding_mask"] = torch.zeros(BATCH, SEQ_Q).masked_fill(torch.arange(SEQ_Q) >= 3, -math.inf)
    for need_weights in (True, False):
        expected = theirs(x, x, x, **masks)
        got = ours(x, x, x, **masks, need_weights=need_weights, is_causal=True)
        torch.testing.assert_close(got[0], expected[0])
        assert not need_weights or torch.testing.assert_close(got[1], expected[1]) is None


def test_the_causal_mask_is_not_read_where_the_hint_is_enough():
    _, ours = pair(batch_first=True)
    x = torch.randn(BATCH, SEQ_Q, EMBED)
    unread = torch.full((SEQ_Q, SEQ_Q), math.nan)
    assert ours(x, x, x, attn_mask=unread, is_causal=True, need_weights=False)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    """No further from fp64 than torch's, and the types of results are torch's."""
    exact, _ = pair(torch.float64, batch_first=True)
    theirs = copy.deepcopy(exact).to(dtype)
    ours = replace_multihead_attention(copy.deepcopy(theirs))
    exact.load_state_dict(theirs.state_dict())
    leaves = [x.to(dtype) for x in inputs()]
    masks = padding_masks(dtype)
    attn_mask = attn_masks(dtype)["float-2d"]
    for need_weights, padding in itertools.product((True, False), masks.values()):
        wide = {
            "attn_mask": attn_mask.double(),
            "key_padding_mask": None if padding is None else padding.double(),
        }
        if padding is not None and padding.dtype == torch.bool:
            wide["key_padding_mask"] = padding
        expected = exact(*(x.double() for x in leaves), **wide)
        plain, got = (
            m(*leaves, attn_mask=attn_mask, key_padding_mask=padding, need_weights=need_weights)
            for m in (theirs, ours)
        )
        for e, p, g in zip(expected, plain, got, strict=True):
            if p is None:
                assert g is None
                continue
            assert g.dtype == p.dtype
            slack = torch.finfo(dtype).eps * e.abs().max()
            assert (g.double() - e).abs().max() <= 1.5 * (p.double() - e).abs().max() + slack


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights):
    theirs, ours = pair(batch_first=True, add_bias_kv=True)
    leaves = inputs()
    expected, got = [], []
    for module, into in ((theirs, expected), (ours, got)):
        with torch.autocast("cpu", torch.bfloat16):
            into += module(*leaves, need_weights=need_weights)
        into[0].float().sum().backward()
    for e, g in zip(expected, got, strict=True):
        assert e is g or (e.dtype == g.dtype and torch.allclose(e.float(), g.float(), atol=0.05))


def test_rows_that_see_nothing_are_zero():
    """torch gives NaN."""
    _, ours = pair(batch_first=True)
    leaves = inputs()
    padding = torch.tensor([[False] * SEQ_KV, [True] * SEQ_KV])
    attn_mask = torch.zeros(SEQ_Q, SEQ_KV, dtype=torch.bool)
    attn_mask[2] = True
    for need_weights in (True, False):
        for masks in ({"key_padding_mask": padding}, {"key_padding_mask": padding, "attn_mask": attn_mask}):
            out, weights = ours(*leaves, need_weights=need_weights, **masks)
            blind = torch.tensor([["attn_mask" in masks and i == 2 for i in range(SEQ_Q)], [True] * SEQ_Q])
            torch.testing.assert_close(out[blind], ours.out_proj.bias.expand(int(blind.sum()), -1))
            assert weights is None or not weights[blind].any()
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_hidden_keys_are_not_read():
    _, ours = pair(batch_first=True)
    q, k, v = (x.detach() for x in inputs())
    padding = torch.arange(SEQ_KV).expand(BATCH, -1) >= 5
    attn_mask = torch.rand(SEQ_Q, SEQ_KV) < 0.2
    for mask, need_weights in itertools.product((None, attn_mask, attn_mask.float()), (False, True)):
        masks = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        expected = ours(q, k, v, **masks)
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, 5:], bad_v[:, 5:] = math.nan, math.inf
        for e, g in zip(expected, ours(q, bad_k, bad_v, **masks), strict=True):
            assert e is g or torch.equal(e, g)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout(need_weights):
    _, ours = pair(torch.float64, batch_first=True, dropout=0.4)
    leaves = inputs(torch.float64)
    full, weights = ours.eval()(*leaves, average_attn_weights=False)
    ours.train()
    torch.manual_seed(1)
    state = fae.testing.next_rng_state()
    out, dropped = ours(*leaves, need_weights=need_weights, average_attn_weights=False)
    kept = fae.testing.dropout_mask(state, BATCH, HEADS, SEQ_Q, SEQ_KV, 0.4) / 0.6
    values = F.linear(leaves[2], *(t.chunk(3)[2] for t in (ours.in_proj_weight, ours.in_proj_bias)))
    heads = (weights * kept) @ values.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(out, ours.out_proj(heads.transpose(1, 2).flatten(2)))
    if need_weights:
        torch.testing.assert_close(dropped, weights * kept)
    ours.dropout = 1.0
    out, dropped = ours(*leaves, need_weights=need_weights)
    torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))
    ours.dropout = 1.5
    with pytest.raises(ValueError, match=r"dropout_p.*1\.5"):
        ours(*leaves, need_weights=need_weights)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_empty_sizes(sizes):
    batch, seq_q, seq_kv = sizes
    theirs, ours = pair(batch_first=True)
    q, kv = torch.randn(batch, seq_q, EMBED), torch.randn(batch, seq_kv, EMBED)
    for need_weights in (True, False):
        expected, got = (m.eval()(q, kv, kv, need_weights=need_weights) for m in (theirs, ours))
        for e, g in zip(expected, got, strict=True):
            assert e is g or torch.equal(e, g)


def bad(**changes):
    return changes


WRONG = {
    "query-rank": (bad(query=torch.randn(EMBED)), r"query.*\(16,\)"),
    "query-4d": (bad(query=torch.randn(1, BATCH, SEQ_Q, EMBED)), r"query.*\(1, 2, 5, 16\)"),
    "key-rank": (bad(key=torch.randn(SEQ_KV, EMBED)), r"key.*\(7, 16\)"),
    "value-rank": (bad(value=torch.randn(SEQ_KV, EMBED)), r"value.*\(7, 16\)"),
    "query-width": (bad(query=torch.randn(BATCH, SEQ_Q, 15)), r"query.*\(2, 5, 15\).*16"),
    "key-value": (bad(value=torch.randn(BATCH, 6, EMBED)), r"key.*\(2, 7, 16\).*value.*\(2, 6, 16\)"),
    "key-width": (bad(key=torch.randn(BATCH, SEQ_KV, 8), value=torch.randn(BATCH, SEQ_KV, 8)), r"key.*\(2, 7, 8\).*16"),
    "batch": (bad(key=torch.randn(3, SEQ_KV, EMBED), value=torch.randn(3, SEQ_KV, EMBED)), r"key.*\(3, 7, 16\)"),
    "dtype": (bad(query=torch.randn(BATCH, SEQ_Q, EMBED).double()), "query.*float64.*float32"),
    "padding-rank": (bad(key_padding_mask=torch.zeros(SEQ_KV) > 0), r"key_padding_mask.*\(7,\)"),
    "padding-batch": (bad(key_padding_mask=torch.zeros(3, SEQ_KV) > 0), r"key_padding_mask.*\(3, 7\).*\(2, 7\)"),
    "padding-seq": (bad(key_padding_mask=torch.zeros(BATCH, 8) > 0), r"key_padding_mask.*\(2, 8\).*\(2, 7\)"),
    "padding-int": (bad(key_padding_mask=torch.zeros(BATCH, SEQ_KV, dtype=torch.int64)), "key_padding_mask.*int64"),
    "mask-rank": (bad(attn_mask=torch.zeros(SEQ_KV) > 0), r"attn_mask.*\(7,\)"),
    "mask-2d": (bad(attn_mask=torch.zeros(SEQ_Q, 8)), r"attn_mask.*\(5, 8\).*\(5, 7\)"),
    "mask-3d": (bad(attn_mask=torch.zeros(BATCH, SEQ_Q, SEQ_KV)), r"attn_mask.*\(2, 5, 7\).*\(8, 5, 7\)"),
    "mask-int": (bad(attn_mask=torch.zeros(SEQ_Q, SEQ_KV, dtype=torch.int32)), "attn_mask.*int32"),
    "causal": (bad(is_causal=True), "attn_mask.*is_causal"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name):
    """The class of the exception is torch's."""
    changes, pattern = WRONG[name]
    theirs, ours = pair(batch_first=True)
    arguments = {**dict(zip(("query", "key", "value"), inputs(), strict=True)), **changes}
    with pytest.raises(Exception) as expected:
        theirs(**arguments)
    for need_weights in (True, False):
        with pytest.raises(expected.type, match=pattern):
            ours(**arguments, need_weights=need_weights)


@pytest.mark.parametrize("arguments", [(0, 4), (16, 0), (16, 5)], ids=str)
def test_wrong_construction(arguments):
    with pytest.raises((ValueError, AssertionError)) as expected:
        torch.nn.MultiheadAttention(*arguments)
    with pytest.raises(expected.type, match="embed_dim"):
        MultiheadAttention(*arguments)


def test_no_warnings():
    """Masks of different types are nothing that a user would have to be warned of."""
    _, ours = pair(batch_first=True)
    masks = {
        "attn_mask": attn_masks(torch.float32)["float-2d"],
        "key_padding_mask": padding_masks(torch.float32)["bool"],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(*inputs(), **masks)
