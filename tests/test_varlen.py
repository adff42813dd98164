"""Packed sequences and jagged tensors: each sequence by itself, and nothing of what lies between them."""

from __future__ import annotations

import pytest
import torch
from conftest import EMULATED, EXTENDED_TARGETS, STANDARD, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import attend
from torch import Tensor
from typed_masks import draw_typed

import flash_attn_ext as fae
from flash_attn_ext.masks import CausalMask, DenseMask, DocumentMask, PrefixLMMask, TreeMask

LOOSE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def cu(lengths, dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(lengths_q, lengths_k, heads=(4, 2), dim=(8, 6), dtype=torch.float64, beyond=(0, 0), seed=0):
    """q, k, v and gradients of out and LSE; `beyond` rows of queries and of keys belong to no sequence."""
    g = torch.Generator().manual_seed(seed)
    total_q, total_k = sum(lengths_q) + beyond[0], sum(lengths_k) + beyond[1]
    shapes = [
        (total_q, heads[0], dim[0]),
        (total_k, heads[1], dim[0]),
        (total_k, heads[1], dim[1]),
        (total_q, heads[0], dim[1]),
    ]
    q, k, v, dout = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    dlse = torch.randn(heads[0], total_q, generator=g, dtype=torch.float64)
    return q, k, v, dout, dlse.to(torch.float64 if dtype == torch.float64 else torch.float32)


def own(options: dict, b: int, seq_q: int, seq_kv: int) -> dict:
    """The options of sequence `b`, for the oracle."""
    result = dict(options)
    for name in ("mask", "bias", "keep"):
        t = options.get(name)
        if t is not None:
            t = t[(None,) * (4 - t.dim())]
            t = t[b : b + 1] if t.shape[0] > 1 else t
            t = t[:, :, :seq_q] if t.shape[2] > 1 else t
            result[name] = t[..., :seq_kv] if t.shape[3] > 1 else t
    slopes, lengths = options.get("alibi_slopes"), options.get("kv_lengths")
    if slopes is not None and slopes.dim() == 2:
        result["alibi_slopes"] = slopes[b]
    if lengths is not None:
        result["kv_lengths"] = lengths[b : b + 1]
    return result


def expected(q, k, v, dout, dlse, lengths_q, lengths_k, options) -> dict[str, Tensor]:
    """The oracle, one sequence after the other; what belongs to none stays at 0 and -inf."""
    want = {
        "out": torch.zeros(dout.shape, dtype=torch.float64),
        "lse": torch.full(dlse.shape, float("-inf"), dtype=torch.float64),
    }
    want |= {"dq": torch.zeros_like(q, dtype=torch.float64), "dk": torch.zeros_like(k, dtype=torch.float64)}
    want["dv"] = torch.zeros_like(v, dtype=torch.float64)
    for name in ("bias", "alibi_slopes", "sinks"):
        if options.get(name) is not None:
            want["d" + name] = torch.zeros_like(options[name], dtype=torch.float64)
    q0 = k0 = 0
    for b, (seq_q, seq_kv) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = slice(q0, q0 + seq_q), slice(k0, k0 + seq_kv)
        q0, k0 = rows.stop, keys.stop
        part = own(options, b, seq_q, seq_kv)
        exact = attend(q[rows], k[keys], v[keys], dout=dout[rows], dlse=dlse[:, rows], **part)
        want["out"][rows], want["lse"][:, rows], want["dq"][rows] = exact.out, exact.lse, exact.dq
        want["dk"][keys], want["dv"][keys] = exact.dk, exact.dv
        if "dsinks" in want:
            want["dsinks"] += exact.dsinks
        if "dalibi_slopes" in want:
            slopes = want["dalibi_slopes"]
            (slopes[b] if slopes.dim() == 2 else slopes).add_(exact.dalibi_slopes)
        if "dbias" in want:
            bias = want["dbias"]
            bias = bias.view((1,) * (4 - bias.dim()) + bias.shape)
            bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
            bias = bias[:, :, :seq_q] if bias.shape[2] > 1 else bias
            bias = bias[..., :seq_kv] if bias.shape[3] > 1 else bias
            bias += exact.dbias
    return want


def compare(
    tensors, lengths_q, lengths_k, backend, options=None, oracle=None, index=torch.int32, seed=None, **more
):
    """All results of the package against the oracle's."""
    q, k, v, dout, dlse = tensors
    options = options or {}
    want = expected(*tensors, lengths_q, lengths_k, {**options, **(oracle or {})})
    leaves = {n: t.detach().requires_grad_() for n, t in (("q", q), ("k", k), ("v", v))}
    for name in ("bias", "alibi_slopes", "sinks"):
        if options.get(name) is not None:
            leaves[name] = options[name].detach().requires_grad_()
    given = {**options, **{n: t for n, t in leaves.items() if n in options}, **more}
    if seed is not None:
        torch.manual_seed(seed)
    out, lse = fae.flash_attention_varlen(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        cu(lengths_q, index),
        cu(lengths_k, index),
        return_lse=True,
        backend=backend,
        **given,
    )
    grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    got = {"out": out, "lse": lse, **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}
    assert out.dtype == q.dtype and lse.dtype == dlse.dtype and out.is_contiguous() and lse.is_contiguous()
    for name, value in got.items():
        finite = want[name].isfinite()
        assert value.shape == want[name].shape and torch.equal(value.isfinite(), finite), name
        size = max(1.0, float(want[name][finite].abs().max())) if finite.any() else 1.0
        error = (value.double() - want[name])[finite].abs().max() if finite.any() else 0.0
        loose = max(LOOSE[q.dtype], LOOSE[value.dtype])  # an option may have a narrower dtype
        assert error <= loose * size, (name, float(error))
    return got


LENGTHS = [
    ([5], [9]),
    ([5, 0, 7], [9, 3, 4]),
    ([0, 0], [0, 3]),
    ([1, 1, 1, 1], [30, 2, 0, 17]),
    ([70, 3, 40], [20, 60, 40]),
    ([3, 2], [0, 0]),
]
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "top-left": dict(causal="top_left", scale=-0.3),
    "window": dict(window=(4, 1), softcap=3.0),
}


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", LOOSE, ids=str)
def test_every_sequence_by_itself(dtype, lengths, options, extended_target):
    how = extended_target.one_schedule(len(options) + sum(lengths[0]))
    compare(packed(*lengths, dtype=dtype), *lengths, extended_target.backend, OPTIONS[options], **how)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_standard_backend(lengths, options):
    """In float64 alone: its scores are rounded to the inputs' dtype."""
    compare(packed(*lengths), *lengths, "standard", OPTIONS[options])


