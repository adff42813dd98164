"""`use_flash_attention()`: torch's own models, unchanged, on this package's operators."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_ext as fae


class Watch(TorchDispatchMode):
    """Counts the operators of this package that run inside."""

    def __init__(self):
        super().__init__()
        self.ours, self.theirs = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.ours += name.startswith("flash_attn_ext.")
        self.theirs += "scaled_dot_product" in name
        return func(*args, **(kwargs or {}))


def watched(fn):
    with Watch() as watch:
        result = fn()
    return result, watch.ours, watch.theirs


def qkv(*shape):
    return [torch.randn(*shape) for _ in range(3)]


def test_inside_and_outside():
    q, k, v = qkv(2, 4, 9, 8)
    expected, ours, _ = watched(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert ours == 0
    with fae.use_flash_attention():
        out, ours, theirs = watched(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert ours == 1 and theirs == 0
    torch.testing.assert_close(out, expected)
    assert watched(lambda: F.scaled_dot_product_attention(q, k, v))[1] == 0


@pytest.mark.parametrize("options", [dict(), dict(is_causal=True), dict(attn_mask=torch.rand(9, 9) < 0.9), dict(scale=0.2),
                                     dict(attn_mask=torch.randn(4, 9, 9))], ids=lambda o: "-".join(o) or "plain")  # fmt: skip
def test_gradients(options):
    results = []
    for inside in (False, True):
        q, k, v = (x.requires_grad_() for x in qkv_seeded())
        if inside:
            with fae.use_flash_attention(strict=True):
                out, ours, _ = watched(
                    lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, **options)
                )
            assert ours == 1
        else:
            out = F.scaled_dot_product_attention(q, k, v, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def qkv_seeded():
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, 9, 8, generator=g) for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_multihead_attention(training, masked):
    module = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x = torch.randn(3, 11, 32)
    padding = torch.arange(11) >= torch.tensor([[11], [7], [3]])
    options = dict(need_weights=False)
    if masked:
        options.update(
            key_padding_mask=padding, attn_mask=torch.ones(11, 11, dtype=torch.bool).triu(1), is_causal=False
        )
    expected = module(x, x, x, **options)[0]
    with fae.use_flash_attention():
        out, ours, _ = watched(lambda: module(x, x, x, **options)[0])
    assert ours >= 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_trains_the_same(norm_first):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ours = copy.deepcopy(plain)
    x = torch.randn(3, 11, 32)
    for model, inside in ((plain, False), (ours, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            if inside:
                with fae.use_flash_attention(strict=True):
                    out, count, theirs = watched(lambda model=model: model(x))
                assert count == 2 and theirs == 0
            else:
                out = model(x)
            out.square().mean().backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_transformer_encoder_in_inference():
    """eval() and no_grad: torch would take a fused path that never calls SDPA."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(3, 11, 32)
    padding = torch.arange(11) >= torch.tensor([[11], [7], [3]])
    with torch.no_grad():
        expected = layer(x, src_key_padding_mask=padding)
        with fae.use_flash_attention():
            out, ours, _ = watched(lambda: layer(x, src_key_padding_mask=padding))
    assert ours == 1
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-5, atol=1e-5)


def test_exceptions_pass_through_and_leave_nothing_behind():
    q, k, v = qkv(2, 4, 9, 8)
    with pytest.raises(KeyError, match="mine"), fae.use_flash_attention():
        raise KeyError("mine")
    with pytest.raises((ValueError, TypeError)), fae.use_flash_attention(strict=True):
        F.scaled_dot_product_attention(q, k[..., :4], v)
    assert watched(lambda: F.scaled_dot_product_attention(q, k, v))[1] == 0
    with fae.use_flash_attention():
        assert watched(lambda: F.scaled_dot_product_attention(q, k, v))[1] == 1


def test_nesting_and_reuse():
    q, k, v = qkv(2, 4, 9, 8)
    context = fae.use_flash_attention()
    for _ in range(2):
        with context:
            with fae.use_flash_attention(strict=True):
                assert watched(lambda: F.scaled_dot_product_attention(q, k, v))[1] == 1
            assert watched(lambda: F.scaled_dot_product_attention(q, k, v))[1] == 1
        assert watched(lambda: F.scaled_dot_product_attention(q, k, v))[1] == 0


