"""Typed masks: what they hide, what they become for the operators, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attend, visibility
from typed_masks import RECIPES, draw_typed

import flash_attn_ext as fae
from flash_attn_ext import AttentionConfig, _extended, masks
from flash_attn_ext.masks import (
    BlockSparseMask,
    CausalMask,
    CombinedMask,
    DenseMask,
    DocumentMask,
    PaddingMask,
    PrefixLMMask,
    TreeMask,
    WindowMask,
)

CODES = {0: False, 1: True, 2: "top_left"}


def lowered(mask, sizes, **more):
    batch, heads, seq_q, seq_kv = sizes
    q, k = torch.empty(batch, seq_q, heads, 8), torch.empty(batch, seq_kv, heads, 8)
    return _extended.options_of(q, k, _extended.Arguments(mask=mask, **more), AttentionConfig())


def drawn(options, sizes) -> torch.Tensor:
    """What the operators are told, by the oracle's reading of it."""
    return visibility(
        sizes, CODES[options.causal], (options.window_left, options.window_right), options.mask, None,
        options.kv_lengths, options.row_labels, options.key_bounds, (options.mask_block_q, options.mask_block_kv),
    )  # fmt: skip


@pytest.mark.parametrize(
    "sizes", [(2, 3, 17, 40), (1, 1, 40, 17), (3, 2, 24, 24), (2, 2, 1, 9), (2, 2, 9, 1)], ids=str
)
@pytest.mark.parametrize("name", RECIPES)
def test_definition_drawing_and_lowering_agree(name, sizes):
    for seed in range(5):
        typed = draw_typed(name, *sizes, torch.Generator().manual_seed(seed))
        expected = typed.dense.expand(sizes)
        dense = typed.mask.dense(*sizes)
        assert dense.dtype == torch.bool and torch.equal(dense.expand(sizes), expected)
        assert torch.equal(drawn(lowered(typed.mask, sizes), sizes), expected)


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(data=st.data())
def test_any_conjunction(data):
    """Any masks, in any order, with the causal, window and kv_lengths arguments besides."""
    sizes = tuple(data.draw(st.integers(1, n)) for n in (3, 2, 40, 40))
    names = data.draw(
        st.lists(st.sampled_from([n for n in RECIPES if "blocks" not in n]), min_size=1, max_size=5)
    )
    if "dense" not in names and data.draw(st.booleans()):
        names.insert(
            data.draw(st.integers(0, len(names))), data.draw(st.sampled_from(["blocks", "head-blocks"]))
        )
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    typed = [draw_typed(name, *sizes, g) for name in names]
    more = dict(
        causal=data.draw(st.sampled_from([False, True, "top_left"])),
        window=data.draw(st.sampled_from([None, (5, None), (-1, 3), (0, 0), (30, 30)])),
        kv_lengths=data.draw(st.sampled_from([None, torch.randint(-1, 45, (sizes[0],), generator=g)])),
    )
    mask = typed[0].mask
    for other in typed[1:]:
        mask = mask & other.mask
    expected = visibility(sizes, **more)
    for part in typed:
        expected &= part.dense
    options = lowered(mask, sizes, **more)
    assert torch.equal(drawn(options, sizes), expected), names
    assert torch.equal(mask.dense(*sizes) & visibility(sizes, **more), expected)
    small = [t for name in ("row_labels", "key_bounds") if (t := getattr(options, name)) is not None]
    assert all(
        t.dtype == torch.int32 and t.numel() <= 2 * len(names) * sizes[0] * max(sizes[2:]) for t in small
    )


def test_pictures():
    def picture(mask, seq_q, seq_kv):
        return [
            "".join(".x"[int(c)] for c in row)
            for row in mask.dense(1, 1, seq_q, seq_kv).expand(1, 1, seq_q, seq_kv)[0, 0]
        ]

    assert picture(CausalMask(), 2, 4) == ["xxx.", "xxxx"]
    assert picture(CausalMask("top_left"), 2, 4) == ["x...", "xx.."]
    assert picture(WindowMask(1, 0), 3, 4) == ["xx..", ".xx.", "..xx"]
    assert picture(PrefixLMMask(2), 3, 4) == ["xx..", "xxx.", "xxxx"]
    assert picture(DocumentMask(torch.tensor([1, 1, 2])), 3, 3) == ["xx.", "xx.", "..x"]
    tree = TreeMask(torch.tensor([-1, 0, 0, 1]))
    assert picture(tree, 4, 6) == ["xxx...", "xxxx..", "xxx.x.", "xxxx.x"]
    assert picture(tree, 2, 4) == ["x.x.", "xx.x"]  # the last two nodes
    assert picture(tree, 5, 5) == [
        "x....",
        "xx...",
        "xxx..",
        "xx.x.",
        "xxx.x",
    ]  # the first query stands before
    blocks = BlockSparseMask(torch.tensor([[True, False], [True, True]]), 2, 3)
    assert picture(blocks, 3, 4) == ["xxx.", "xxx.", "xxxx"]