def activate(request, monkeypatch) -> Target:
    if request.param == EMULATED:
        request.getfixturevalue("emulator")
    if request.param.isa is not None:
        monkeypatch.setenv("FLASH_ATTN_EXT_CPU_ISA", request.param.isa)
    return request.param


@pytest.fixture(params=[STANDARD, *EXTENDED_TARGETS, EMULATED], ids=lambda t: t.name)
def packing_target(request, monkeypatch, steady) -> Target:
    """Each backend that knows packed sequences, its instruction set chosen."""
    return activate(request, monkeypatch)


@pytest.fixture(params=[STANDARD, *EXTENDED_TARGETS], ids=lambda t: t.name)
def any_backend(request, monkeypatch, steady) -> str:
    """The name of each that also knows all other options together with them."""
    return activate(request, monkeypatch).backend


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1)], ids=str)
def test_heads_and_indices(heads, packing_target):
    tensors = packed([4, 9], [9, 4], heads, dtype=packing_target.widest)
    for index in (torch.int32, torch.int64):
        compare(tensors, [4, 9], [9, 4], packing_target.backend, dict(causal=True), index=index)


def test_every_option_at_once(any_backend):
    lengths = [5, 0, 12, 3], [9, 3, 4, 11]
    options = dict(
        causal=True, softcap=4.0, alibi_slopes=torch.rand(4, 4, dtype=torch.float64), sinks=torch.randn(4, dtype=torch.float64),
        bias=torch.randn(4, 1, 12, 11, dtype=torch.float64), mask=torch.rand(1, 4, 12, 11) < 0.8, kv_lengths=torch.tensor([9, 1, 0, 7]),
    )  # fmt: skip
    compare(packed(*lengths), *lengths, any_backend, options, max_seqlen_q=12, max_seqlen_k=11)
    options = dict(alibi_slopes=torch.rand(4), bias=torch.randn(4, 1, 1), mask=torch.rand(4, 1, 1, 11) < 0.7)
    compare(packed(*lengths, dtype=torch.float32), *lengths, any_backend, options)


def test_dropout(any_backend):
    lengths = [5, 0, 12], [9, 3, 4]
    torch.manual_seed(8)
    keep = fae.testing.dropout_mask(fae.testing.next_rng_state(), 3, 4, 12, 9, 0.4)
    compare(packed(*lengths), *lengths, any_backend, dict(dropout_p=0.4), dict(keep=keep), seed=8)


