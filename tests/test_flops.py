"""`FlopCounterMode` counts this package's calls as it counts torch's own attention."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flash_attn_ext as fae

DIM, DIM_V, HEADS = 24, 24, 4


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def tensors(*, lengths=(50, 37), requires_grad=True):
    shapes = [(2, HEADS, lengths[0], DIM), (2, 2, lengths[1], DIM), (2, 2, lengths[1], DIM_V)]
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def of_torch(q, k, v):
    return flops(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward())


@pytest.mark.parametrize("backend", ["cpu", "portable"])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1}, {"causal": True, "window": (9, 0)}], ids=str)
def test_forward_and_backward(backend, options):
    q, k, v = tensors()
    ours = flops(
        lambda: fae.flash_attention(q, k, v, layout="bhsd", backend=backend, **options).sum().backward()
    )
    assert ours == of_torch(q, k, v) > 0


def test_layout_and_out():
    q, k, v = tensors(requires_grad=False)
    expected = 2 * 2 * HEADS * 50 * 37 * (DIM + DIM_V)
    out = torch.empty_like(q)
    assert flops(lambda: fae.flash_attention(q, k, v, layout="bhsd", out=out)) == expected
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    assert flops(lambda: fae.flash_attention(q, k, v)) == expected
    assert flops(lambda: fae.flash_attention(q[0], k[0], v[0])) == expected // 2


def test_value_dim_of_its_own():
    q, k = torch.randn(2, 1, 30, 2, 16, requires_grad=True).unbind(0)
    v = torch.randn(1, 30, 2, 8, requires_grad=True)
    counted = flops(lambda: fae.flash_attention(q, k, v).sum().backward())
    assert counted == 2 * 2 * 30 * 30 * (16 + 8) + 2 * 2 * 30 * 30 * (3 * 16 + 2 * 8)


def test_replaced_attention():
    q, k, v = tensors()
    with fae.use_flash_attention(strict=True):
        ours = flops(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward())
    assert ours == of_torch(q, k, v)


def test_packed_sequences_count_by_their_lengths():
    ends = torch.tensor([0, 11, 11, 40], dtype=torch.int32)
    x = torch.randn(40, HEADS, DIM)
    counted = flops(lambda: fae.flash_attention_varlen(x, x, x, ends, ends))
    assert counted == 2 * HEADS * (11**2 + 29**2) * 2 * DIM
    with FakeTensorMode():
        x, ends = torch.empty(40, HEADS, DIM), torch.empty(4, dtype=torch.int32)
        counted = flops(lambda: fae.flash_attention_varlen(x, x, x, ends, ends, 29, 29))
    assert counted == 2 * HEADS * 3 * 29**2 * 2 * DIM


@pytest.mark.parametrize("lengths", [torch.tensor([5, 20]), 20], ids=["tensor", "int"])
def test_cache(lengths):
    q, k = torch.randn(2, 3, HEADS, DIM), torch.randn(2, 3, 2, DIM)
    caches = torch.randn(2, 2, 64, 2, DIM).unbind(0)
    counted = flops(lambda: fae.flash_attention_with_kvcache(q, *caches, k, k, cache_lengths=lengths))
    keys = 8 + 23 if isinstance(lengths, torch.Tensor) else 2 * 23
    assert counted == 2 * HEADS * 3 * keys * 2 * DIM


@pytest.mark.parametrize("first", ["flash_attn_ext", "torch.utils.flop_counter"])
def test_order_of_imports(first):
    """This package doesn't import the counter, which takes longer than all of it, and needs no order."""
    second = {"flash_attn_ext", "torch.utils.flop_counter"} - {first}
    program = f"""
import sys, importlib, torch
importlib.import_module({first!r})
if {first == "flash_attn_ext"}:
    assert "torch.utils.flop_counter" not in sys.modules
importlib.import_module({second.pop()!r})
import flash_attn_ext
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    flash_attn_ext.flash_attention(*torch.randn(3, 1, 5, 2, 8).unbind(0))
assert counter.get_total_flops() == 2 * 2 * 5 * 5 * 16, counter.get_flop_counts()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
