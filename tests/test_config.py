"""`AttentionConfig`: presets, checks, and what its advice does on each backend."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from cases import CASES, Case, build
from harness import complaints, prepared, run
from torch._dynamo.testing import CompileCounter

import flash_attn_ext as fae
from flash_attn_ext import _C, dispatch


def qkv(*shape):
    return [torch.randn(*shape) for _ in range(3)]


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "rtx4090", "cpu", "RTX 4090", "A100"])
def test_presets(name):
    config = fae.AttentionConfig.for_device(name)
    assert config.block_q >= 1 and config.block_kv >= 1
    assert config.sram_bytes(64, torch.float16) == (config.block_q + 2 * config.block_kv) * 64 * 2
    assert config.sram_bytes(128, torch.float32) == 4 * config.sram_bytes(64, torch.float16)


def test_preset_of_a_device():
    assert fae.AttentionConfig.for_device(torch.device("cpu")) == fae.AttentionConfig.for_device("cpu")


@pytest.mark.parametrize("name", ["commodore64", "", 3, None])
def test_unknown_preset(name):
    with pytest.raises((ValueError, TypeError)) as caught:
        fae.AttentionConfig.for_device(name)
    assert not isinstance(name, str) or "a100" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [dict(block_q=0), dict(block_kv=-1), dict(num_splits=0), dict(block_q=1.5), dict(backend="tpu"), dict(backend=3),
     dict(softmax_scale=math.nan), dict(softmax_scale=math.inf), dict(softmax_scale="x"), dict(num_splits="2"), dict(block_kv=True)],
    ids=str,
)  # fmt: skip
def test_wrong_values(changes):
    with pytest.raises((ValueError, TypeError), match=next(iter(changes))):
        fae.AttentionConfig(**changes)


def test_configs_are_values():
    a, b = fae.AttentionConfig(block_q=64), fae.AttentionConfig(block_q=64)
    assert a == b and a != fae.AttentionConfig() and "64" in repr(a)


@pytest.mark.parametrize("backend", ["cpu", "portable", "standard"])
def test_tiles_and_splits_do_not_change_the_result(backend):
    inputs = build(Case("config", heads=(4, 2), seq=(70, 200), causal=True), torch.float64)
    expected = fae.flash_attention(inputs.q, inputs.k, inputs.v, causal=True)
    for config in (fae.AttentionConfig(block_q=1, block_kv=1), fae.AttentionConfig(block_q=33, block_kv=7, num_splits=3),
                   fae.AttentionConfig(block_q=4096, block_kv=4096), fae.AttentionConfig.for_device("h100")):  # fmt: skip
        out = fae.flash_attention(inputs.q, inputs.k, inputs.v, causal=True, config=config, backend=backend)
        torch.testing.assert_close(out, expected)


def test_scale_and_backend_come_from_the_config_unless_given():
    q, k, v = qkv(1, 9, 2, 8)
    config = fae.AttentionConfig(softmax_scale=0.1, backend="portable")
    assert torch.equal(
        fae.flash_attention(q, k, v, config=config),
        fae.flash_attention(q, k, v, scale=0.1, backend="portable"),
    )
    torch.testing.assert_close(
        fae.flash_attention(q, k, v, scale=0.7, config=config), fae.flash_attention(q, k, v, scale=0.7)
    )
    assert fae.explain(q, k, v, config=config).backend == "portable"
    assert fae.explain(q, k, v, config=config, backend="cpu").backend == "cpu"


# Problems of many tiles in every option, at sizes that no tile divides.
MANY_TILES = [c for c in CASES if c.name.startswith(("block-", "seq-", "product-")) and max(c.seq) > 100][::5]


@pytest.mark.parametrize("blocks", [(1, 1), (50, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MANY_TILES, ids=lambda c: c.name)
def test_advised_blocks_are_as_exact(case, dtype, blocks, cpu_target):
    inputs, exact, errors = prepared(case, dtype)
    config = fae.AttentionConfig(block_q=blocks[0], block_kv=blocks[1])
    found = complaints(run(inputs, "cpu", config=config), inputs, exact, errors)
    assert not found, "\n".join([str(case), *found])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_explain_shows_the_blocks_that_are_used(backward, cpu_target):
    q, k, v = torch.randn(1, 3000, 4, 64), torch.randn(1, 5000, 2, 64), torch.randn(1, 5000, 2, 64)

    def plan(**advice):
        return fae.explain(q, k, v, config=fae.AttentionConfig(**advice), backward=backward)

    own = fae.explain(q, k, v, backward=backward)
    rows, columns = own.register_tile
    assert plan() == own
    for block_q, block_kv in [(1, 1), (rows, columns), (rows + 1, columns + 1), (128, 256)]:
        got = plan(block_q=block_q, block_kv=block_kv)
        # Rounded up to whole register tiles.
        assert 0 <= got.block_q - block_q < rows and got.block_q % rows == 0
        assert 0 <= got.block_kv - block_kv < columns and got.block_kv % columns == 0
    assert plan(block_q=48).block_kv == own.block_kv
    assert plan(block_kv=columns).block_kv == columns
    if not backward:
        assert plan(block_q=rows).tasks == 2 * -(-6000 // rows)
    huge = plan(block_q=2**62, block_kv=2**62)
    assert huge.block_q >= own.block_q and huge.block_kv >= own.block_kv
    assert huge.workspace_bytes < 64 << 20
    # What there is to do bounds them too.
    small = fae.explain(q[:, :3], k[:, :5], v[:, :5], config=fae.AttentionConfig(128, 256), backward=backward)
    assert small.block_q == -(-6 // rows) * rows and small.block_kv == columns


def test_explain_shows_the_blocks_of_portable():
    q = torch.randn(2, 300, 4, 16)
    plan = fae.explain(q, q, q, backend="portable", config=fae.AttentionConfig(block_q=7, block_kv=9))
    assert (plan.block_q, plan.block_kv) == (7, 9)
    plan = fae.explain(q, q, q, backend="portable", batch_invariant=True)
    assert plan.block_q == 1
    flat = torch.randn(30, 8)
    for backend in ("cpu", "portable", "standard"):
        assert fae.explain(flat, flat[:20], flat[:20], backend=backend).block_kv >= 20


def test_the_kernel_runs_the_blocks_that_explain_shows(cpu_target):
    """The order of a row's sum depends on block_kv: other sizes, other last bits; the same size, the same bits."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g) for n in (40, 2000, 2000))
    columns = fae.explain(q, k, v).register_tile[1]

    def out(block_q, block_kv):
        return fae.flash_attention(q, k, v, config=fae.AttentionConfig(block_q=block_q, block_kv=block_kv))

    own = fae.explain(q, k, v).block_kv
    assert torch.equal(out(None, own), fae.flash_attention(q, k, v))
    assert not torch.equal(out(None, columns), out(None, own))
    for block_q in (1, 7, 4096):  # rows do not depend on the rows beside them
        assert torch.equal(out(block_q, columns), out(None, columns))


