"""Attention over process groups: what travels and what is kept, parts of sequences, errors."""

from __future__ import annotations

import itertools

import pytest
import rank_jobs
import torch
from rank_cases import BF16, F32, F64, PLACEMENTS, Case, check, held, run
from rank_pool import Raised, needs_gloo

import flash_attn_ext as fae
from flash_attn_ext import distributed, masks
from flash_attn_ext.distributed import _blocks, _placement

pytestmark = needs_gloo


# What travels, what is kept, and when.


def test_ring_keeps_and_makes_nothing_larger_than_a_part(pool):
    case = Case(4, (64, 64), heads=(2, 1), dim=(8, 8), batch=1, dtype=F32, scores={"causal": True})
    jobs = [("ring", part, case.options) for part in case.split(case.build())]
    part = 64 * 2 * 8
    for found in pool(4).run_each(rank_jobs.memory, jobs):
        assert (
            found["largest"] <= part
        )  # all keys together would have twice as many, and 64 x 256 scores more
        assert found["kept"] == [64 * 2, part]  # lse and out; q, k and v are the caller's own


def test_ring_sends_before_it_computes_and_waits_after(pool):
    case = Case(3)
    for found in pool(3).run_each(
        rank_jobs.events, [(part, case.options) for part in case.split(case.build())]
    ):
        assert found == ["send", "compute", "wait", "send", "compute", "wait", "compute"]


@pytest.mark.parametrize(
    ("placement", "size", "window", "rounds"),
    [
        ("contiguous", 4, None, 3),
        ("contiguous", 4, (3, 0), 1),  # only neighbours see each other
        ("contiguous", 4, (13, 0), 2),
        ("zigzag", 4, (3, 0), 3),
        ("striped", 4, (1, 0), 1),
    ],
)
def test_keys_that_nobody_sees_any_more_stay_where_they_are(pool, placement, size, window, rounds):
    case = Case(size, placement=placement, scores={"causal": True, "window": window}, dim=(8, 4), dtype=BF16)
    options = {**case.options, "placement": placement}
    jobs = [(part, options) for part in case.split(case.build())]
    k, v = 2 * 12 * 2 * 8, 2 * 12 * 2 * 4
    for found in pool(size).run_each(rank_jobs.transfers, jobs):
        # Keys and values in both passes; behind them the sums of their gradients, which at last go home.
        keys, sums = ([(n, str(dtype)) for n in (k, v)] for dtype in (BF16, F32))
        assert sorted(found) == sorted(keys * 2 * rounds + sums * (rounds + 1))


BANDS = [
    (causal, window, shift)
    for causal in (0, 1, 2)
    for window in ((-1, -1), (0, 0), (3, -1), (-1, 2), (4, 9), (40, 1))
    for shift in (0, 1)
]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_blocks_are_exactly_what_is_seen(placement, size):
    """Drawn as a dense mask by the rule of the kernels, each pair of a query and a key at most once."""
    for causal, (left, right), shift in BANDS:
        lengths_q = (6,) * size
        lengths_kv = (6 + 4 * shift,) * size
        if placement == "contiguous":
            lengths_q, lengths_kv = tuple(range(1, size + 1)), (3, *range(2, size + 1))
        seq_q, seq_kv = sum(lengths_q), sum(lengths_kv)
        band = _blocks.Band.of(causal, left, right, seq_q, seq_kv)
        seen = torch.zeros(seq_q, seq_kv, dtype=torch.int)
        furthest = 0
        for rank, source in itertools.product(range(size), repeat=2):
            rows = held(placement, size, list(lengths_q))[rank]
            columns = held(placement, size, list(lengths_kv))[source]
            part = torch.zeros(len(rows), len(columns), dtype=torch.int)
            for b in _blocks.blocks(placement, lengths_q, lengths_kv, band, rank, source):
                assert b.left >= -1 and b.right >= -1
                window = masks.WindowMask(b.left, b.right)
                mask = window.dense(1, 1, b.q_end - b.q_begin, b.k_end - b.k_begin)
                assert (
                    mask.any(-1).all() and mask.any(-2).all()
                )  # nothing that a kernel would look at in vain
                assert b.is_full == bool(mask.all())
                part[b.q_begin : b.q_end, b.k_begin : b.k_end] += mask
                furthest = max(furthest, (rank - source) % size)
            seen[rows[:, None], columns] = part
        i, j = torch.arange(seq_q)[:, None] + seq_kv - seq_q, torch.arange(seq_kv)
        expected = torch.ones(seq_q, seq_kv, dtype=torch.bool)
        if left >= 0:
            expected &= j >= i - left
        if right >= 0:
            expected &= j <= i + right
        if causal:
            expected &= j <= (i if causal == 1 else i - seq_kv + seq_q)
        assert torch.equal(seen, expected.int()), (causal, left, right, shift)
        assert _blocks.steps(placement, lengths_q, lengths_kv, band) == furthest


