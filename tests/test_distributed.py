"""Attention over process groups, on gloo: results and gradients against one process."""

from __future__ import annotations

import itertools

import pytest
import rank_jobs
import torch
from rank_cases import (
    BF16,
    F16,
    F32,
    F64,
    PLACEMENTS,
    Case,
    all_heads_cases,
    check,
    check_any,
    held,
    name_of,
    ring_cases,
    run,
)  # fmt: skip
from rank_pool import Raised, needs_gloo
from reference import attend, largest, relative_error

import flash_attn_ext as fae
from flash_attn_ext import masks
from flash_attn_ext._merge import merge
from flash_attn_ext._options import Options
from flash_attn_ext._philox import draw_state
from flash_attn_ext.distributed._kernels import Kernels
from flash_attn_ext.testing import dropout_mask

pytestmark = needs_gloo


@pytest.mark.parametrize("case", ring_cases(), ids=name_of)
def test_ring_is_attention_over_all_keys(pool, case):
    got, whole = run(pool, "ring", case)
    check(case, got, whole)


@pytest.mark.parametrize(
    ("dtype", "scale", "precision"), [(F64, 60.0, 1e-11), (BF16, 1000.0, 0.02), (F16, 1000.0, 0.003)], ids=str
)
def test_ring_knows_scores_far_from_0(pool, dtype, scale, precision):
    """There the kernels take what weights add up to from the keys that they are given."""
    case = Case(3, dtype=dtype, placement="zigzag", scores={"causal": True, "scale": scale}, dlse=False)
    got, whole = run(pool, "ring", case)
    exact = attend(whole["q"], whole["k"], whole["v"], dout=whole["dout"], **case.options)
    assert exact.lse.abs().max() > 2048 or dtype == F64
    for name, value in got.items():
        want = getattr(exact, name)
        size = largest(want)
        # Of what a gradient adds up, where that cancels.
        error = relative_error(value, want) * size / max(size, exact.terms.get(name, 0.0))
        assert error < precision, name


@pytest.mark.cuda
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_kernels_give_what_a_part_of_the_keys_contributes(target, dropout_p):
    """Without a group: two parts of the keys, merged; gradients with the output and LSE of both."""
    whole = Case(1, (20, 20), dtype=F32 if target.on_cuda_kernels else F64).build()
    q, k, v, dout, dlse = (whole[n].to(target.device) for n in ("q", "k", "v", "dout", "dlse"))
    q, k, v, dout = (t.transpose(1, 2) for t in (q, k, v, dout))
    kernels = Kernels.of(q, v, target.backend, True, extended=dropout_p > 0)
    keep, parts = torch.ones(2, 4, 20, 20, dtype=torch.bool), []
    for j in (slice(0, 13), slice(13, 20)):
        state = draw_state(q.device) if dropout_p else None
        if dropout_p:
            keep[..., j] = dropout_mask(state, 2, 4, 20, j.stop - j.start, dropout_p).cpu()
        parts.append((j, Options(dropout_p=dropout_p, rng_state=state, softcap=2.0)))
    found = [kernels.forward(q, k[:, :, j], v[:, :, j], options) for j, options in parts]
    states = (t if t.dim() == 4 else t[..., None] for pair in found for t in pair)
    out, lse = merge(*states, q.dtype)
    saved = (out, lse[..., 0])
    grads = [
        kernels.backward(dout, dlse.to(lse.dtype), q, k[:, :, j], v[:, :, j], *saved, options)
        for j, options in parts
    ]
    got = {"out": out, "lse": lse[..., 0], "dq": grads[0][0] + grads[1][0]}
    got |= {n: torch.cat([grads[0][i], grads[1][i]], 2) for i, n in ((1, "dk"), (2, "dv"))}
    exact = attend(q.cpu(), k.cpu(), v.cpu(), layout="bhsd", softcap=2.0, dout=dout.cpu(), dlse=dlse.cpu(),
                   keep=keep, dropout_p=dropout_p)  # fmt: skip
    for name, value in got.items():
        assert relative_error(value.cpu(), getattr(exact, name)) < (
            3e-6 if target.on_cuda_kernels else 1e-13
        ), name


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("causal", [False, True])
def test_ring_knows_key_lengths(pool, placement, causal):
    case = Case(3, placement=placement, scores={"causal": causal}, sinks=True)
    lengths = torch.tensor([29, 5], dtype=torch.int32)
    got, whole = run(pool, "ring", case, kv_lengths=lengths)
    check(case, got, whole, kv_lengths=lengths)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ring_drops_the_same_in_both_passes(pool, placement, causal):
    """The mask is read off the output where values are unit vectors, and held against the oracle with it."""
    size, p = 3, 0.4
    case = Case(size, placement=placement, scores={"causal": causal}, sinks=True)
    whole = case.build()
    parts, places = case.split(whole), held(placement, size, case.parts[1])
    options = {**case.options, "dropout_p": p, "placement": placement}
    given = [
        (part, options | {"sinks": part["sinks"]}, 3, own) for part, own in zip(parts, places, strict=True)
    ]
    weights = case.join([{"out": w} for w in pool(size).run_each(rank_jobs.weights, given)])["out"]
    keep = weights.transpose(1, 2) != 0
    seen = torch.ones(36, 36, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    rate = keep[..., seen].double().mean().item()
    assert abs(rate - (1 - p)) < 0.04, rate
    jobs = [("ring", part, options, 3) for part in parts]
    got = case.join(pool(size).run_each(rank_jobs.attend, jobs))
    check(case, got, whole, keep=keep, dropout_p=p)
    if not causal:  # all ranks had the same seed, and still no pair has another's mask
        masks_of_pairs = [keep[:, :, rows][..., keys] for rows in places for keys in places]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks_of_pairs, 2))
    other = pool(size).run_each(rank_jobs.attend, [("ring", part, options, 4) for part in parts])
    assert not torch.equal(case.join(other)["out"], got["out"])