@pytest.mark.parametrize("name", ["scattered", "prefix", "prefixes", "blocks", "head-blocks", "documents"])
def test_typed_masks(name, packing_target):
    """Positions count within the sequence: those of a prefix are shifted by its own lengths."""
    lengths_q, lengths_k = [5, 0, 12], [20, 3, 14]
    typed = draw_typed(name, 3, 4, 12, 20, torch.Generator().manual_seed(2))
    dense = typed.dense
    if name in ("prefix", "prefixes"):
        prefix = typed.mask.prefix_lengths
        dense = torch.zeros(3, 1, 12, 20, dtype=torch.bool)
        for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            own_prefix = PrefixLMMask(prefix if isinstance(prefix, int) else prefix[b : b + 1])
            dense[b, :, :n, :m] = own_prefix.dense(1, 1, n, m)
    call = (packed(lengths_q, lengths_k, dtype=packing_target.widest), lengths_q, lengths_k)
    for known in ({}, dict(max_seqlen_q=12, max_seqlen_k=20)):
        options = dict(mask=typed.mask, **known)
        compare(*call, packing_target.backend, dict(causal=True), dict(mask=dense), **options)


def test_trees(packing_target):
    """The last keys of every sequence are a tree of its own."""
    parents = torch.tensor([[-1, 0, 0], [-1, 0, 1]])
    lengths_q, lengths_k = [3, 4], [5, 9]
    dense = torch.zeros(2, 1, 4, 9, dtype=torch.bool)
    for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        dense[b, :, :n, :m] = TreeMask(parents[b]).dense(1, 1, n, m)
    call = (packed(lengths_q, lengths_k, dtype=packing_target.widest), lengths_q, lengths_k)
    compare(*call, packing_target.backend, {}, dict(mask=dense), mask=TreeMask(parents))


def test_rows_of_no_sequence(packing_target):
    """They are 0 and -inf, get no gradient, and are not read: not even a NaN."""
    lengths = [5, 3], [4, 7]
    tensors = packed(*lengths, beyond=(4, 6), dtype=packing_target.widest)
    how = (*lengths, packing_target.backend, dict(causal=True))
    clean = compare(tensors, *how, **packing_target.repeatable)
    q, k, v, dout, dlse = (t.clone() for t in tensors)
    q[8:], k[11:], v[11:], dout[8:], dlse[:, 8:] = (float("nan"),) * 5
    dirty = compare((q, k, v, dout, dlse), *how, **packing_target.repeatable)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    assert not clean["out"][8:].any() and not clean["dk"][11:].any() and clean["lse"][:, 8:].isneginf().all()


@pytest.mark.parametrize("beyond", [(0, 0), (3, 2)], ids=str)
def test_empty_batch(beyond, packing_target):
    compare(packed([], [], beyond=beyond, dtype=packing_target.widest), [], [], packing_target.backend)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), max_size=5), group=st.sampled_from([1, 3]),
    causal=st.sampled_from([False, True, "top_left"]), window=st.sampled_from([None, (6, None), (0, 9)]), beyond=st.integers(0, 3),
    sinks=st.booleans(), slopes=st.sampled_from([None, "h", "bh"]), blocks=st.sampled_from([None, (4, 7)]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_packing(extended_target, lengths, group, causal, window, beyond, sinks, slopes, blocks, seed):
    lengths_q, lengths_k = ([pair[n] for pair in lengths] for n in (0, 1))
    heads = (2 * group, 2)
    options = dict(causal=causal, window=window)
    if sinks:
        options["sinks"] = torch.randn(heads[0])
    if slopes:
        options["alibi_slopes"] = torch.randn(*((len(lengths),) if slopes == "bh" else ()), heads[0])
    more = dict(config=fae.AttentionConfig(block_q=blocks[0], block_kv=blocks[1])) if blocks else {}
    tensors = packed(lengths_q, lengths_k, heads, beyond=(beyond, 2 * beyond), seed=seed)
    compare(tensors, lengths_q, lengths_k, extended_target.backend, options, **more)


def test_equals_one_call_for_equal_lengths(extended_target):
    q, k, v = (torch.randn(3, n, h, 8, requires_grad=True) for n, h in ((7, 4), (9, 2), (9, 2)))
    options = dict(causal=True, sinks=torch.randn(4), backend=extended_target.backend, return_lse=True)
    out, lse = fae.flash_attention(q, k, v, **options)
    flat, flat_lse = fae.flash_attention_varlen(
        *(t.flatten(0, 1) for t in (q, k, v)), cu([7] * 3), cu([9] * 3), 7, 9, **options
    )
    torch.testing.assert_close(flat.unflatten(0, (3, 7)), out)
    torch.testing.assert_close(flat_lse.unflatten(1, (3, 7)).transpose(0, 1), lse)


def test_forms_of_the_call(extended_target):
    q, k, v, *_ = packed([5, 7], [5, 7], beyond=(1, 0))
    cu_seqlens, options = cu([5, 7]), dict(causal=True, backend=extended_target.backend)
    first = fae.flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, **options)
    for longest in (7, 100, torch.tensor(7), torch.tensor(9, dtype=torch.int32), None):
        again = fae.flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
        assert torch.equal(again, first)
    out = torch.full_like(first, float("nan"))
    assert fae.flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, out=out, **options) is out
    assert torch.equal(out, first)
    strided = q.new_empty(13, 8, 8)[:, ::2].copy_(q)
    assert torch.equal(fae.flash_attention_varlen(strided, k, v, cu_seqlens, cu_seqlens, **options), first)