@pytest.mark.parametrize(("placement", "most"), [("contiguous", 8), ("zigzag", 1.01), ("striped", 1.2)])
def test_zigzag_and_stripes_share_the_work_of_a_triangle(placement, most):
    size, lengths = 4, (64,) * 4
    band = _blocks.Band.of(1, -1, -1, 256, 256)

    def work(rank: int) -> int:
        total = 0
        for source in range(size):
            for b in _blocks.blocks(placement, lengths, lengths, band, rank, source):
                total += int(
                    masks.WindowMask(b.left, b.right)
                    .dense(1, 1, b.q_end - b.q_begin, b.k_end - b.k_begin)
                    .sum()
                )
        return total

    found = [work(rank) for rank in range(size)]
    assert sum(found) == 256 * 257 // 2
    assert 1 <= max(found) / min(found) < most


def test_causal_zigzag_takes_one_call_for_each_peer():
    lengths = (8,) * 3
    band = _blocks.Band.of(1, -1, -1, 24, 24)
    for rank, source in itertools.product(range(3), repeat=2):
        found = _blocks.blocks("zigzag", lengths, lengths, band, rank, source)
        assert len(found) == (2 if rank == source else 1)
        assert rank == source or found[0].is_full


# Whole sequences and parts.


@pytest.mark.parametrize(
    ("placement", "length", "dim", "dtype"),
    [
        ("contiguous", 12, 1, F64),
        ("contiguous", 10, -2, F32),
        ("contiguous", 2, 0, BF16),
        ("zigzag", 12, 1, F64),
        ("striped", 9, 0, F32),
        ("zigzag", 18, 0, torch.int64),
    ],
)
def test_shard_and_gather(pool, placement, length, dim, dtype):
    shape = [2, 3, 4]
    shape[dim] = length
    x = torch.randn(shape).mul(100).to(dtype)
    results = pool(3).run(rank_jobs.shard_and_gather, x, dim, placement)
    lengths = [length // 3 + (rank < length % 3) for rank in range(3)]
    for (part, whole, grad), places in zip(results, held(placement, 3, lengths), strict=True):
        assert torch.equal(part, x.index_select(dim, places)) and part.is_contiguous()
        assert torch.equal(whole, x) and whole.is_contiguous()
        if grad is not None:  # counted once, and whole on every rank
            assert torch.equal(grad, torch.arange(x.numel(), dtype=dtype).view(x.shape))


# Errors.


def refused(pool, jobs: list[tuple], size: int = 2) -> set[tuple[str, str]]:
    """(type, text) of what the ranks raise, all of them."""
    outcomes = pool(size).outcomes(rank_jobs.attend, jobs)
    assert all(isinstance(outcome, Raised) for outcome in outcomes), outcomes
    return {(outcome.kind, outcome.text) for outcome in outcomes}


def one_refusal(pool, kind: str, whole: dict, options: dict, size: int = 2) -> tuple[str, str]:
    [found] = refused(pool, [(kind, whole, options)] * size, size)
    return found


def test_wrong_calls_of_the_ring(pool):
    whole = Case(2, (11, 11)).build()
    whole = {n: t[:, :11] if n != "dlse" else t[..., :11] for n, t in whole.items()}
    for options, kind, text in [
        ({"placement": "zigzag"}, "ValueError", "q must have parts of an even length"),
        (
            {"placement": "zig"},
            "ValueError",
            "placement must be one of 'contiguous', 'zigzag', 'striped', got 'zig'",
        ),
        (
            {"mask": torch.ones(11, 11, dtype=torch.bool)},
            "NotImplementedError",
            "mask must be None in ring_attention",
        ),
        ({"bias": torch.ones(11, 11)}, "NotImplementedError", "bias must be None in ring_attention"),
        (
            {"alibi_slopes": torch.ones(4)},
            "NotImplementedError",
            "alibi_slopes must be None in ring_attention",
        ),
        ({"causal": "left"}, "ValueError", "causal must be one of"),
        ({"window": (-2, 0)}, "ValueError", "window"),
        ({"dropout_p": 1.0}, "ValueError", "dropout_p must lie in [0, 1), got 1.0"),
        ({"sinks": torch.ones(3)}, "ValueError", "sinks"),
        ({"backend": "standard"}, "NotImplementedError", "backend 'standard'"),
        ({"backend": "gpu"}, "ValueError", "backend"),
        ({"deterministic": 1}, "TypeError", "deterministic must be a bool or None"),
    ]:
        found = one_refusal(pool, "ring", whole, options)
        assert found[0] == kind and text in found[1], found
    # The group is as good as before.
    case = Case(2)
    check(case, *run(pool, "ring", case))


@pytest.mark.parametrize("kind", ["ulysses", "head_parallel"])
def test_heads_must_be_shared_out(pool, kind):
    for heads, text in [((3, 3), "q must have heads that the group's size, 2, divides, got 3"),
                        ((6, 3), "k must have heads that are a multiple of the group's size, 2, or divide it, got 3")]:  # fmt: skip
        assert one_refusal(pool, kind, Case(2, heads=heads).build(), {}) == ("ValueError", text)
    found = one_refusal(pool, kind, Case(2).build(), {"mask": torch.ones(5, 7, dtype=torch.bool)})
    assert found[0] == "ValueError" and "mask" in found[1]
    found = one_refusal(pool, kind, Case(2).build(), {"window": 3})
    assert found[0] == "TypeError" and "window must be None or a pair" in found[1]


@pytest.mark.parametrize("kind", ["ring", "ulysses", "head_parallel"])
def test_ranks_that_disagree_all_raise(pool, kind):
    whole = Case(3, heads=(6, 6)).build()
    for change, options, text in [
        (lambda t: t, {"causal": True}, "causal must be the same on all ranks"),
        (lambda t: t[:1], {}, "q's batch" if kind != "head_parallel" else "q's shape"),
        (lambda t: t.float(), {}, "q's dtype must be the same on all ranks"),
    ]:
        jobs = [(kind, whole, {})] * 2 + [(kind, {n: change(t) for n, t in whole.items()}, options)]
        found = refused(pool, jobs, 3)
        assert all(k == "ValueError" and t.startswith(text) for k, t in found), found


def test_parts_that_differ_raise_where_a_placement_forbids_it(pool):
    case = Case(2, lengths=((4, 6), (4, 6)))
    jobs = [("ring", part, {"placement": "striped"}) for part in case.split(case.build())]
    [(kind, text)] = refused(pool, jobs)
    assert kind == "ValueError" and text == (
        "q must have parts of one length with placement='striped', got (4, 6) on the ranks"
    )


CALLS = [
    lambda q: distributed.ring_attention(q, q, q),
    lambda q: distributed.ulysses_attention(q, q, q),
    lambda q: distributed.head_parallel_attention(q, q, q),
    lambda q: distributed.shard_sequence(q),
    lambda q: distributed.gather_sequence(q),
]


@pytest.mark.parametrize("call", CALLS)
def test_without_a_process_group(call, monkeypatch):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match="torch.distributed is not initialised: call"):
        call(q)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="this build of torch has no torch.distributed"):
        call(q)


def test_wrong_arguments_of_the_helpers():
    x = torch.randn(2, 6)
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        distributed.shard_sequence([1])
    with pytest.raises(ValueError, match=r"dim must be an axis of x of shape \(2, 6\), got 2"):
        distributed.gather_sequence(x, 2)
    with pytest.raises(TypeError, match="dim must be an int, got float"):
        distributed.shard_sequence(x, 1.0)
    with pytest.raises(ValueError, match="placement must be one of"):
        distributed.shard_sequence(x, placement="ring")
    with pytest.raises(
        ValueError, match="x must have a length that 4 divides, with placement='zigzag' on 2 ranks, got 6"
    ):
        _placement.split_lengths("x", "zigzag", 6, 2)


def test_the_package_does_not_load_it():
    assert "distributed" not in fae.__all__