def test_a_causal_document_mask_is_attention_of_each_document():
    lengths = [3, 1, 7]
    q, k, v = (torch.randn(1, 11, 2, 8, dtype=torch.float64) for _ in range(3))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    out = fae.flash_attention(q, k, v, mask=CausalMask() & DocumentMask(ids))
    parts = zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True)
    torch.testing.assert_close(out, torch.cat([fae.flash_attention(*part, causal=True) for part in parts], 1))


def test_a_tree_where_tensors_are_made_elsewhere_by_default():
    parents, q = torch.tensor([-1, 0, 0, 1]), torch.randn(1, 4, 2, 8)
    with torch.device("meta"):
        out = fae.flash_attention(q, q, q, mask=TreeMask(parents))
    assert torch.equal(out, fae.flash_attention(q, q, q, mask=TreeMask(parents)))


def test_a_chain_is_causal_and_a_star_is_not():
    nodes = torch.arange(12)
    assert torch.equal(TreeMask(nodes - 1).dense(1, 1, 12, 15)[0, 0], CausalMask().dense(1, 1, 12, 15))
    star = torch.full((12,), -1)
    assert torch.equal(TreeMask(star).dense(1, 1, 12, 12)[0, 0], torch.eye(12, dtype=torch.bool))


def test_what_the_plain_operators_know_goes_to_them():
    sizes = (2, 2, 5, 9)
    mask = (
        CausalMask() & WindowMask(3) & PaddingMask(torch.tensor([4, 9])) & DenseMask(torch.rand(5, 9) < 0.5)
    )
    assert not lowered(mask, sizes).is_extended()
    assert lowered(mask & PrefixLMMask(2), sizes).is_extended()
    q, k, v = (torch.randn(2, n, 2, 8) for n in (5, 9, 9))
    options = dict(causal=True, window=(3, None), kv_lengths=torch.tensor([4, 9]), mask=mask.parts[-1].seen)
    assert torch.equal(fae.flash_attention(q, k, v, mask=mask), fae.flash_attention(q, k, v, **options))
    assert fae.explain(q, k, v, mask=mask).backend == "cpu"


def test_gradients_with_typed_masks(extended_target):
    typed = [
        draw_typed(name, 2, 4, 9, 14, torch.Generator().manual_seed(1))
        for name in ("trees", "prefixes", "blocks")
    ]
    mask, dense = (
        typed[0].mask & typed[1].mask & typed[2].mask,
        typed[0].dense & typed[1].dense & typed[2].dense,
    )
    q, k, v = (
        torch.randn(2, n, h, 6, dtype=torch.float64).requires_grad_() for n, h in ((9, 4), (14, 2), (14, 2))
    )
    out = fae.flash_attention(q, k, v, mask=mask, backend=extended_target.backend)
    dout = torch.randn_like(out)
    exact = attend(q, k, v, mask=dense, dout=dout)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), dout), (exact.dq, exact.dk, exact.dv))