def test_other_functions_are_untouched():
    x = torch.randn(4, 4)
    with fae.use_flash_attention():
        assert torch.equal(F.softmax(x, -1), torch.softmax(x, -1)) and torch.equal(x @ x, torch.mm(x, x))


def test_other_threads_are_not_affected():
    q, k, v = qkv(2, 4, 9, 8)
    counts = []
    with fae.use_flash_attention():
        t = threading.Thread(
            target=lambda: counts.append(watched(lambda: F.scaled_dot_product_attention(q, k, v))[1])
        )
        t.start()
        t.join()
        counts.append(watched(lambda: F.scaled_dot_product_attention(q, k, v))[1])
    assert counts == [0, 1]


def test_several_threads_at_once():
    q, k, v = qkv(2, 4, 64, 16)
    expected = F.scaled_dot_product_attention(q, k, v)
    results = []

    def work():
        with fae.use_flash_attention():
            for _ in range(10):
                results.append(watched(lambda: F.scaled_dot_product_attention(q, k, v)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 40
    for out, ours, _ in results:
        assert ours == 1
        torch.testing.assert_close(out, expected)


def test_what_cannot_be_served_goes_to_torch_or_raises(caplog):
    """Nested tensors that are not jagged belong to torch: handed on with one warning, refused when strict."""
    q = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in (5, 9)])
    with fae.use_flash_attention():
        inside = [F.scaled_dot_product_attention(q, q, q) for _ in range(2)]
    expected = F.scaled_dot_product_attention(q, q, q)
    for out in inside:
        assert all(torch.equal(a, b) for a, b in zip(out.unbind(), expected.unbind(), strict=True))
    warnings = [r for r in caplog.records if r.name == "flash_attn_ext" and r.levelname == "WARNING"]
    assert len(warnings) <= 1 and all("nested" in r.getMessage() for r in warnings)
    with fae.use_flash_attention(strict=True), pytest.raises(TypeError, match=r"query.*jagged"):
        F.scaled_dot_product_attention(q, q, q)


def test_dropout_is_served():
    """By the package's own generator of masks, so with other ones than torch's; in a module, in training only."""
    q, k, v = qkv(2, 4, 9, 8)
    module = nn.MultiheadAttention(32, 4, dropout=0.4, batch_first=True)
    x = torch.randn(2, 9, 32)
    with fae.use_flash_attention(strict=True):
        for call, expected in (
            (lambda: F.scaled_dot_product_attention(q, k, v, None, 0.5), None),
            (lambda: module.train()(x, x, x, need_weights=False)[0], None),
            (lambda: module.eval()(x, x, x, need_weights=False)[0], module.eval()(x, x, x)[0]),
        ):
            torch.manual_seed(3)
            out, ours, _ = watched(call)
            torch.manual_seed(3)
            assert ours == 1 and torch.equal(call(), out)
            if expected is None:
                assert not torch.equal(call(), out)
            else:
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_jagged_tensors_are_served():
    q = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (5, 0, 9)], layout=torch.jagged).transpose(
        1, 2
    )
    with fae.use_flash_attention(strict=True):
        out, ours, _ = watched(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert ours == 1 and out.layout == torch.jagged and out.shape == q.shape
    for one, whole in zip(q.unbind(), out.unbind(), strict=True):
        if one.shape[1]:
            torch.testing.assert_close(
                F.scaled_dot_product_attention(*[one[None]] * 3, is_causal=True)[0], whole
            )


def test_wrong_calls_still_raise():
    q, k, v = qkv(2, 4, 9, 8)
    for strict in (False, True):
        with fae.use_flash_attention(strict=strict), pytest.raises((RuntimeError, ValueError, TypeError)):
            F.scaled_dot_product_attention(q, k[..., :4], v)


def test_compile_inside():
    torch._dynamo.reset()
    q, k, v = qkv(2, 4, 9, 8)

    def fn(q, k, v):
        with fae.use_flash_attention():
            return F.scaled_dot_product_attention(q, k, v).sin()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), fn(q, k, v))
    torch._dynamo.reset()
    outside = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend="aot_eager")
    with fae.use_flash_attention():
        out, ours, _ = watched(lambda: outside(q, k, v))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
