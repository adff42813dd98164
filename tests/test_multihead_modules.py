"""`nn.MultiheadAttention` with nested tensors, inside of torch's modules, compiled and copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from harness import LargestResult
from test_multihead_attention import (
    BATCH,
    EMBED,
    HEADS,
    attn_masks,
    inputs,
    padding_masks,
    pair,
    results,
    same,
)

from flash_attn_ext.nn import MultiheadAttention, replace_multihead_attention

# torch says that nested tensors are a prototype, why it makes an encoder's input none, and that masks of
# different types are deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:.*nested tensors"),
    pytest.mark.filterwarnings("ignore:.*use_nested_tensor"),
]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout):
    """torch takes strided ones for inference; here also jagged ones, with gradients, and of different lengths."""
    theirs, ours = pair(batch_first=True)
    parts = [torch.randn(n, EMBED) for n in (3, 6)]
    for need_weights, average in ((False, True), (True, True), (True, False)):
        x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        out, weights = ours(x, x, x, need_weights=need_weights, average_attn_weights=average)
        with torch.no_grad():
            y = torch.nested.nested_tensor(parts)
            expected, theirs_weights = theirs.eval()(
                y, y, y, need_weights=need_weights, average_attn_weights=average
            )
        assert out.is_nested and out.layout == layout
        for got, e in zip(out.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(got, e)
        assert not need_weights or torch.testing.assert_close(weights, theirs_weights) is None
        sum(part.square().sum() for part in out.unbind()).backward()
        for part, grad in zip(parts, x.grad.unbind(), strict=True):
            leaf = part.clone().requires_grad_()
            torch.testing.assert_close(
                grad,
                torch.autograd.grad(theirs(leaf, leaf, leaf)[0].square().sum(), leaf)[0],
                rtol=1e-4,
                atol=1e-5,
            )
    keys = torch.nested.nested_tensor([torch.randn(n, EMBED) for n in (1, 4)], layout=layout)
    out = ours(x, keys, keys, need_weights=False)[0]
    torch.testing.assert_close(out.unbind()[1], ours(parts[1], keys.unbind()[1], keys.unbind()[1])[0])


def test_wrong_nested_input():
    _, ours = pair(batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(n, EMBED) for n in (3, 6)], layout=torch.jagged)
    with pytest.raises(AssertionError, match="key must be nested.*dense"):
        ours(x, torch.randn(2, 6, EMBED), x)
    with pytest.raises(AssertionError, match=r"key_padding_mask.*nested.*\(2, 6\)"):
        ours(x, x, x, key_padding_mask=torch.zeros(2, 6) > 0)
    with pytest.raises(AssertionError, match="batch_first"):
        pair()[1](x, x, x)


ENCODER_MASKS = {
    "none": (False, False),
    "mask": (True, False),
    "padding": (False, True),
    "both": (True, True),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masks", ENCODER_MASKS)
def test_inside_an_encoder(masks, train):
    """Ours is called, also where torch would compute a layer from its parameters or make the input nested."""
    layer = torch.nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2).train(train)
    ours = replace_multihead_attention(copy.deepcopy(theirs))
    calls = []
    for module in ours.modules():
        if isinstance(module, MultiheadAttention):
            module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(BATCH, 6, EMBED)
    hidden = torch.arange(6) >= torch.tensor([[4], [6]])
    with_mask, with_padding = ENCODER_MASKS[masks]
    arguments = {"mask": torch.nn.Transformer.generate_square_subsequent_mask(6) if with_mask else None}
    arguments["src_key_padding_mask"] = hidden if with_padding else None
    with torch.set_grad_enabled(train):
        expected, got = theirs(x, **arguments), ours(x, **arguments)
    assert len(calls) == 2 and got.shape == expected.shape
    shown = ~hidden if with_padding else slice(None)
    torch.testing.assert_close(got[shown], expected[shown], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_one_layer_by_its_attribute(train):
    """The fused operator of a layer would not call what only stands in `self_attn`."""
    layer = torch.nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, batch_first=True).train(train)
    x = torch.randn(BATCH, 6, EMBED)
    with torch.no_grad():
        expected = layer(x)
        attention = MultiheadAttention(EMBED, HEADS, batch_first=True)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention.train(train)
        calls = []
        attention.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(layer(x), expected)
    assert calls == [1]


def test_inside_a_decoder():
    theirs = torch.nn.TransformerDecoderLayer(EMBED, HEADS, 32, 0.0)
    ours = replace_multihead_attention(copy.deepcopy(theirs))
    target, memory = torch.randn(6, BATCH, EMBED), torch.randn(9, BATCH, EMBED)
    arguments = {
        "tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(6),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.arange(9) >= torch.tensor([[4], [9]]),
    }
    torch.testing.assert_close(ours(target, memory, **arguments), theirs(target, memory, **arguments))


def test_replacing_keeps_the_parameters():
    model = torch.nn.Transformer(EMBED, HEADS, 1, 1, 32)
    parameters = dict(model.named_parameters())
    assert replace_multihead_attention(model) is model
    assert sum(type(m) is MultiheadAttention for m in model.modules()) == 3
    assert all(p is parameters[name] for name, p in model.named_parameters())
    again = replace_multihead_attention(model)
    assert all(len(m._forward_pre_hooks) == 1 for m in again.modules() if type(m) is MultiheadAttention)

    class Own(torch.nn.MultiheadAttention):
        pass

    assert type(replace_multihead_attention(Own(EMBED, HEADS))) is Own


def test_copies_and_pickles():
    _, ours = pair()
    leaves = inputs(batch_first=False)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(*leaves)[0], ours(*leaves)[0])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_masks_are_not_expanded(backward):
    """Padding stays a row for each batch, also beside an attn_mask, of which a bool one is inverted as it is."""
    seq, batch = 600, 3
    _, ours = pair(batch_first=True)
    x = torch.randn(batch, seq, EMBED, requires_grad=backward)
    hidden = torch.arange(seq).expand(batch, -1) >= torch.tensor([[seq], [400], [1]])
    values = torch.randn(batch, seq, requires_grad=backward)
    attn_mask = torch.randn(seq, seq)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(seq)
    linear, given = 4 * batch * seq * EMBED, seq * seq
    for limit, masks in [
        (linear, {"key_padding_mask": hidden}),
        (linear, {"key_padding_mask": values}),
        (linear, {"key_padding_mask": hidden, "attn_mask": causal, "is_causal": True}),
        (given, {"key_padding_mask": hidden, "attn_mask": attn_mask > 0}),
        (linear, {"key_padding_mask": hidden, "attn_mask": attn_mask}),
        (linear, {"key_padding_mask": values, "attn_mask": attn_mask}),
    ]:
        with LargestResult() as largest:
            out, _ = ours(x, x, x, need_weights=False, **masks)
            if backward:
                out.sum().backward()
        assert 0 < largest.elements <= limit, list(masks)


@pytest.mark.parametrize("need_weights", [True, False])
def test_compile(need_weights):
    _, ours = pair(batch_first=True)
    leaves = inputs()
    masks = {
        "attn_mask": attn_masks(torch.float32)["float-2d"],
        "key_padding_mask": padding_masks(torch.float32)["float"],
    }
    # With weights plain torch operations do it all: without, operators of this package are traced.
    compiled = torch.compile(ours, fullgraph=True, backend="eager" if need_weights else "aot_eager")
    expected, got = (results(m, leaves, need_weights=need_weights, **masks) for m in (ours, compiled))
    same(expected, {name.removeprefix("_orig_mod."): t for name, t in got.items()})