def test_masks_are_flat_values_that_do_not_change():
    a, b, c = CausalMask(), WindowMask(4, None), PrefixLMMask(3)
    both = (a & b) & (c & a)
    assert isinstance(both, CombinedMask) and both.parts == (a, b, c, a)
    assert repr(a & b) == "CausalMask(alignment='bottom_right') & WindowMask(left=4, right=None)"
    assert (
        repr(DocumentMask(torch.zeros(2, 5, dtype=torch.int32)))
        == "DocumentMask(query_ids=<int32 (2, 5)>, key_ids=None)"
    )
    assert repr(TreeMask(torch.tensor([-1]))) == "TreeMask(parents=<int64 (1,)>)"
    for mask, name in (
        (a, "alignment"),
        (b, "left"),
        (both, "parts"),
        (TreeMask(torch.tensor([-1])), "parents"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(mask, name, None)
    with pytest.raises(TypeError):
        a & torch.ones(3, dtype=torch.bool)


def test_everything_is_documented():
    for name in (
        "CausalMask",
        "WindowMask",
        "PaddingMask",
        "PrefixLMMask",
        "DocumentMask",
        "TreeMask",
        "BlockSparseMask",
        "DenseMask",
    ):
        assert f"`{name}`" in masks.__doc__ and len(getattr(masks, name).__doc__) > 40


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


WRONG_VALUES = [
    (lambda: CausalMask("diagonal"), ValueError, "CausalMask: alignment.*diagonal"),
    (lambda: CausalMask(True), ValueError, "alignment.*True"),
    (lambda: WindowMask(-2, 0), ValueError, "WindowMask: left.*-2"),
    (lambda: WindowMask(0, -3), ValueError, "WindowMask: right.*-3"),
    (lambda: WindowMask(1.5, 0), TypeError, "window.*1.5"),
    (lambda: PaddingMask([3]), TypeError, "PaddingMask: kv_lengths.*list"),
    (lambda: PaddingMask(torch.zeros(2)), TypeError, "kv_lengths.*float32"),
    (lambda: PaddingMask(ints(2, 1)), ValueError, r"kv_lengths.*\(2, 1\)"),
    (lambda: PrefixLMMask(-1), ValueError, "prefix_lengths.*-1"),
    (lambda: PrefixLMMask(2.0), TypeError, "prefix_lengths.*float"),
    (lambda: PrefixLMMask(True), TypeError, "prefix_lengths.*bool"),
    (lambda: PrefixLMMask(torch.zeros(2)), TypeError, "prefix_lengths.*float32"),
    (lambda: PrefixLMMask(ints()), ValueError, r"prefix_lengths.*\(\)"),
    (lambda: DocumentMask([0, 1]), TypeError, "query_ids.*list"),
    (lambda: DocumentMask(torch.zeros(3)), TypeError, "query_ids.*float32"),
    (lambda: DocumentMask(ints(3), ints(1, 1, 3)), ValueError, r"key_ids.*\(1, 1, 3\)"),
    (lambda: DocumentMask(torch.tensor([5, 2**32])), ValueError, r"query_ids.*from 5 to 4294967296"),
    (lambda: DocumentMask(ints(3), torch.tensor([-(2**31) - 1])), ValueError, "key_ids.*from -2147483649"),
    (
        lambda: DocumentMask(torch.tensor([2**31 - 1], dtype=torch.int32)),
        ValueError,
        "query_ids.*to 2147483647",
    ),
    (lambda: TreeMask(torch.tensor([1, 0])), ValueError, "parents.*root.*node 0"),
    (lambda: TreeMask(torch.tensor([-1, 2, 1])), ValueError, "parents.*root.*node 1"),
    (lambda: TreeMask(torch.tensor([0])), ValueError, "parents.*root"),
    (lambda: TreeMask(torch.tensor([-1, 2])), ValueError, "parents.*2 at node 1"),
    (lambda: TreeMask(torch.tensor([-1, -2])), ValueError, "parents.*-2"),
    (lambda: TreeMask(ints(0)), ValueError, "parents.*one node"),
    (lambda: TreeMask(torch.zeros(2, dtype=torch.bool)), TypeError, "parents.*bool"),
    (lambda: BlockSparseMask(torch.zeros(2, 2), 4, 4), TypeError, "blocks.*bool.*float32"),
    (lambda: BlockSparseMask(torch.zeros(2, 2, dtype=torch.bool), 0, 4), ValueError, "block_q.*0"),
    (lambda: BlockSparseMask(torch.zeros(2, 2, dtype=torch.bool), 4, 4.0), TypeError, "block_kv.*4.0"),
    (lambda: DenseMask(torch.zeros(2, 2)), TypeError, "DenseMask: seen.*bool.*float32"),
    (lambda: DenseMask(torch.zeros((1,) * 5, dtype=torch.bool)), ValueError, r"seen.*\(1, 1, 1, 1, 1\)"),
    (lambda: DenseMask(torch.zeros(2, 2, dtype=torch.bool).to_sparse()), TypeError, "seen.*sparse"),
    (lambda: CombinedMask((CausalMask(), True)), TypeError, "CombinedMask.*bool"),
]


@pytest.mark.parametrize(("make", "kind", "pattern"), WRONG_VALUES, ids=[p for *_, p in WRONG_VALUES])
def test_wrong_values(make, kind, pattern):
    with pytest.raises(kind, match=pattern):
        make()


SEEN = torch.ones(5, 9, dtype=torch.bool)
WRONG_CALLS = [
    (
        DocumentMask(ints(5)),
        ValueError,
        r"DocumentMask.query_ids.*\(5,\).*\(9,\)",
    ),  # the keys' are the queries'
    (DocumentMask(ints(4), ints(9)), ValueError, r"query_ids.*\(4,\).*\(5,\)"),
    (DocumentMask(ints(3, 5), ints(9)), ValueError, r"query_ids.*\(3, 5\).*\(2, 5\)"),
    (DocumentMask(ints(5), ints(8)), ValueError, r"key_ids.*\(8,\)"),
    (PrefixLMMask(ints(3)), ValueError, r"prefix_lengths.*\(3,\).*batch is 2"),
    (TreeMask(torch.arange(10) - 1), ValueError, "TreeMask.*10 nodes.*9 keys"),
    (TreeMask(ints(3, 4) - 1), ValueError, r"TreeMask.parents.*\(3, 4\).*batch is 2"),
    (
        DenseMask(SEEN) & BlockSparseMask(torch.ones(1, 1, dtype=torch.bool), 8, 16),
        NotImplementedError,
        "mask.*1 x 1.*8 x 16",
    ),
    (DenseMask(SEEN) & DenseMask(SEEN[:4]), ValueError, r"mask.*\(5, 9\).*\(4, 9\)"),
    (DenseMask(SEEN[:4]), ValueError, r"mask.*\(4, 9\)"),
    (PaddingMask(ints(3)), ValueError, r"kv_lengths.*\(3,\)"),
]


@pytest.mark.parametrize(("mask", "kind", "pattern"), WRONG_CALLS, ids=[p for *_, p in WRONG_CALLS])
def test_wrong_calls(mask, kind, pattern, backend):
    q, k, v = (torch.randn(2, n, 4, 8) for n in (5, 9, 9))
    for function in (fae.flash_attention, fae.explain):
        with pytest.raises(kind, match=pattern):
            function(q, k, v, mask=mask, backend="portable" if backend == "portable" else "auto")


@pytest.mark.parametrize("name", ["documents", "trees", "prefixes", "blocks", "window"])
def test_compiled(name):
    torch._dynamo.reset()
    mask = draw_typed(name, 2, 2, 9, 14, torch.Generator().manual_seed(1)).mask
    q, k, v = (torch.randn(2, n, 2, 8, requires_grad=True) for n in (9, 14, 14))

    def fn(q, k, v):
        return fae.flash_attention(q, k, v, mask=mask & CausalMask()).sin()

    results = []
    for call in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
        out = call(q, k, v)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [(70, 620), (620, 70)], ids=str)
@pytest.mark.parametrize("kind", ["documents", "blocks"])
def test_what_nobody_sees_at_both_ends_is_left_out_by_the_cuda_kernels(kind, sizes, emulator):
    """Longer than a block of threads looks at in one go; results are those of the same mask written out."""
    seq_q, seq_kv = sizes
    torch.manual_seed(0)
    if kind == "documents":
        ids = [torch.arange(n) * 7 // n for n in sizes]
        mask, dense = DocumentMask(*ids), ids[0][:, None] == ids[1]
    else:
        blocks = torch.rand(-(-seq_q // 30), -(-seq_kv // 40)) < 0.4
        blocks[:, 0] = blocks[:, -1] = False
        mask = BlockSparseMask(blocks, 30, 40)
        dense = mask.dense(1, 1, seq_q, seq_kv)
    leaves = [torch.randn(1, n, h, 8, requires_grad=True) for n, h in ((seq_q, 2), (seq_kv, 1), (seq_kv, 1))]
    results = []
    for backend, how, options in (
        ("cpu", dense, {}),
        ("cuda_emulated", mask, {"deterministic": False}),
        ("cuda_emulated", mask, {"deterministic": True}),
    ):
        out = fae.flash_attention(*leaves, mask=how, backend=backend, **options)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