@pytest.mark.parametrize("threads", [1, 3])
def test_advised_results_do_not_depend_on_threads(threads, cpu_target):
    inputs = build(Case("threads", heads=(2, 1), seq=(450, 300), causal=True, bias="1hqk"), torch.float32)
    config = fae.AttentionConfig(block_q=20, block_kv=70)
    expected = run(inputs, "cpu", config=config)
    torch.set_num_threads(threads)
    got = run(inputs, "cpu", config=config)
    assert all(torch.equal(got[n], expected[n]) for n in got)


def test_advice_goes_through_every_way_to_call(backend):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g) for n in (40, 2000, 2000))
    options = {"config": fae.AttentionConfig(block_q=8, block_kv=64), "backend": backend}
    expected, lse = fae.flash_attention(q, k, v, return_lse=True, **options)
    assert not torch.equal(expected, fae.flash_attention(q, k, v, backend=backend))
    leaf = q.clone().requires_grad_()
    compiled = torch.compile(
        lambda q: fae.flash_attention(q, k, v, **options), fullgraph=True, backend="eager"
    )
    for other in (
        fae.flash_attention(leaf, k, v, **options),
        fae.flash_attention(q, k, v, out=torch.empty_like(q), **options),
        fae.create_attention(options["config"])(q, k, v) if backend == "cpu" else expected,
        compiled(q),
    ):
        assert torch.equal(other, expected)
    grads = []
    for config in (None, options["config"]):
        out = fae.flash_attention(leaf, k, v, config=config, backend=backend)
        grads.append(torch.autograd.grad(out.sin().sum(), leaf)[0])
    torch.testing.assert_close(*grads)
    assert not torch.equal(*grads)


def test_negative_blocks_of_the_raw_operator_are_no_advice():
    q = torch.randn(1, 9, 2, 8)
    arguments = (q, q, q, None, None, None, 0, 0, -1, -1, None, 0.0, True)
    for a, b in zip(
        torch.ops.flash_attn_ext.attention_forward(*arguments),
        torch.ops.flash_attn_ext.attention_forward(*arguments, -5, -(2**62)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("backend", "options", "unused"),
    [
        ("cpu", {"num_splits": 3}, []),
        ("portable", {"num_splits": 2, "block_q": 4}, ["num_splits"]),
        ("standard", {"block_q": 4, "block_kv": 4}, ["block_q", "block_kv"]),
        ("cpu", {"block_q": 4, "block_kv": 4}, []),
        ("portable", {"block_q": 4, "block_kv": 4}, []),
    ],
)
def test_advice_that_is_not_taken_is_logged_once(backend, options, unused, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    q = torch.randn(1, 9, 2, 8)
    with caplog.at_level(logging.WARNING, logger="flash_attn_ext"):
        for _ in range(3):
            fae.flash_attention(q, q, q, backend=backend, config=fae.AttentionConfig(**options))
    assert [r.levelname for r in caplog.records] == ["WARNING"] * len(unused)
    for field, record in zip(unused, caplog.records, strict=True):
        assert f"config.{field}" in record.message and repr(backend) in record.message


def test_compiled_calls_do_not_depend_on_what_was_logged(monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    counter = CompileCounter()

    def calls(q):
        return fae.flash_attention(q, q, q) + fae.scaled_dot_product_attention(q, q, q)

    torch._dynamo.reset()
    compiled, q = torch.compile(calls, fullgraph=True, backend=counter), torch.randn(1, 8, 2, 16)
    compiled(q)
    calls(q)
    dispatch.log_once(logging.DEBUG, "something else")
    compiled(q)
    assert counter.frame_count == 1


def test_batch_invariance_goes_before_block_q(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    q = torch.randn(1, 9, 2, 8)
    with caplog.at_level(logging.WARNING, logger="flash_attn_ext"):
        advised = fae.flash_attention(
            q, q, q, backend="portable", batch_invariant=True, config=fae.AttentionConfig(block_q=4)
        )
    assert "config.block_q" in caplog.text
    assert torch.equal(advised, fae.flash_attention(q, q, q, backend="portable", batch_invariant=True))


def test_plans_of_described_calls_take_advice():
    place = ((1, 300, 2, 64), (38400, 128, 64, 1), "float32", "cpu")
    desc = {"q": place, "k": place, "v": place}
    columns = _C.plan(desc)["register_tile"][1]
    assert _C.plan(desc, block_kv=1)["block_kv"] == columns
    assert _C.explain(desc, block_kv=1)["plan"]["block_kv"] == columns
