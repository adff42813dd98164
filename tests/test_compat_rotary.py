"""`compat.rotary` against complex numbers: the pair (a, b) at angle t becomes (a + ib) exp(it)."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from flash_attn_ext.compat import rotary


def turned(x, cos, sin, interleaved):
    """x (..., seq, heads, dim), cos and sin (..., seq, n)."""
    n = cos.shape[-1]
    part = x[..., : 2 * n].double()
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :n], part[..., n:])
    z = torch.complex(a, b) * torch.complex(cos.double(), sin.double())[..., None, :]
    pair = torch.stack((z.real, z.imag), -1 if interleaved else -2).flatten(-2)
    return torch.cat((pair, x[..., 2 * n :].double()), -1)


def angles(positions, n=3):
    return torch.outer(positions.double(), 100.0 ** (-torch.arange(n, dtype=torch.float64) / n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_padded(interleaved, dtype):
    table = angles(torch.arange(12))
    cos, sin = table.cos().to(dtype), table.sin().to(dtype)
    x = torch.randn(2, 5, 3, 8, dtype=dtype)
    for offsets in (0, 7, torch.tensor([2, 6])):
        first = offsets if isinstance(offsets, int) else offsets[:, None]
        positions = (first + torch.arange(5)).expand(2, 5)
        expected = turned(x, cos[positions], sin[positions], interleaved).to(dtype)
        got = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            rotary.apply_rotary_emb_torch(x, cos[positions], sin[positions], interleaved), expected
        )


@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([1, 4, 0])], ids=["0", "3", "each"])
def test_packed(offsets):
    table = angles(torch.arange(12))
    starts = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    x = torch.randn(11, 2, 6)
    got = rotary.apply_rotary_emb(
        x, table.cos(), table.sin(), seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=5
    )
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        first = offsets if isinstance(offsets, int) else offsets[b]
        its = table[first : first + end - begin]
        expected = turned(x[begin:end], its.cos(), its.sin(), False).float()
        torch.testing.assert_close(got[begin:end], expected)
    assert torch.equal(got[9:], x[9:])


def test_in_place_and_gradient():
    table = angles(torch.arange(5))
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    call = functools.partial(rotary.apply_rotary_emb, cos=table.cos(), sin=table.sin())
    assert torch.autograd.gradcheck(call, (x,))
    copy = x.detach().clone()
    assert call(copy, inplace=True) is copy
    assert torch.equal(copy, call(x))
    assert torch.autograd.gradcheck(lambda x: call(x.clone(), inplace=True), (x,))
    leaf = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf, inplace=True).sin().sum(), leaf)
    (wanted,) = torch.autograd.grad(call(x).sin().sum(), x)
    assert torch.equal(leaf, copy)
    torch.testing.assert_close(gradient, wanted)


def parts_of(x: torch.Tensor, how: str) -> tuple:
    """Queries, keys and values (batch, seq, heads, 16) as views of one projection (batch, seq, 8 * 16)."""
    x = x.unflatten(-1, (8, 16))
    if how == "split":
        return x.split([4, 2, 2], 2)
    if how == "slices":
        return x[:, :, :4], x[:, :, 4:6], x[:, :, 6:]
    return (*x.unflatten(2, (2, 4)).unbind(2), x[:, :, :0])


def rotated_parts(x: torch.Tensor, how: str, inplace: bool) -> torch.Tensor:
    table = angles(torch.arange(5), 8)
    q, k, v = parts_of(x, how)
    q, k = (rotary.apply_rotary_emb(t, table.cos(), table.sin(), inplace=inplace) for t in (q, k))
    return torch.cat((q.sin(), k.exp(), v.square()), 2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["split", "slices", "unbind"])
def test_slices_of_one_projection_in_place(how, compiled):
    """Autograd would refuse the second of them, if it saw the first be written."""
    torch.manual_seed(0)
    projection = torch.nn.Linear(8, 8 * 16, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    call = torch.compile(rotated_parts, backend="aot_eager", fullgraph=True) if compiled else rotated_parts
    got, want = call(projection(x), how, True), rotated_parts(projection(x), how, False)
    torch.testing.assert_close(got, want)
    sources = (x, *projection.parameters())
    direction = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, sources, direction) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    projected = projection(x)
    got = rotated_parts(projected, how, True)
    q = parts_of(projected, how)[0]
    torch.testing.assert_close(got[:, :, :4], q.sin())  # written where it lies


@pytest.mark.parametrize("offset", [0, 3])
def test_module_on_slices_of_one_projection(offset):
    module = rotary.RotaryEmbedding(16)
    cos, sin, _ = module_tables(5 + offset, 16, None)
    x = torch.randn(2, 5, 8 * 16, dtype=torch.float64, requires_grad=True)

    def parts():
        whole = (x * 2.0).unflatten(-1, (8, 16))
        return whole[:, :, :4], whole[:, :, 4:].unflatten(2, (2, 2))

    q, kv = module(*parts(), seqlen_offset=offset)
    want_q, want_kv = parts()
    want_q, want_k = (
        rotary.apply_rotary_emb(t, cos, sin, seqlen_offsets=offset) for t in (want_q, want_kv[:, :, 0])
    )
    want_kv = torch.stack((want_k, want_kv[:, :, 1]), 2)
    near = dict(rtol=1e-5, atol=1e-5)  # the module's angles are float32
    torch.testing.assert_close(q, want_q, **near)
    torch.testing.assert_close(kv, want_kv, **near)
    got, want = (
        torch.autograd.grad(a.sin().sum() + b.exp().sum(), x)[0] for a, b in ((q, kv), (want_q, want_kv))
    )
    torch.testing.assert_close(got, want, **near)


def test_second_derivatives_in_place():
    table = angles(torch.arange(3), 2)
    x = torch.randn(1, 3, 3, 1, 4, dtype=torch.float64, requires_grad=True)

    def turned_twice(x):
        x = rotary.apply_rotary_emb_qkv_((x * 1.0)[:, :, :], table.cos(), table.sin())
        return rotary.apply_rotary_emb_kv_(x[:, :, :2], table.cos(), table.sin()).sin()

    assert torch.autograd.gradcheck(turned_twice, (x,))
    assert torch.autograd.gradgradcheck(turned_twice, (x,))


def test_values_that_a_gradient_needs_are_missed():
    table = angles(torch.arange(5))
    x = torch.randn(2, 5, 3, 8, requires_grad=True).tanh()  # whose gradient is one of its result
    turned_x = rotary.apply_rotary_emb(x, table.cos(), table.sin(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        turned_x.sum().backward()


@pytest.mark.parametrize("heads", [None, 4, 0], ids=["3", "grouped", "keys alone"])
@pytest.mark.parametrize("own_table", [False, True])
def test_packed_heads(heads, own_table):
    """In place, of leaves too, with their gradient; values stay."""
    table = angles(torch.arange(9))
    tables = [(table.cos(), table.sin())] * 2
    if own_table:
        tables[1] = ((2 * table).cos(), (2 * table).sin())
    shape = (2, 5, 3, 4, 8) if heads is None else (2, 5, heads + 4, 8)
    qkv = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaf = qkv.detach().clone().requires_grad_()
    parts = qkv.unbind(2) if heads is None else qkv.split([heads, 2, 2], 2)
    turned_parts = [
        rotary.apply_rotary_emb(x, *t, seqlen_offsets=3) for x, t in zip(parts, tables, strict=False)
    ]
    want = (
        torch.stack([*turned_parts, parts[2]], 2)
        if heads is None
        else torch.cat([*turned_parts, parts[2]], 2)
    )
    more = tables[1] if own_table else ()
    got = rotary.apply_rotary_emb_qkv_(leaf, *tables[0], *more, seqlen_offsets=3, num_heads_q=heads)
    assert got.data_ptr() == leaf.data_ptr()
    torch.testing.assert_close(got, want)
    direction = torch.randn_like(want)
    (gradient,), (wanted,) = (torch.autograd.grad(out, x, direction) for out, x in ((got, leaf), (want, qkv)))
    torch.testing.assert_close(gradient, wanted)


def test_packed_keys_and_values():
    table = angles(torch.arange(5))
    kv = torch.randn(2, 5, 2, 4, 8)
    want = rotary.apply_rotary_emb(kv[:, :, 0], table.cos(), table.sin(), True)
    values = kv[:, :, 1].clone()
    assert rotary.apply_rotary_emb_kv_(kv, table.cos(), table.sin(), True).data_ptr() == kv.data_ptr()
    assert torch.equal(kv[:, :, 0], want) and torch.equal(kv[:, :, 1], values)
    with pytest.raises(ValueError, match="kv must be"):
        rotary.apply_rotary_emb_kv_(kv[:, :, :1], table.cos(), table.sin())
    for wrong, heads in ((kv, None), (kv[:, :, 0], None), (kv[:, :, 0], 5), (kv[:, :, 0], 3)):
        with pytest.raises(ValueError, match="qkv must be"):
            rotary.apply_rotary_emb_qkv_(wrong, table.cos(), table.sin(), num_heads_q=heads)


def test_positions_that_the_table_lacks():
    table = angles(torch.arange(4))
    x = torch.randn(1, 3, 1, 6)
    got = rotary.apply_rotary_emb(x, table.cos(), table.sin(), seqlen_offsets=torch.tensor([2]))
    assert torch.equal(got[:, 2], x[:, 2]) and not torch.equal(got[:, 1], x[:, 1])
    with pytest.raises(ValueError, match="seqlen_offsets 2 and 3 rows exceed the 4 positions"):
        rotary.apply_rotary_emb(x, table.cos(), table.sin(), seqlen_offsets=2)
    with pytest.raises(ValueError, match="cos and sin"):
        rotary.apply_rotary_emb(x, angles(torch.arange(4), 4).cos(), table.sin())
    with pytest.raises(ValueError, match="x must be"):
        rotary.apply_rotary_emb(x[0], table.cos(), table.sin())


def module_tables(seq, dim, scale_base):
    """cos and sin of RotaryEmbedding(dim), and what queries and keys are multiplied with."""
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    table = torch.outer(torch.arange(seq, dtype=torch.float64), 10000 ** (-2 * pairs / dim))
    if scale_base is None:
        return table.cos(), table.sin(), torch.ones_like(table)
    power = (torch.arange(seq, dtype=torch.float64) - seq // 2) / scale_base
    return table.cos(), table.sin(), ((2 * pairs + 0.4 * dim) / (1.4 * dim)) ** power[:, None]


@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_module(interleaved, scale_base):
    torch.manual_seed(0)
    module = rotary.RotaryEmbedding(6, interleaved=interleaved, scale_base=scale_base)
    assert not module.state_dict()
    cos, sin, scale = module_tables(9, 6, scale_base)

    def expected(x, by, first=0):
        rows = slice(first, first + x.shape[1])
        return turned(x, (cos * by)[rows], (sin * by)[rows], interleaved).float()

    qkv = torch.randn(2, 9, 3, 4, 8)
    q, k, v = qkv.clone().unbind(2)
    assert module(qkv) is qkv
    want = (expected(q, scale), expected(k, 1 / scale), v)
    torch.testing.assert_close(qkv, torch.stack(want, 2))

    grouped = torch.randn(2, 9, 4 + 2 * 2, 8)
    q, k, v = grouped.clone().split([4, 2, 2], 2)
    torch.testing.assert_close(
        module(grouped, num_heads_q=4), torch.cat((expected(q, scale), expected(k, 1 / scale), v), 2)
    )

    # With offsets, which need tables of nine positions as well.
    offset = 4
    q, kv = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 4, 8)
    want = (
        expected(q, scale, offset),
        torch.stack((expected(kv[:, :, 0], 1 / scale, offset), kv[:, :, 1]), 2),
    )
    for given in (dict(seqlen_offset=4), dict(seqlen_offset=torch.tensor([4, 4]), max_seqlen=9)):
        got = module(q.clone(), kv.clone(), **given)
        torch.testing.assert_close(got, want)


def test_module_tables_follow_dtype_and_length():
    module = rotary.RotaryEmbedding(8)
    with pytest.raises(ValueError, match="max_seqlen"):
        module(torch.randn(1, 4, 3, 2, 8), seqlen_offset=torch.tensor([3]))
    for seq, dtype in ((4, torch.float32), (16, torch.float32), (3, torch.bfloat16), (5, torch.float64)):
        qkv = torch.randn(1, seq, 3, 2, 8, dtype=dtype)
        cos, sin, _ = module_tables(seq, 8, None)
        want = turned(qkv[:, :, 0], cos, sin, False).to(dtype)
        # Tables of bfloat16, and angles of float32.
        tolerance = dict(rtol=0.03, atol=0.03) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module(qkv.clone())[:, :, 0], want, **tolerance)
    module.bfloat16()  # the angles stay precise
    cos, sin, _ = module_tables(3000, 8, None)
    qkv = torch.randn(1, 3000, 3, 2, 8)
    want = turned(qkv[:, :, 0], cos, sin, False).float()
    torch.testing.assert_close(module(qkv.clone())[:, :, 0], want, rtol=1e-3, atol=1e-3)


def test_module_gradients():
    module = rotary.RotaryEmbedding(4, scale_base=8.0)
    qkv = torch.randn(1, 3, 3, 2, 6, requires_grad=True)
    x = qkv * 1.0
    direction = torch.randn(1, 3, 3, 2, 6)
    (got,) = torch.autograd.grad(module(x), qkv, direction)
    cos, sin, scale = module_tables(3, 4, 8.0)
    back = [
        turned(d, cos * by, -sin * by, False).float()
        for d, by in zip(direction.unbind(2), (scale, 1 / scale), strict=False)
    ]
    torch.testing.assert_close(got, torch.stack((*back, direction[:, :, 2]), 2))
