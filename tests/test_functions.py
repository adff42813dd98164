"""The functions around attention: merging, explaining, estimating, configuring, choosing, logging."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from cases import Case, build

import flash_attn_ext as fae
from flash_attn_ext import _C


def halves(dtype=torch.float32, layout="bshd", rank=4):
    inputs = build(Case("halves", batch=2 if rank == 4 else 1, heads=(4, 2) if rank > 2 else (1, 1), seq=(9, 20),
                        dim=(8, 6), layout=layout, rank=rank), dtype)  # fmt: skip
    axis = {4: 1, 3: 0, 2: 0}[rank] if layout == "bshd" else {4: 2, 3: 1, 2: 0}[rank]
    parts = []
    for start, length in ((0, 7), (7, 13)):
        k, v = (x.narrow(axis, start, length) for x in (inputs.k, inputs.v))
        parts += fae.flash_attention(inputs.q, k, v, layout=layout, return_lse=True)
    whole = fae.flash_attention(inputs.q, inputs.k, inputs.v, layout=layout, return_lse=True)
    return parts, whole


class TestMergeStates:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("layout", ["bshd", "bhsd"])
    @pytest.mark.parametrize("rank", [4, 3, 2])
    def test_halves_make_the_whole(self, rank, layout, dtype):
        parts, (out, lse) = halves(dtype, layout, rank)
        merged, merged_lse = fae.merge_states(*parts, layout=layout)
        assert merged.dtype == out.dtype and merged_lse.dtype == lse.dtype and merged.shape == out.shape
        loose = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(merged, out, rtol=0, atol=loose)
        torch.testing.assert_close(merged_lse, lse, rtol=1e-6, atol=1e-6)

    def test_commutes_and_has_an_empty_element(self):
        (out_a, lse_a, out_b, lse_b), _ = halves()
        ab, ba = fae.merge_states(out_a, lse_a, out_b, lse_b), fae.merge_states(out_b, lse_b, out_a, lse_a)
        torch.testing.assert_close(ab, ba)
        nothing = torch.full_like(out_a, float("nan")), torch.full_like(lse_a, -math.inf)
        for merged in (fae.merge_states(out_a, lse_a, *nothing), fae.merge_states(*nothing, out_a, lse_a)):
            assert torch.equal(merged[0], out_a) and torch.equal(merged[1], lse_a)
        out, lse = fae.merge_states(*nothing, *nothing)
        assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, nothing[1])

    def test_associates(self):
        inputs = build(Case("thirds", heads=(2, 2), seq=(9, 30), dim=(8, 6)), torch.float64)
        a, b, c = (
            fae.flash_attention(inputs.q, inputs.k[:, s : s + 10], inputs.v[:, s : s + 10], return_lse=True)
            for s in (0, 10, 20)
        )
        left, right = (
            fae.merge_states(*fae.merge_states(*a, *b), *c),
            fae.merge_states(*a, *fae.merge_states(*b, *c)),
        )
        torch.testing.assert_close(left, right)

    def test_large_and_distant_states(self):
        out = torch.ones(1, 1, 1, 2)
        for big, small in ((5000.0, -5000.0), (3e38, -3e38), (80.0, -80.0)):
            merged, lse = fae.merge_states(
                out, torch.full((1, 1, 1), big), 3 * out, torch.full((1, 1, 1), small)
            )
            assert torch.equal(merged, out) and lse.item() == torch.tensor(big).item()

    def test_gradcheck(self):
        parts, _ = halves(torch.float64)
        parts = [
            p.detach()[:1, :3].requires_grad_() if p.dim() == 4 else p.detach()[:1, :, :3].requires_grad_()
            for p in parts
        ]
        assert torch.autograd.gradcheck(fae.merge_states, parts)

    def test_gradients_of_empty_states_are_zero(self):
        parts, _ = halves(torch.float64)
        parts[1] = parts[1].masked_fill(torch.arange(9) < 3, -math.inf)
        parts[3] = parts[3].masked_fill(torch.arange(9) % 3 == 0, -math.inf)
        leaves = [p.detach().requires_grad_() for p in parts]
        out, lse = fae.merge_states(*leaves)
        grads = torch.autograd.grad(out.sum() + torch.where(lse.isfinite(), lse, 0.0).sum(), leaves)
        assert all(torch.isfinite(g).all() for g in grads)
        assert not grads[0][:, :3].any() and not grads[2][:, ::3].any()

    @pytest.mark.parametrize(
        ("position", "value", "pattern"),
        [(0, torch.zeros(2, 9, 4, 5), r"\(2, 9, 4, 5\)"), (1, torch.zeros(2, 9, 4), r"lse_a.*\(2, 9, 4\)"),
         (2, torch.zeros(2, 8, 4, 6), r"out_b.*\(2, 8, 4, 6\)"), (3, torch.zeros(4, 9), r"lse_b.*\(4, 9\)"),
         (0, [1.0], "out_a.*list"), (3, None, "lse_b.*None"), (1, torch.zeros(2, 4, 9, dtype=torch.int32), "lse_a.*int32"),
         (2, torch.zeros(2, 9, 4, 6, dtype=torch.int64), "out_b.*int64")],
    )  # fmt: skip
    def test_wrong_input(self, position, value, pattern):
        parts, _ = halves()
        parts[position] = value
        with pytest.raises((ValueError, TypeError), match=pattern):
            fae.merge_states(*parts)

    def test_unknown_layout(self):
        with pytest.raises(ValueError, match="layout.*sbhd"):
            fae.merge_states(*halves()[0], layout="sbhd")


# "documents": keys per document; "dense": the share of keys that a mask hides, beside whole blocks.
BATCH_INVARIANT_OPTIONS = {
    "causal": {"causal": True},
    "window": {"window": (150, 0)},
    "two-sided window": {"window": (37, 70), "softcap": 2.0},
    "documents": {"documents": 170},
    "documents, causal": {"documents": 45, "causal": True},
    "dense mask": {"dense": 0.5},
}


def qkv(*shape, **kw):
    return [torch.randn(*shape, **kw) for _ in range(3)]


class TestExplain:
    def test_cpu(self, cpu_target):
        plan = fae.explain(*qkv(1, 512, 4, 64), causal=True)
        assert plan.backend == "cpu" and plan.isa == cpu_target.isa and plan.kernel
        assert plan.block_q >= 1 and plan.block_kv >= 1 and plan.threads >= 1 and plan.tasks >= 1
        assert 0 < plan.workspace_bytes < 64 * 2**20 and plan.flops > 0 and plan.arithmetic_intensity > 0
        assert plan.kernel in str(plan) and "cpu" in str(plan)

    @pytest.mark.parametrize("name", ["cpu", "portable", "standard"])
    def test_backends_and_rejections(self, name):
        plan = fae.explain(*qkv(1, 64, 2, 16), backend=name)
        assert plan.backend == name
        assert set(plan.rejected) == {"cpu", "portable", "standard"} - {name} or "cuda" in plan.rejected
        assert all(
            reasons and all(isinstance(r, str) and r for r in reasons) for reasons in plan.rejected.values()
        )

    def test_work_that_is_hidden_is_not_counted(self):
        q, k, v = qkv(1, 4096, 2, 64)
        dense = fae.explain(q, k, v).flops
        assert dense == pytest.approx(4 * 4096 * 4096 * 2 * 64)
        assert fae.explain(q, k, v, causal=True).flops < 0.6 * dense
        assert fae.explain(q, k, v, window=(100, 0)).flops < 0.15 * dense
        assert fae.explain(q, k, v, kv_lengths=torch.tensor([1024])).flops < 0.3 * dense
        assert fae.explain(q, k, v, backward=True).flops == pytest.approx(2.5 * dense, rel=0.05)

    def test_bytes_and_threads(self):
        q, k, v = qkv(2, 300, 4, 64)
        assert fae.explain(q, k, v).bytes == pytest.approx(4 * q.numel() * 4, rel=0.05)
        torch.set_num_threads(1)
        assert fae.explain(q, k, v).threads == 1

    def test_gqa_reads_keys_once(self):
        q, k, v = torch.randn(1, 300, 8, 64), torch.randn(1, 300, 1, 64), torch.randn(1, 300, 1, 64)
        assert fae.explain(q, k, v).bytes == pytest.approx(4 * 300 * 64 * (8 + 1 + 1 + 8), rel=0.05)

    def test_meta_tensors_and_nothing_is_run(self):
        q = torch.empty(1, 2**20, 8, 64, device="meta")
        plan = fae.explain(q, q, q, causal=True)
        assert plan.flops > 1e14 and plan.workspace_bytes < 2**28

    def test_wrong_calls_raise_what_the_call_raises(self):
        q, k, v = qkv(1, 8, 2, 16)
        for changes in (dict(k=k[..., :8]), dict(scale=math.nan), dict(window=(-4, 0)), dict(mask=torch.zeros(8, 8)),
                        dict(backend="tpu"), dict(v=v.double()), dict(layout="x")):  # fmt: skip
            arguments = {"q": q, "k": k, "v": v, **changes}
            with pytest.raises((ValueError, TypeError)) as ours:
                fae.explain(**arguments)
            with pytest.raises((ValueError, TypeError)) as theirs:
                fae.flash_attention(**arguments)
            assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))

    def test_empty_problem(self):
        q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 0, 2, 8), torch.randn(1, 0, 2, 8)
        assert fae.explain(q, k, v).flops == 0


class TestEstimateMemory:
    def test_numbers(self):
        e = fae.estimate_memory(1, 8, 8192, 8192, 64, torch.float32)
        out, scores, lse = 8 * 8192 * 64 * 4, 8 * 8192 * 8192 * 4, 8 * 8192 * 4
        assert e.standard_bytes == out + 2 * scores and e.flash_bytes == out + lse
        assert e.ratio == pytest.approx(e.standard_bytes / e.flash_bytes)

    @pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float64, 8)])
    def test_dtypes(self, dtype, size):
        e = fae.estimate_memory(2, 4, 100, 300, 32, dtype)
        assert e.standard_bytes == 2 * 4 * size * (100 * 32 + 2 * 100 * 300)

    def test_ratio_grows_with_length_and_zero_is_legal(self):
        ratios = [fae.estimate_memory(1, 8, s, s, 64, torch.bfloat16).ratio for s in (128, 1024, 8192, 65536)]
        assert ratios == sorted(ratios) and ratios[-1] > 1000
        fae.estimate_memory(0, 8, 0, 0, 64, torch.float32).ratio

    @pytest.mark.parametrize(
        ("position", "value", "pattern"),
        [(0, -1, "batch.*-1"), (1, 1.5, "heads.*(1.5|float)"), (2, "x", "seq_q.*(x|str)"), (3, -8, "seq_kv.*-8"), (4, None, "dim.*None"),
         (5, "float32", "dtype.*(float32|str)"), (5, torch.int32, "dtype.*int32")],
    )  # fmt: skip
    def test_wrong_input(self, position, value, pattern):
        arguments = [1, 8, 128, 128, 64, torch.float32]
        arguments[position] = value
        with pytest.raises((ValueError, TypeError), match=pattern):
            fae.estimate_memory(*arguments)


class TestModule:
    def test_forward_with_each_kind_of_mask(self):
        attention = fae.create_attention(fae.AttentionConfig(softmax_scale=0.3))
        assert isinstance(attention, torch.nn.Module) and isinstance(attention, fae.Attention)
        q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
        seen, bias = torch.rand(2, 1, 9, 12) < 0.7, torch.randn(4, 9, 12)
        expected = fae.flash_attention(q, k, v, scale=0.3)
        assert torch.equal(attention(q, k, v), expected)
        assert torch.equal(
            attention(q, k, v, causal=True), fae.flash_attention(q, k, v, causal=True, scale=0.3)
        )
        assert torch.equal(attention(q, k, v, mask=seen), fae.flash_attention(q, k, v, mask=seen, scale=0.3))
        assert torch.equal(attention(q, k, v, bias), fae.flash_attention(q, k, v, bias=bias, scale=0.3))

    def test_is_an_ordinary_module(self):
        attention = fae.create_attention()
        assert not list(attention.parameters()) and not attention.state_dict()
        assert "Attention" in repr(torch.nn.Sequential(attention))
        q = torch.randn(1, 5, 2, 4, requires_grad=True)
        attention(q, q, q).sum().backward()
        assert q.grad is not None
        import copy
        import pickle

        for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert torch.equal(twin(q, q, q), attention(q, q, q))

    def test_wrong_input(self):
        q = torch.randn(1, 5, 2, 4)
        with pytest.raises(TypeError, match="config"):
            fae.create_attention("fast")
        with pytest.raises((TypeError, ValueError), match="mask.*int64"):
            fae.create_attention()(q, q, q, mask=torch.ones(5, 5, dtype=torch.int64))


class TestChoosing:
    def test_available_backends(self):
        # A test before this one may have loaded the emulator.
        listed = [name for name in fae.available_backends() if name != "cuda_emulated"]
        card = [] if "cuda" in fae.dispatch.unavailable() else ["cuda"]
        assert listed == ["cpu", *card, "portable", "standard"]

    def test_set_backend(self):
        q, k, v = qkv(1, 9, 2, 8)
        try:
            fae.set_backend("portable")
            assert fae.explain(q, k, v).backend == "portable"
            assert fae.explain(q, k, v, backend="cpu").backend == "cpu"
        finally:
            fae.set_backend("auto")
        assert fae.explain(q, k, v).backend == "cpu"
        for name in ("tpu", ""):
            with pytest.raises(ValueError, match="backend"):
                fae.set_backend(name)
        assert fae.explain(q, k, v).backend == "cpu"

    def test_build_info(self):
        info = fae.build_info()
        assert info["active_isa"] == _C.active_isa() and info["cpu_isas"] == _C.cpu_isas()
        assert info["backends"] == fae.available_backends()
        assert info["torch"] == torch.__version__

    def test_unknown_isa(self, monkeypatch):
        q, k, v = qkv(1, 9, 2, 8)
        monkeypatch.setenv("FLASH_ATTN_EXT_CPU_ISA", "sse9")
        with pytest.raises((ValueError, RuntimeError), match="FLASH_ATTN_EXT_CPU_ISA.*sse9"):
            fae.flash_attention(q, k, v)

    def test_portable_serves_other_devices(self):
        """A device without kernels: auto falls to portable, cpu refuses by name."""
        q = torch.empty(1, 9, 2, 8, device="meta")
        assert fae.flash_attention(q, q, q, backend="portable").shape == q.shape
        with pytest.raises((ValueError, NotImplementedError, TypeError), match="meta"):
            fae.flash_attention(q, q, q, backend="cpu")

    def test_gradients_flow_whatever_the_backend(self, backend):
        q, k, v = (x.requires_grad_() for x in qkv(1, 9, 2, 8))
        grads = torch.autograd.grad(fae.flash_attention(q, k, v, backend=backend).sum(), [q, k, v])
        plain = torch.autograd.grad(fae.flash_attention(q, k, v, backend="standard").sum(), [q, k, v])
        torch.testing.assert_close(grads, plain, rtol=1e-5, atol=1e-5)

    def test_deterministic_and_batch_invariant_are_accepted(self, backend):
        q, k, v = qkv(2, 9, 2, 8)
        expected = fae.flash_attention(q, k, v, backend=backend)
        for options in (dict(deterministic=True), dict(deterministic=False), dict(batch_invariant=True)):
            torch.testing.assert_close(fae.flash_attention(q, k, v, backend=backend, **options), expected)

    def test_batch_invariant_bits(self, cpu_target):
        """Independent of the batch size and of how queries are chunked."""
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (
                torch.randn(3, n, 2, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
                for n in (200, 300, 300)
            )
            whole = fae.flash_attention(q, k, v, batch_invariant=True)
            for b in range(3):
                assert torch.equal(
                    fae.flash_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], batch_invariant=True),
                    whole[b : b + 1],
                )
            for start, rows in ((0, 67), (1, 67), (64, 67), (131, 67), (3, 5), (150, 1)):
                part = fae.flash_attention(q[:, start : start + rows], k, v, batch_invariant=True)
                assert torch.equal(part, whole[:, start : start + rows]), (start, rows)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("options", BATCH_INVARIANT_OPTIONS)
    def test_batch_invariant_bits_where_keys_are_hidden(self, cpu_target, options, dtype):
        """Which keys a tile of rows leaves out depends on all of its rows, and must not show in any."""
        random = torch.Generator().manual_seed(2)
        q, k, v = (torch.randn(1, 600, h, 32, generator=random).to(dtype) for h in (6, 2, 2))
        options, mask = dict(BATCH_INVARIANT_OPTIONS[options]), None
        if "documents" in options:
            mask = torch.arange(600) // options.pop("documents")
        elif "dense" in options:
            mask = torch.rand(600, 600, generator=random) > options.pop("dense")
            mask[:, ::7] |= (torch.arange(600) // 90 % 3 == 0)[:, None]
            mask[300:450, 100:300] = False

        def attend(rows):
            part = mask if mask is None else mask[-rows:]
            if mask is not None and mask.dim() == 1:
                part = fae.masks.DocumentMask(part, mask)
            return fae.flash_attention(q[:, -rows:], k, v, mask=part, batch_invariant=True, **options)

        whole = attend(600)
        for rows in (599, 598, 301, 100, 37, 1):
            assert torch.equal(attend(rows), whole[:, -rows:]), rows

    def test_batch_invariant_gradients(self, cpu_target):
        """Of one batch alone and among as many that its rows would be cut otherwise."""
        leaves = [torch.randn(40, 600, 1, 16, requires_grad=True) for _ in range(3)]
        dout = torch.randn(40, 600, 1, 16)
        grads = torch.autograd.grad(fae.flash_attention(*leaves, batch_invariant=True), leaves, dout)
        alone = [t[:1].detach().requires_grad_() for t in leaves]
        own = torch.autograd.grad(fae.flash_attention(*alone, batch_invariant=True), alone, dout[:1])
        for got, want in zip(own, grads, strict=True):
            assert torch.equal(got, want[:1])


def test_the_choice_is_logged_once(caplog):
    q, k, v = qkv(1, 9, 2, 8)
    logger = logging.getLogger("flash_attn_ext")
    assert logger.name in logging.root.manager.loggerDict
    with caplog.at_level(logging.DEBUG, logger="flash_attn_ext"):
        for _ in range(3):
            fae.flash_attention(q, k, v)
            fae.flash_attention(q, k, v, backend="portable")
    assert len({r.getMessage() for r in caplog.records}) == len(caplog.records)
    assert all(r.name.startswith("flash_attn_ext") for r in caplog.records)


def test_nothing_is_printed(capfd):
    q, k, v = (x.requires_grad_() for x in qkv(1, 9, 2, 8))
    for backend in ("auto", "cpu", "portable", "standard"):
        fae.flash_attention(q, k, v, backend=backend).sum().backward()
    fae.explain(q, k, v)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_everything_public_is_documented():
    for name in fae.__all__:
        thing = getattr(fae, name)
        assert thing.__doc__ and len(thing.__doc__) > 40, name
    assert {"flash_attention", "scaled_dot_product_attention", "merge_states", "explain", "estimate_memory",
            "use_flash_attention", "available_backends", "build_info", "set_backend", "AttentionConfig",
            "create_attention", "Attention"} <= set(fae.__all__)  # fmt: skip