@pytest.mark.parametrize(
    ("case", "more"),
    all_heads_cases(),
    ids=lambda x: name_of(x) if isinstance(x, Case) else "-".join(x) or "plain",
)
@pytest.mark.parametrize("kind", ["ulysses", "head_parallel"])
def test_shares_of_heads_make_the_whole(pool, kind, case, more):
    whole = {**case.build(), **{n: t for n, t in more.items() if n in ("bias", "alibi_slopes")}}
    extra = {n: t for n, t in more.items() if n not in whole}
    options = {**case.options, **extra, "backend": case.backend}
    if kind == "head_parallel":
        results = pool(case.size).run(rank_jobs.attend, kind, whole, options)
        for got in results:  # whole on every rank, and the same
            assert all(torch.equal(got[n], results[0][n]) for n in got)
        got = results[0]
    else:
        jobs = [(kind, part, options) for part in case.split(whole)]
        got = case.join(pool(case.size).run_each(rank_jobs.attend, jobs))
    check_any(case, got, whole, extra)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, placement="zigzag", scores={"causal": True}),
        Case(4, placement="striped", heads=(4, 2), scores={"causal": True}, sinks=True, layout="bhsd"),
        Case(3, heads=(3, 3), lengths=((1, 17, 4), (6, 0, 11)), scores={"causal": True, "window": (8, None)}),
        Case(3, heads=(3, 1), lengths=((5, 0, 6), (5, 0, 6)), dtype=F32, sinks=True),
    ],
    ids=name_of,
)
def test_ulysses_knows_placements_and_lengths(pool, case):
    got, whole = run(pool, "ulysses", case)
    check(case, got, whole)


@pytest.mark.parametrize("kind", ["ulysses", "head_parallel"])
def test_typed_masks_are_cut_by_heads(pool, kind):
    case = Case(2, heads=(4, 2))
    whole = case.build()
    blocks = torch.rand(1, 4, 6, 6) > 0.4
    documents = torch.tensor([0] * 9 + [1] * 15)
    mask = masks.BlockSparseMask(blocks, 4, 4) & masks.DocumentMask(documents) & masks.CausalMask()
    jobs = [
        (kind, part, {"mask": mask}) for part in (case.split(whole) if kind == "ulysses" else [whole] * 2)
    ]
    results = pool(2).run_each(rank_jobs.attend, jobs)
    got = case.join(results) if kind == "ulysses" else results[0]
    check(case, got, whole, mask=mask.dense(2, 4, 24, 24))


@pytest.mark.parametrize("kind", ["ulysses", "head_parallel"])
def test_ranks_of_one_seed_drop_differently(pool, kind):
    """Heads that are equal have equal outputs but for what is dropped of them."""
    case = Case(2, heads=(2, 2), batch=1)
    whole = {n: t[:, :, :1].expand_as(t) if n in ("q", "k", "v") else t for n, t in case.build().items()}
    parts = case.split(whole) if kind == "ulysses" else [whole] * 2
    results = pool(2).run_each(rank_jobs.attend, [(kind, part, {"dropout_p": 0.5}) for part in parts])
    out = case.join(results)["out"] if kind == "ulysses" else results[0]["out"]
    assert not torch.allclose(out[:, :, 0], out[:, :, 1])


