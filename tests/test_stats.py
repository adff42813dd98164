"""`attention_stats` and `plot_attention` against sums over the dense map in fp64."""

from __future__ import annotations

import builtins
import math
import random
from dataclasses import fields

import pytest
import torch
from harness import LargestResult
from reference import distances, to_bhsd, visibility

import flash_attn_ext as fae
from flash_attn_ext import masks
from flash_attn_ext import portable as portable_backend


def dense(
    q,
    k,
    *,
    layout="bshd",
    scale=None,
    softcap=0.0,
    bias=None,
    alibi_slopes=None,
    sinks=None,
    bins=None,
    **hiding,
):
    """All results, (batch, heads, ...) in fp64."""
    q4, k4 = (to_bhsd(x.double(), layout) for x in (q, k))
    shape = (*q4.shape[:3], k4.shape[2])
    k4 = k4.repeat_interleave(q4.shape[1] // k4.shape[1], 1)
    seen = visibility(shape, bias=None if bias is None else bias.double(), **hiding)
    s = torch.where(seen, q4 @ k4.mT, 0.0) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias.double()
    s = s if alibi_slopes is None else s - alibi_slopes.double()[..., None, None] * distances(*shape[2:])
    s = s.masked_fill(~seen, -math.inf)
    sink = torch.full((shape[1],), -math.inf) if sinks is None else sinks
    logits = torch.cat([s, sink.double()[:, None, None].expand(*shape[:3], 1)], -1)
    lse = logits.logsumexp(-1)
    p = torch.where(logits == -math.inf, 0.0, (logits - lse[..., None]).exp())
    entropy = -torch.xlogy(p, p).sum(-1)
    p = p[..., :-1]
    result = {"received": p.sum(-2), "entropy": entropy, "lse": lse}
    result["max_logit"] = (
        s.flatten(2).amax(-1) if s.shape[-1] * s.shape[-2] else lse.new_full(shape[:2], -math.inf)
    )
    if bins is not None:
        grid = bins if isinstance(bins, tuple) else (bins, bins)
        a, b = (
            torch.eye(n, dtype=p.dtype)[torch.arange(size) * n // max(1, size)]
            for n, size in zip(grid, shape[2:], strict=True)
        )
        result["pooled"] = a.T @ p @ b
    return result


def check(q, k, *, rtol=2e-5, **options):
    got, typed = fae.attention_stats(q, k, **options), options.pop("mask", None)
    if typed is not None:
        shape = (
            to_bhsd(q, options.get("layout", "bshd")).shape,
            to_bhsd(k, options.get("layout", "bshd")).shape,
        )
        sizes = (*shape[0][:3], shape[1][2])
        options["mask"] = typed if isinstance(typed, torch.Tensor) else typed.dense(*sizes)
    expected = dense(q, k, **options)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, exact in expected.items():
        value, exact = getattr(got, name), exact[(0,) * (4 - q.dim())]
        assert value.dtype == wide and value.shape == exact.shape and not value.requires_grad, name
        torch.testing.assert_close(
            value.double(), exact, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )
    return got


def choose(g: random.Random):
    """A call with features at random."""
    torch.manual_seed(g.randrange(1 << 30))
    batch, heads_kv, group = g.choice([1, 2]), g.choice([1, 2]), g.choice([1, 3])
    heads, seq_q, seq_kv, dim = (
        heads_kv * group,
        g.choice([1, 7, 40, 65]),
        g.choice([1, 9, 33, 70]),
        g.choice([1, 8, 20]),
    )
    layout = g.choice(["bshd", "bhsd"])
    q, k = torch.randn(batch, heads, seq_q, dim), 2 * torch.randn(batch, heads_kv, seq_kv, dim)
    if layout == "bshd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)

    def broadcast(*full):
        return tuple(g.choice([1, n]) for n in full)

    full = (batch, heads, seq_q, seq_kv)
    some = {
        "causal": lambda: g.choice([True, "top_left"]),
        "scale": lambda: g.choice([0.0, -0.3, 1.5]),
        "mask": lambda: g.choice([
            torch.rand(broadcast(*full)) < 0.6,
            masks.DocumentMask(torch.randint(3, (seq_q,)), torch.randint(3, (seq_kv,))),
            masks.BlockSparseMask(torch.rand(heads, -(-seq_q // 16), -(-seq_kv // 8)) < 0.6, 16, 8),
        ]),
        "bias": lambda: torch.randn(b := broadcast(*full)).masked_fill(torch.rand(b) < 0.2, -math.inf),
        "window": lambda: (g.choice([None, 3, 20]), g.choice([-1, 0, 5])),
        "softcap": lambda: 2.0,
        "alibi_slopes": lambda: torch.rand(g.choice([(heads,), (batch, heads)])),
        "sinks": lambda: torch.randn(heads),
        "kv_lengths": lambda: torch.randint(0, seq_kv + 1, (batch,)),
        "bins": lambda: g.choice([1, 5, (3, 80), (seq_q, seq_kv)]),
    }  # fmt: skip
    return q, k, {"layout": layout, **{n: make() for n, make in some.items() if g.random() < 0.35}}


@pytest.mark.parametrize("small", [False, True], ids=["one-tile", "many-tiles"])
@pytest.mark.parametrize("seed", range(40))
def test_random_features(seed, small, monkeypatch):
    if small:
        monkeypatch.setattr(portable_backend, "tile_shape", lambda *_: (16, 24))
    q, k, options = choose(random.Random(seed))
    check(q, k, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    q, k = torch.randn(2, 30, 4, 16).to(dtype), torch.randn(2, 50, 2, 16).to(dtype)
    check(q, k, causal=True, bins=4, rtol=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_without_batch(rank):
    shapes = ((30, 8), (20, 8)) if rank == 2 else ((30, 4, 8), (20, 2, 8))
    got = check(*map(torch.randn, shapes), causal=True, bins=(4, 3), kv_lengths=torch.tensor([15]))
    assert got.pooled.shape == (*((4,) if rank == 3 else ()), 4, 3)
    assert got.max_logit.shape == ((4,) if rank == 3 else ())


@pytest.mark.parametrize(
    "shapes",
    [((0, 5, 2, 8), (0, 6, 1, 8)), ((2, 0, 2, 8), (2, 6, 1, 8)), ((2, 5, 2, 8), (2, 0, 1, 8))],
    ids=str,
)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])], ids=["", "sinks"])
def test_empty_sizes(shapes, sinks):
    check(*map(torch.randn, shapes), bins=3, sinks=sinks)


def test_what_the_numbers_mean():
    """Uniform rows have entropy ln n; a single key has all the mass; what is unseen is 0 and -inf."""
    q, k = torch.zeros(1, 8, 1, 4), torch.randn(1, 8, 1, 4)
    stats = fae.attention_stats(q, k, causal=True, bins=2)
    torch.testing.assert_close(stats.entropy[0, 0], torch.arange(1, 9).log())
    assert stats.entropy[0, 0, 0] == 0
    torch.testing.assert_close(stats.pooled[0, 0].sum(-1), torch.tensor([4.0, 4.0]))
    assert stats.pooled[0, 0, 0, 1] == 0
    torch.testing.assert_close(stats.received.sum(), torch.tensor(8.0))
    blind = fae.attention_stats(q, k, kv_lengths=torch.tensor([0]))
    assert not blind.received.any() and not blind.entropy.any()
    assert (blind.lse == -math.inf).all() and (blind.max_logit == -math.inf).all() and blind.pooled is None


def test_extreme_scores():
    """A row at finfo.min weighs its keys alike; one score of 1e30 takes all."""
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 6, 1, 8)
    bias = torch.full((4, 6), torch.finfo(torch.float32).min)
    bias[1, 2] = 1e30
    stats = fae.attention_stats(q, k, bias=bias)
    torch.testing.assert_close(stats.entropy[0, 0], torch.tensor([6.0, 1.0, 6.0, 6.0]).log())
    torch.testing.assert_close(stats.received[0, 0, 2], torch.tensor(1.5))


def test_the_lse_is_that_of_attention():
    q, k = torch.randn(2, 100, 4, 16), torch.randn(2, 90, 2, 16)
    options = dict(causal=True, window=(20, 0), softcap=3.0, sinks=torch.randn(4))
    _, lse = fae.flash_attention(q, k, k, return_lse=True, **options)
    torch.testing.assert_close(fae.attention_stats(q, k, **options).lse, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bins", [(3, 4), (40, 64)], ids=str)
def test_a_nan_stays_where_it_is_seen(bins):
    """Of a hidden key nothing is read; a query that is NaN is NaN at the keys that it sees, and nowhere else."""
    q, k = torch.randn(1, 40, 1, 8), torch.randn(1, 64, 1, 8)
    lengths = torch.tensor([50])
    expected = fae.attention_stats(q, k, kv_lengths=lengths, bins=bins)
    k[:, 50:] = math.nan
    got = fae.attention_stats(q, k, kv_lengths=lengths, bins=bins)
    assert all(torch.equal(getattr(got, f.name), getattr(expected, f.name)) for f in fields(got))
    q[:, 7] = math.nan
    got = fae.attention_stats(q, k, kv_lengths=lengths, bins=bins)
    assert got.received[..., :50].isnan().all() and not got.received[..., 50:].any()
    assert got.entropy.isnan().nonzero()[:, -1].tolist() == [7] and got.max_logit.isnan().all()
    row = 7 * bins[0] // 40
    assert got.pooled[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [row]
    hidden = -(-50 * bins[1] // 64)
    assert not got.pooled[..., hidden:].any()


def test_no_gradients_and_no_random_numbers():
    q = torch.randn(1, 8, 2, 8, requires_grad=True)
    state = torch.get_rng_state()
    stats = fae.attention_stats(q, q, bins=2)
    assert not any(getattr(stats, f.name).requires_grad for f in fields(stats))
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast():
    q = torch.randn(1, 8, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = fae.attention_stats(q, q.bfloat16())
    assert torch.equal(got.lse, fae.attention_stats(q.bfloat16(), q.bfloat16()).lse)


def test_nothing_is_as_large_as_the_map():
    seq = 4096
    q = torch.randn(1, seq, 1, 4)
    ids = torch.arange(seq) // 700
    options = dict(mask=masks.DocumentMask(ids), bias=torch.zeros(seq), alibi_slopes=torch.rand(1), bins=64)
    with LargestResult() as largest:
        fae.attention_stats(q, q, causal=True, **options)
    assert 0 < largest.elements <= 512 * 512
    with LargestResult() as largest:
        fae.flash_attention(q, q, q, causal=True, backend="standard")
    assert largest.elements >= seq * seq


WRONG = {
    "q-list": (dict(q=[1.0]), TypeError, "q.*list"),
    "q-rank": (dict(q=torch.randn(8)), ValueError, r"q.*\(8,\)"),
    "q-int": (dict(q=torch.ones(2, 9, 4, 8, dtype=torch.int32)), TypeError, "q.*int32"),
    "q-nested": (dict(q=torch.nested.nested_tensor([torch.randn(3, 4, 8)], layout=torch.jagged)), TypeError, "q.*nested|q.*jagged"),
    "k-dim": (dict(k=torch.randn(2, 11, 2, 7)), ValueError, r"k.*\(2, 11, 2, 7\)"),
    "k-heads": (dict(k=torch.randn(2, 11, 3, 8)), ValueError, r"\(2, 11, 3, 8\)"),
    "k-dtype": (dict(k=torch.randn(2, 11, 2, 8).double()), TypeError, "k.*float64"),
    "mask": (dict(mask=torch.ones(9, 12, dtype=torch.bool)), ValueError, r"mask.*\(9, 12\)"),
    "bias": (dict(bias=torch.ones(9, 11, dtype=torch.int64)), TypeError, "bias.*int64"),
    "layout": (dict(layout="shbd"), ValueError, "layout.*shbd"),
    "causal": (dict(causal="left"), ValueError, "causal.*left"),
    "window": (dict(window=3), TypeError, "window.*3"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap.*-1"),
    "scale": (dict(scale=math.nan), ValueError, "scale.*nan"),
    "sinks": (dict(sinks=torch.randn(3)), ValueError, r"sinks.*\(3,\)"),
    "lengths": (dict(kv_lengths=torch.tensor([1.0, 2.0])), TypeError, "kv_lengths.*float32"),
    "bins-0": (dict(bins=0), ValueError, "bins.*0"),
    "bins-pair": (dict(bins=(4, -1)), ValueError, "bins.*-1"),
    "bins-three": (dict(bins=(4, 4, 4)), TypeError, r"bins.*\(4, 4, 4\)"),
    "bins-float": (dict(bins=4.0), TypeError, r"bins.*4\.0"),
    "bins-bool": (dict(bins=True), TypeError, "bins.*True"),
}  # fmt: skip


@pytest.mark.parametrize("function", [fae.attention_stats, fae.plot_attention], ids=["stats", "plot"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, function):
    changes, kind, pattern = WRONG[name]
    with pytest.raises(kind, match=pattern):
        function(**{"q": torch.randn(2, 9, 4, 8), "k": torch.randn(2, 11, 2, 8), **changes})


def drawn(figure):
    """The values of the picture."""
    return torch.from_numpy(figure.axes[0].images[0].get_array().filled(0.0)).double()


@pytest.mark.parametrize("head", [None, 1, -1])
def test_plot(head, tmp_path):
    pytest.importorskip("matplotlib")
    q, k = torch.randn(2, 37, 4, 8), torch.randn(2, 50, 2, 8)
    slopes, sinks, bias = torch.rand(4), torch.randn(4), torch.randn(4, 1, 50)
    options = dict(
        causal=True, alibi_slopes=slopes, sinks=sinks, bias=bias, mask=torch.rand(2, 1, 37, 1) < 0.9
    )
    figure = fae.plot_attention(q, k, bins=(6, 100), head=head, path=tmp_path / "map.png", **options)
    assert (tmp_path / "map.png").stat().st_size > 1000
    cells = dense(q, k, bins=(6, 50), **options)["pooled"].mean(0)
    cells = cells.mean(0) if head is None else cells[head]
    rows = torch.bincount(torch.arange(37) * 6 // 37)[:, None]
    torch.testing.assert_close(drawn(figure), cells / rows, rtol=1e-4, atol=1e-6)


def test_plot_of_one_head_without_batch_and_of_nothing():
    pytest.importorskip("matplotlib")
    q = torch.randn(20, 8)
    assert drawn(fae.plot_attention(q, q, bins=4)).shape == (4, 4)
    assert not drawn(fae.plot_attention(q, q, mask=torch.tensor(False), bins=4)).any()
    for arguments, kind, pattern in [
        (dict(head=2), ValueError, "head.*2"), (dict(head=-3), ValueError, "head.*-3"), (dict(head="a"), TypeError, "head.*a"),
        (dict(k=torch.randn(1, 0, 2, 8)), ValueError, r"k.*\(1, 0, 2, 8\)"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=pattern):
            fae.plot_attention(**{"q": torch.randn(1, 5, 2, 8), "k": torch.randn(1, 5, 2, 8), **arguments})


def test_plot_without_matplotlib(monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="plot_attention needs matplotlib: pip install"):
        fae.plot_attention(torch.randn(4, 8), torch.randn(4, 8))