def test_gradcheck(extended_target):
    q, k, v, *_ = (t.requires_grad_() for t in packed([3, 0, 2], [4, 2, 3], (2, 1), (3, 2)))
    sinks, slopes = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def fn(q, k, v, sinks, slopes):
        return fae.flash_attention_varlen(
            q, k, v, cu([3, 0, 2]), cu([4, 2, 3]), sinks=sinks, alibi_slopes=slopes, causal=True, return_lse=True,
            backend=extended_target.backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(fn, (q, k, v, sinks, slopes))


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiled_with_dynamic_shapes(engine):
    torch._dynamo.reset()

    def fn(q, k, v, cu_q, cu_k, longest):
        return fae.flash_attention_varlen(q, k, v, cu_q, cu_k, longest, longest, causal=True).sin()

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=engine)
    for lengths in ([5, 7], [3, 4, 9]):
        tensors = [t.requires_grad_() for t in packed(lengths, lengths)[:3]]
        arguments = (*tensors, cu(lengths), cu(lengths), max(lengths))
        results = []
        for call in (fn, compiled):
            out = call(*arguments)
            results.append((out, *torch.autograd.grad(out.sum(), tensors)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def wrong_values(name):
    good = torch.tensor([0, 2, 5])
    for values, pattern in (
        ([1, 2, 5], "start with 0.*1"),
        ([0, 3, 2], "decrease.*3.*2"),
        ([0, 2, 6], "6.*5"),
        ([0, -1, 5], "-1"),
    ):
        yield {name: torch.tensor(values)}, rf"{name}.*{pattern}"
    yield {name: good, name.replace("cu_seqlens", "max_seqlen"): 2}, rf"{name}.*3.*2"


@pytest.mark.parametrize(
    ("changes", "pattern"), [*wrong_values("cu_seqlens_q"), *wrong_values("cu_seqlens_k")], ids=str
)
def test_wrong_values_of_cu_seqlens(changes, pattern, extended_target):
    """Found before anything is written."""
    good = torch.tensor([0, 2, 5])
    q, k, v, *_ = packed([2, 3], [2, 3])
    out = torch.full((5, 4, 6), 3.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=pattern):
        fae.flash_attention_varlen(
            q,
            k,
            v,
            **{"cu_seqlens_q": good, "cu_seqlens_k": good, **changes},
            out=out,
            backend=extended_target.backend,
        )
    assert torch.equal(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize(
    ("changes", "kind", "pattern"),
    [(dict(max_seqlen_q=-1), ValueError, "max_seqlen_q.*-1"), (dict(max_seqlen_k=2.5), TypeError, "max_seqlen_k.*float"),
     (dict(max_seqlen_k=torch.tensor([3])), TypeError, r"max_seqlen_k.*\(1,\)"), (dict(max_seqlen_q=torch.tensor(2.0)), TypeError, "max_seqlen_q.*float32"),
     (dict(max_seqlen_q=True), TypeError, "max_seqlen_q.*bool"), (dict(cu_seqlens_q=[0, 2, 5]), TypeError, "cu_seqlens_q.*list"),
     (dict(cu_seqlens_k=None), TypeError, "cu_seqlens_k"), (dict(causal="up"), ValueError, "causal.*up"), (dict(dropout_p=1.5), ValueError, "dropout_p.*1.5"),
     (dict(sinks=[1.0]), TypeError, "sinks.*list"), (dict(alibi_slopes=0.5), TypeError, "alibi_slopes.*float")],
    ids=str,
)  # fmt: skip
def test_wrong_arguments(changes, kind, pattern):
    q, k, v, *_ = packed([2, 3], [2, 3])
    good = {"cu_seqlens_q": cu([2, 3]), "cu_seqlens_k": cu([2, 3])}
    with pytest.raises(kind, match=pattern):
        fae.flash_attention_varlen(q, k, v, **{**good, **changes})


def test_dense_masks_of_the_typed_kind(extended_target):
    seen = torch.rand(2, 1, 7, 7) < 0.7
    lengths = [5, 7]
    mask = CausalMask() & DenseMask(seen) & DocumentMask(torch.arange(7) // 3)
    ids = torch.arange(7) // 3
    dense = seen & (ids[:, None] == ids)
    compare(
        packed(lengths, lengths),
        lengths,
        lengths,
        extended_target.backend,
        dict(causal=True),
        dict(mask=dense),
        mask=mask,
    )
