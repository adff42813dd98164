"""Wrong input raises before anything is written, and says which argument, what was given and what is allowed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import flash_attn_ext as fae

BATCH, SEQ_Q, SEQ_KV, HEADS_Q, HEADS_KV, DIM, DIM_V = 2, 5, 7, 4, 2, 8, 6
SENTINEL = 123.0


def valid() -> dict:
    """A call that works; each wrong call changes something in it."""
    return dict(
        q=torch.randn(BATCH, SEQ_Q, HEADS_Q, DIM),
        k=torch.randn(BATCH, SEQ_KV, HEADS_KV, DIM),
        v=torch.randn(BATCH, SEQ_KV, HEADS_KV, DIM_V),
    )


@dataclass
class Wrong:
    """Changes to the valid call, the exceptions allowed, and what the message must contain."""

    name: str
    changes: dict
    kind: type | tuple = ValueError
    argument: str | tuple = ""  # one of these names stands in the message
    contains: list = field(default_factory=list)
    own_out: bool = False


def zeros(*shape, dtype=torch.float32, **kw):
    return torch.zeros(shape, dtype=dtype, **kw)


def all_of(dtype):
    return {n: t.to(dtype) for n, t in valid().items()}


def _meta(name):
    return {name: valid()[name].to("meta")}


ANY = (ValueError, TypeError, NotImplementedError)
Q, K, V = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)
WRONG = [
    # Ranks.
    Wrong("q-rank-0", dict(q=zeros()), argument="q", contains=["()"]),
    Wrong("q-rank-1", dict(q=zeros(8)), argument="q", contains=["(8,)"]),
    Wrong("q-rank-5", dict(q=zeros(1, *Q)), argument="q", contains=["(1, 2, 5, 4, 8)"]),
    Wrong("all-rank-5", dict(q=zeros(1, *Q), k=zeros(1, *K), v=zeros(1, *V)), argument="q", contains=["(1, 2, 5, 4, 8)"]),
    Wrong("k-rank-3", dict(k=zeros(7, 2, 8)), argument="k", contains=["(7, 2, 8)"]),
    Wrong("v-rank-2", dict(v=zeros(7, 6)), argument="v", contains=["(7, 6)"]),
    Wrong("q-rank-3", dict(q=zeros(5, 4, 8)), argument=("q", "k"), contains=["(5, 4, 8)"]),
    Wrong("k-rank-9", dict(k=zeros(1, 1, 1, 1, 1, 1, 1, 1, 8)), argument="k", contains=["(1, 1, 1, 1, 1, 1, 1, 1, 8)"]),
    # Shapes that do not go together.
    Wrong("k-batch", dict(k=zeros(3, 7, 2, 8)), argument="k", contains=["(3, 7, 2, 8)"]),
    Wrong("v-batch", dict(v=zeros(1, 7, 2, 6)), argument="v", contains=["(1, 7, 2, 6)"]),
    Wrong("q-batch", dict(q=zeros(1, 5, 4, 8)), argument=("q", "k"), contains=["(1, 5, 4, 8)"]),
    Wrong("v-seq", dict(v=zeros(2, 6, 2, 6)), argument="v", contains=["(2, 6, 2, 6)"]),
    Wrong("v-heads", dict(v=zeros(2, 7, 1, 6)), argument="v", contains=["(2, 7, 1, 6)"]),
    Wrong("head-ratio", dict(k=zeros(2, 7, 3, 8), v=zeros(2, 7, 3, 6)), argument=("q", "k"), contains=["(2, 7, 3, 8)"]),
    Wrong("more-kv-heads", dict(k=zeros(2, 7, 8, 8), v=zeros(2, 7, 8, 6)), argument=("q", "k"), contains=["(2, 7, 8, 8)"]),
    Wrong("no-kv-heads", dict(k=zeros(2, 7, 0, 8), v=zeros(2, 7, 0, 6)), argument=("q", "k"), contains=["(2, 7, 0, 8)"]),
    Wrong("k-dim", dict(k=zeros(2, 7, 2, 9)), argument="k", contains=["(2, 7, 2, 9)"]),
    Wrong("dim-0", dict(q=zeros(2, 5, 4, 0), k=zeros(2, 7, 2, 0)), argument="q", contains=["(2, 5, 4, 0)", "1024"]),
    Wrong("dim-1025", dict(q=zeros(2, 5, 4, 1025), k=zeros(2, 7, 2, 1025)), argument="q", contains=["1025", "1024"]),
    Wrong("dim-v-0", dict(v=zeros(2, 7, 2, 0)), argument="v", contains=["(2, 7, 2, 0)", "1024"]),
    Wrong("dim-v-1025", dict(v=zeros(2, 7, 2, 1025)), argument="v", contains=["1025", "1024"]),
    Wrong("wrong-layout", dict(layout="bhsd"), argument=("q", "k"), contains=["(2, 7, 2, 8)"]),
    # Dtypes.
    Wrong("k-double", dict(k=zeros(*K, dtype=torch.float64)), TypeError, "k", ["float64", "float32"]),
    Wrong("v-bfloat16", dict(v=zeros(*V, dtype=torch.bfloat16)), TypeError, "v", ["bfloat16", "float32"]),
    Wrong("q-half", dict(q=zeros(*Q, dtype=torch.float16)), TypeError, ("q", "k"), ["float16", "float32"]),
    Wrong("int64", all_of(torch.int64), TypeError, "q", ["int64"]),
    Wrong("uint8", all_of(torch.uint8), TypeError, "q", ["uint8"]),
    Wrong("bool", all_of(torch.bool), TypeError, "q", ["bool"]),
    Wrong("complex64", all_of(torch.complex64), TypeError, "q", ["complex64"]),
    Wrong("float8", all_of(torch.float8_e4m3fn), TypeError, "q", ["float8_e4m3fn"]),
    # Not tensors.
    Wrong("q-list", dict(q=[[1.0, 2.0]]), TypeError, "q", ["list"]),
    Wrong("k-numpy", dict(k=np.zeros(K, np.float32)), TypeError, "k", ["ndarray"]),
    Wrong("v-none", dict(v=None), TypeError, "v", ["None"]),
    Wrong("mask-list", dict(mask=[True]), TypeError, "mask", ["list"]),
    Wrong("bias-float", dict(bias=1.0), TypeError, "bias", ["float"]),
    Wrong("lengths-list", dict(kv_lengths=[1, 2]), TypeError, "kv_lengths", ["list"]),
    Wrong("out-numpy", dict(out=np.zeros((2, 5, 4, 6), np.float32)), TypeError, "out", ["ndarray"], own_out=True),
    # Devices and kinds of tensor.
    Wrong("k-meta", _meta("k"), ANY, "k", ["meta"]),
    Wrong("q-meta", _meta("q"), ANY, ("q", "k"), ["meta"]),
    Wrong("mask-meta", dict(mask=zeros(5, 7, dtype=torch.bool, device="meta")), ANY, "mask", ["meta"]),
    Wrong("bias-meta", dict(bias=zeros(5, 7, device="meta")), ANY, "bias", ["meta"]),
    Wrong("lengths-meta", dict(kv_lengths=zeros(2, dtype=torch.int32, device="meta")), ANY, "kv_lengths", ["meta"]),
    Wrong("k-sparse", dict(k=zeros(*K).to_sparse()), ANY, "k", ["sparse"]),
    # Masks.
    Wrong("mask-float", dict(mask=zeros(5, 7)), TypeError, "mask", ["float32", "bool"]),
    Wrong("mask-int", dict(mask=zeros(5, 7, dtype=torch.int64)), TypeError, "mask", ["int64", "bool"]),
    Wrong("mask-uint8", dict(mask=zeros(5, 7, dtype=torch.uint8)), TypeError, "mask", ["uint8", "bool"]),
    Wrong("mask-keys", dict(mask=zeros(5, 8, dtype=torch.bool)), argument="mask", contains=["(5, 8)", "(2, 4, 5, 7)"]),
    Wrong("mask-queries", dict(mask=zeros(7, 7, dtype=torch.bool)), argument="mask", contains=["(7, 7)", "(2, 4, 5, 7)"]),
    Wrong("mask-heads", dict(mask=zeros(2, 2, 5, 7, dtype=torch.bool)), argument="mask", contains=["(2, 2, 5, 7)"]),
    Wrong("mask-batch", dict(mask=zeros(3, 1, 1, 7, dtype=torch.bool)), argument="mask", contains=["(3, 1, 1, 7)"]),
    Wrong("mask-transposed", dict(mask=zeros(7, 5, dtype=torch.bool)), argument="mask", contains=["(7, 5)"]),
    Wrong("mask-vector", dict(mask=zeros(5, dtype=torch.bool)), argument="mask", contains=["(5,)"]),
    Wrong("mask-batch-keys", dict(mask=zeros(2, 7, dtype=torch.bool)), argument="mask", contains=["(2, 7)"]),
    Wrong("mask-rank-5", dict(mask=zeros(1, 1, 1, 5, 7, dtype=torch.bool)), argument="mask", contains=["(1, 1, 1, 5, 7)"]),
    Wrong("mask-empty", dict(mask=zeros(5, 0, dtype=torch.bool)), argument="mask", contains=["(5, 0)"]),
    # Biases.
    Wrong("bias-bool", dict(bias=zeros(5, 7, dtype=torch.bool)), TypeError, "bias", ["bool"]),
    Wrong("bias-int", dict(bias=zeros(5, 7, dtype=torch.int32)), TypeError, "bias", ["int32"]),
    Wrong("bias-complex", dict(bias=zeros(5, 7, dtype=torch.complex64)), TypeError, "bias", ["complex64"]),
    Wrong("bias-keys", dict(bias=zeros(5, 6)), argument="bias", contains=["(5, 6)", "(2, 4, 5, 7)"]),
    Wrong("bias-heads", dict(bias=zeros(3, 5, 7)), argument="bias", contains=["(3, 5, 7)"]),
    Wrong("bias-batch", dict(bias=zeros(4, 4, 5, 7)), argument="bias", contains=["(4, 4, 5, 7)"]),
    Wrong("bias-rank-6", dict(bias=zeros(1, 1, 1, 1, 5, 7)), argument="bias", contains=["(1, 1, 1, 1, 5, 7)"]),
    # Key lengths.
    Wrong("lengths-float", dict(kv_lengths=zeros(2)), TypeError, "kv_lengths", ["float32"]),
    Wrong("lengths-int16", dict(kv_lengths=zeros(2, dtype=torch.int16)), TypeError, "kv_lengths", ["int16"]),
    Wrong("lengths-bool", dict(kv_lengths=zeros(2, dtype=torch.bool)), TypeError, "kv_lengths", ["bool"]),
    Wrong("lengths-shape", dict(kv_lengths=zeros(3, dtype=torch.int32)), argument="kv_lengths", contains=["(3,)"]),
    Wrong("lengths-one", dict(kv_lengths=zeros(1, dtype=torch.int64)), argument="kv_lengths", contains=["(1,)"]),
    Wrong("lengths-2d", dict(kv_lengths=zeros(2, 1, dtype=torch.int64)), argument="kv_lengths", contains=["(2, 1)"]),
    Wrong("lengths-0d", dict(kv_lengths=zeros(dtype=torch.int64)), argument="kv_lengths", contains=["()"]),
    # Options.
    Wrong("window-left", dict(window=(-2, 0)), argument="window", contains=["-2"]),
    Wrong("window-right", dict(window=(0, -5)), argument="window", contains=["-5"]),
    Wrong("window-short", dict(window=(1,)), ANY, "window", ["(1,)"]),
    Wrong("window-long", dict(window=(1, 2, 3)), ANY, "window", ["(1, 2, 3)"]),
    Wrong("window-int", dict(window=5), ANY, "window", ["5"]),
    Wrong("window-float", dict(window=(1.5, 0)), ANY, "window", ["1.5"]),
    Wrong("window-bool", dict(window=(True, 0)), TypeError, "window", ["True"]),
    Wrong("window-text", dict(window="ab"), ANY, "window", ["ab"]),
    Wrong("scale-nan", dict(scale=float("nan")), argument="scale", contains=["nan"]),
    Wrong("scale-inf", dict(scale=float("inf")), argument="scale", contains=["inf"]),
    Wrong("scale-minus-inf", dict(scale=-float("inf")), argument="scale", contains=["-inf"]),
    Wrong("scale-huge", dict(scale=10**400), argument="scale", contains=["finite", "1329 bits"]),
    Wrong("scale-with-gradient", dict(scale=torch.ones((), requires_grad=True)), TypeError, "scale", ["constant", "multiply q"]),
    Wrong("scale-text", dict(scale="big"), TypeError, "scale", ["str"]),
    Wrong("softcap-negative", dict(softcap=-1.0), argument="softcap", contains=["-1"]),
    Wrong("softcap-nan", dict(softcap=float("nan")), argument="softcap", contains=["nan"]),
    Wrong("softcap-inf", dict(softcap=float("inf")), argument="softcap", contains=["inf"]),
    Wrong("softcap-huge", dict(softcap=-(10**400)), argument="softcap", contains=["1329 bits"]),
    Wrong("softcap-with-gradient", dict(softcap=torch.ones((), requires_grad=True)), TypeError, "softcap", ["constant"]),
    Wrong("softcap-text", dict(softcap="big"), TypeError, "softcap", ["str"]),
    Wrong("softcap-none", dict(softcap=None), TypeError, "softcap", ["None"]),
    Wrong("layout-unknown", dict(layout="sbhd"), argument="layout", contains=["sbhd", "bshd", "bhsd"]),
    Wrong("layout-none", dict(layout=None), ANY, "layout", ["None"]),
    Wrong("causal-unknown", dict(causal="diagonal"), argument="causal", contains=["diagonal", "top_left"]),
    Wrong("config-text", dict(config="fast"), ANY, "config", ["str"]),
    # The output.
    Wrong("out-shape", dict(out=zeros(2, 5, 4, 8)), argument="out", contains=["(2, 5, 4, 8)", "(2, 5, 4, 6)"], own_out=True),
    Wrong("out-layout", dict(out=zeros(2, 4, 5, 6)), argument="out", contains=["(2, 4, 5, 6)"], own_out=True),
    Wrong("out-rank", dict(out=zeros(5, 4, 6)), argument="out", contains=["(5, 4, 6)"], own_out=True),
    Wrong("out-dtype", dict(out=zeros(2, 5, 4, 6, dtype=torch.float64)), TypeError, "out", ["float64"], own_out=True),
    Wrong("out-requires-grad", dict(out=zeros(2, 5, 4, 6).requires_grad_()), argument="out", contains=["no_grad"], own_out=True),
    Wrong("out-meta", dict(out=zeros(2, 5, 4, 6, device="meta")), ANY, "out", ["meta"], own_out=True),
    Wrong("out-expanded", dict(out=zeros(2, 5, 1, 6).expand(2, 5, 4, 6)), argument="out", own_out=True),
    Wrong("out-overlaps-itself", dict(out=zeros(500).as_strided((2, 5, 4, 6), (60, 12, 3, 1))), argument="out", own_out=True),
]  # fmt: skip


def names(argument) -> list[str]:
    return [argument] if isinstance(argument, str) else list(argument)


def expect(wrong: Wrong, call):
    with pytest.raises(wrong.kind) as caught:
        call()
    text = str(caught.value)
    assert any(re.search(rf"\b{n}\b", text) for n in names(wrong.argument)), f"no {wrong.argument} in: {text}"
    for part in wrong.contains:
        assert part in text, f"no {part} in: {text}"
    assert "\n" not in text.strip() and "Exception raised from" not in text and "[fae:" not in text


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.name)
def test_wrong_input(wrong: Wrong, backend):
    arguments = {**valid(), **wrong.changes}
    expect(wrong, lambda: fae.flash_attention(**arguments, backend=backend))
    out = arguments.pop("out", zeros(BATCH, SEQ_Q, HEADS_Q, DIM_V).fill_(SENTINEL))
    if not wrong.own_out:
        expect(wrong, lambda: fae.flash_attention(**arguments, out=out, backend=backend))
        assert torch.equal(out, torch.full_like(out, SENTINEL)), "written before raising"
    elif isinstance(out, torch.Tensor) and out.device.type == "cpu":
        assert torch.equal(out, torch.zeros_like(out)), "written before raising"


@pytest.mark.parametrize("wrong", [w for w in WRONG if not w.own_out], ids=lambda w: w.name)
def test_wrong_input_that_requires_grad(wrong: Wrong, backend):
    arguments = {**valid(), **wrong.changes}
    for name in ("q", "k", "v", "bias"):
        t = arguments.get(name)
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            arguments[name] = t.detach().requires_grad_()
    expect(wrong, lambda: fae.flash_attention(**arguments, backend=backend))


def test_the_valid_call_is_valid(backend):
    out = zeros(BATCH, SEQ_Q, HEADS_Q, DIM_V)
    assert fae.flash_attention(**valid(), out=out, backend=backend) is out


def overlapping_pairs():
    """(name, q, k, v, out) where writing out would change an input."""
    base = torch.randn(4000)
    q, k, v = (base[i * 1000 : i * 1000 + 600].view(2, 5, 4, 15) for i in range(3))
    k, v = k[:, :, :2], v[:, :, :2]
    yield "q", q, k, v, q
    yield "q", q, k, v, base[4:604].view(2, 5, 4, 15)
    yield "k", q, k, v, base[1500:2100].view(2, 5, 4, 15)
    yield "v", q, k, v, base[2010:2610].view(2, 5, 4, 15)
    yield "v", q, k, v, base[1620:2220].view(2, 5, 4, 15)


@pytest.mark.parametrize("n", range(5))
def test_out_that_overlaps_an_input(n, backend):
    name, q, k, v, out = list(overlapping_pairs())[n]
    before = out.clone()
    with pytest.raises(ValueError, match=rf"\bout\b.*\b{name}\b"):
        fae.flash_attention(q, k, v, out=out, backend=backend)
    assert torch.equal(out, before)


@pytest.mark.parametrize("name", ["bias", "mask", "kv_lengths"])
def test_out_that_overlaps_an_option(name, backend):
    arguments = valid()
    storage = torch.zeros(4096, dtype=torch.uint8)
    out = storage[:960].view(torch.float32).view(2, 5, 4, 6)
    arguments[name] = {
        "bias": storage[800:940].view(torch.float32).view(5, 7), "mask": storage[900:935].view(torch.bool).view(5, 7),
        "kv_lengths": storage[952:968].view(torch.int64),
    }[name]  # fmt: skip
    with pytest.raises(ValueError, match=rf"\bout\b.*\b{name}\b"):
        fae.flash_attention(**arguments, out=out, backend=backend)
    assert not storage.any()


def test_out_next_to_an_input_is_fine(backend):
    """Neighbours in one buffer do not overlap."""
    k, v = torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    q, out = torch.randn(2, 2, 5, 4, 8).unbind()
    expected = fae.flash_attention(q.clone(), k, v, backend=backend)
    assert torch.equal(fae.flash_attention(q, k, v, out=out, backend=backend), expected)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_out_together_with_grad(name, backend):
    arguments = {**valid(), "bias": torch.zeros(5, 7)}
    arguments[name] = arguments[name].detach().requires_grad_()
    out = zeros(BATCH, SEQ_Q, HEADS_Q, DIM_V).fill_(SENTINEL)
    with pytest.raises((ValueError, RuntimeError), match=r"\bout\b"):
        fae.flash_attention(**arguments, out=out, backend=backend)
    assert torch.equal(out, torch.full_like(out, SENTINEL))
    with torch.no_grad():
        fae.flash_attention(**arguments, out=out, backend=backend)
    assert not torch.equal(out, torch.full_like(out, SENTINEL))


@pytest.mark.parametrize("name", ["tpu", "", None, 3])
def test_unknown_backend(name):
    with pytest.raises((ValueError, TypeError), match="backend"):
        fae.flash_attention(**valid(), backend=name)


@pytest.mark.parametrize("name", ["cuda"])
def test_backend_that_is_not_there(name):
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=name):
        fae.flash_attention(**valid(), backend=name)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="head_mask"):
        fae.flash_attention(**valid(), head_mask=None)


def test_errors_do_not_disturb_the_next_call(backend):
    arguments = valid()
    expected = fae.flash_attention(**arguments, backend=backend)
    for wrong in WRONG[::7]:
        with pytest.raises(ANY):
            fae.flash_attention(**{**arguments, **wrong.changes}, backend=backend)
    assert torch.equal(fae.flash_attention(**arguments, backend=backend), expected)


# The operators themselves, called without the Python package around them.
def op_arguments():
    a = valid()
    return [a["q"], a["k"], a["v"], None, None, None, 0, 0, -1, -1, None, 0.0, True]


@pytest.mark.parametrize(
    ("position", "value", "text"),
    [(6, 3, "layout"), (6, -1, "layout"), (7, 3, "causal"), (7, -1, "causal"), (8, -2, "window"), (9, -9, "window"),
     (10, float("nan"), "scale"), (11, -1.0, "softcap"), (0, zeros(3), "q"), (1, zeros(2, 7, 3, 8), "k"), (3, zeros(5, 7), "mask"),
     (4, zeros(4, 7), "bias"), (5, zeros(2), "kv_lengths")],
)  # fmt: skip
def test_operators_refuse_too(position, value, text):
    arguments = op_arguments()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=rf"\[fae:(value|type)\].*\b{text}\b"):
        torch.ops.flash_attn_ext.attention_forward(*arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dout", zeros(2, 5, 4, 8)), ("dout", zeros(2, 5, 4, 6, dtype=torch.float64)), ("dlse", zeros(2, 4, 6)),
     ("dlse", zeros(2, 4, 5, dtype=torch.float16)), ("out", zeros(2, 5, 2, 6)), ("out", zeros(2, 5, 4, 6, dtype=torch.float16)),
     ("lse", zeros(2, 5, 4)), ("lse", zeros(0)), ("lse", zeros(2, 4, 5, dtype=torch.float16))],
)  # fmt: skip
def test_backward_operator_refuses_too(name, value):
    a = op_arguments()
    out, lse = torch.ops.flash_attn_ext.attention_forward(*a)
    saved = {"dout": torch.ones_like(out), "dlse": torch.ones_like(lse), "out": out, "lse": lse, name: value}
    with pytest.raises(RuntimeError, match=rf"\[fae:(value|type)\].*\b{name}\b"):
        torch.ops.flash_attn_ext.attention_backward(
            saved["dout"], saved["dlse"], *a[:3], saved["out"], saved["lse"], *a[3:12], False
        )