@pytest.mark.parametrize("kind", ["ring", "ulysses", "head_parallel"])
def test_any_strides_and_no_batch(pool, kind):
    case = Case(2, scores={"causal": True})
    whole = case.build()
    parts = [whole] * 2 if kind == "head_parallel" else case.split(whole)
    jobs = [(kind, part, case.options) for part in parts]
    results = pool(2).run_each(rank_jobs.strided, jobs)
    check(case, results[0] if kind == "head_parallel" else case.join(results), whole)
    # The first entry of the batch, rank 3, and its first head, rank 2.
    first = [{n: t[0] for n, t in part.items()} for part in parts]
    results3 = pool(2).run_each(rank_jobs.attend, [(kind, part, case.options) for part in first])
    for got, expected in zip(results3, results, strict=True):
        for name in got:
            torch.testing.assert_close(got[name], expected[name][0], rtol=1e-12, atol=1e-12)
    if kind == "ring":
        heads = [{n: t[0] if n == "dlse" else t[:, 0] for n, t in part.items()} for part in first]
        results2 = pool(2).run_each(rank_jobs.attend, [(kind, part, case.options) for part in heads])
        for got, expected in zip(results2, results3, strict=True):
            torch.testing.assert_close(got["out"], expected["out"][:, 0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got["dq"], expected["dq"][:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_a_group_may_be_a_part_of_the_world(pool, kind):
    case = Case(2, scores={"causal": True}, sinks=True)
    whole = case.build()
    parts = dict(zip((1, 3), case.split(whole), strict=True))
    jobs = [(kind, parts.get(rank, {}), case.options, 0, (1, 3)) for rank in range(4)]
    results = pool(4).run_each(rank_jobs.attend, jobs)
    check(case, case.join([results[1], results[3]]), whole)


def test_a_group_of_one_is_the_plain_call(pool):
    whole = Case(1).build()
    assert all(pool(2).run(rank_jobs.alone, whole, {"causal": True, "window": (7, 0)}))


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_results_are_repeatable(pool, kind):
    case = Case(3, heads=(6, 3), dtype=F32, placement="zigzag", scores={"causal": True}, sinks=True)
    first, second = (run(pool, kind, case)[0] for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_only_one_of_the_two_results_is_used(pool):
    case = Case(3, scores={"causal": True}, sinks=True, placement="striped")
    for left_out in ("dout", "dlse"):
        whole = case.build()
        del whole[left_out]
        results = pool(3).run_each(
            rank_jobs.attend,
            [("ring", p, case.options | {"placement": "striped"}) for p in case.split(whole)],
        )
        zeros = {"dout": torch.zeros_like(whole["q"]), **whole}
        check(case, case.join(results), zeros)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_hidden_is_never_read(pool, placement):
    case = Case(2, dtype=F32, placement=placement, scores={"causal": True})
    whole = case.build()
    clean = case.join(
        pool(2).run_each(
            rank_jobs.attend,
            [("ring", p, case.options | {"placement": placement}) for p in case.split(whole)],
        )
    )
    whole["k"][:, 20:] = torch.nan
    whole["v"][:, 20:] = torch.inf
    got = case.join(
        pool(2).run_each(
            rank_jobs.attend,
            [("ring", p, case.options | {"placement": placement}) for p in case.split(whole)],
        )
    )
    assert torch.equal(got["out"][:, :20], clean["out"][:, :20])
    assert torch.equal(got["dq"][:, :20], clean["dq"][:, :20])
    assert not got["out"][:, 20:].isfinite().any()


def test_autocast(pool):
    for found in pool(2).run(rank_jobs.autocast, Case(2).build()):
        assert set(found) == {"ring", "ulysses", "head_parallel"}
        assert all(dtypes == [BF16, F32] for dtypes in found.values())


@pytest.mark.parametrize("kind", ["ring", "head_parallel"])
def test_second_derivatives_raise(pool, kind):
    for outcome in pool(2).outcomes(rank_jobs.second_derivatives, [(kind, Case(2).build(), {})] * 2):
        assert isinstance(outcome, Raised) and outcome.kind == "NotImplementedError"
        assert f"{kind}_attention has no gradients of gradients" in outcome.text


@pytest.mark.parametrize("heads", [(4, 2), (2, 1)])
def test_second_derivatives_of_ulysses(pool, heads):
    """A sum over ranks of the squares of what each holds is the sum of all squares."""
    case = Case(2, heads=heads, scores={"causal": True})
    whole = case.build()
    leaves = [whole[n].requires_grad_() for n in ("q", "k", "v")]
    out = fae.flash_attention(*leaves, causal=True)
    first = torch.autograd.grad(out, leaves, whole["dout"], create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    jobs = [("ulysses", part, case.options) for part in case.split({n: t.detach() for n, t in whole.items()})]
    got = case.join(pool(2).run_each(rank_jobs.second_derivatives, jobs))
    for name, want in zip(("dq", "dk", "dv"), expected, strict=True):
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiled_calls_break_the_graph(pool):
    assert all(pool(2).run(rank_jobs.compiled, Case(2).build()))
