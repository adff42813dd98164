"""The CUDA backend from the outside: when it is taken and why not, its plans, its errors, and its build settings."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, build
from conftest import CARD, EMULATED, NO_CARD
from harness import run
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn_ext as fae
from build_tools import cuda, native
from flash_attn_ext import _cuda, _load, dispatch

ROOT = Path(__file__).resolve().parent.parent


def test_the_card():
    """On a machine with one, every test marked `cuda` has run on it, too."""
    if NO_CARD:
        pytest.skip(f"nothing has run on a card: {NO_CARD}")
    assert CARD.backend in fae.available_backends()


def half(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=torch.float16) for _ in range(3)]


class FakeKernels:
    """A planner that knows no problem: what dispatch asks, and nothing that runs."""

    def __init__(self, objections=()):
        self.objections = list(objections)
        self.library = self

    def fae_cuda_runtime_version(self) -> int:
        return 13000

    def plan(self, query) -> dict:
        return {"objections": self.objections, "launches": [], "workspace_bytes": 0}


@pytest.fixture
def kernels(monkeypatch):
    """Called with a planner or the reason for none: what dispatch then believes to be loaded."""

    def pretend(planner=None, missing=None):
        monkeypatch.setitem(_cuda.BACKENDS, "cuda", _cuda.Backend(planner, missing))
        _cuda.forget()

    yield pretend
    monkeypatch.undo()
    _cuda.forget()


def cuda_request(dtype=torch.float16, dim=64) -> dispatch.Request:
    return dispatch.Request(torch.device("cuda", 0), dtype, dim, False)


class TestChoice:
    def test_kernels_without_objections_serve(self, kernels):
        kernels(FakeKernels())
        assert dispatch.preferred(cuda_request()) == ("cuda", [])
        assert dispatch.resolve("auto", "auto", cuda_request()) == "cuda"

    @pytest.mark.parametrize(
        "reason", ["this build holds no CUDA kernels", "torch 2.15.0+cpu is a build without CUDA"]
    )
    def test_without_kernels_portable_serves_with_one_warning(self, kernels, caplog, monkeypatch, reason):
        kernels(missing=reason)
        monkeypatch.setattr(dispatch, "_logged", set())
        with caplog.at_level(logging.DEBUG, logger="flash_attn_ext"):
            assert {dispatch.resolve("auto", "auto", cuda_request()) for _ in range(3)} == {"portable"}
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "portable" in record.getMessage() and reason in record.getMessage()

    def test_every_objection_is_in_the_warning(self, kernels, caplog, monkeypatch):
        kernels(FakeKernels(["the card is old", "the card is small"]))
        monkeypatch.setattr(dispatch, "_logged", set())
        with caplog.at_level(logging.WARNING, logger="flash_attn_ext"):
            assert dispatch.resolve("auto", "auto", cuda_request()) == "portable"
            kernels(FakeKernels(["the card is small"]))
            assert dispatch.resolve("auto", "auto", cuda_request()) == "portable"
        first, second = (record.getMessage() for record in caplog.records)
        assert "the card is old; the card is small" in first and "old" not in second

    def test_naming_the_backend_raises_the_reasons(self, kernels):
        kernels(missing="this build holds no CUDA kernels")
        with pytest.raises(NotImplementedError, match="no CUDA kernels.*CUDA tensors, q is on cpu"):
            fae.flash_attention(*half(1, 8, 2, 16), backend="cuda")
        with pytest.raises(
            NotImplementedError, match="'cuda' is unavailable: this build holds no CUDA kernels"
        ):
            fae.set_backend("cuda")
        assert "cuda" not in fae.available_backends()

    @pytest.mark.usefixtures("emulator")
    @pytest.mark.parametrize(
        ("device", "dtype", "reason"),
        [
            (_cuda.A100, torch.float64, "float64"),
            (_cuda.Device(75, 64 << 10, 4 << 20, 40), torch.float16, "8.0 or newer, the device has 7.5"),
            (_cuda.Device(80, 16 << 10, 4 << 20, 40), torch.float16, "16384 bytes of shared memory"),
        ],
        ids=["float64", "old", "small"],
    )
    def test_the_planner_has_the_reasons(self, kernels, monkeypatch, device, dtype, reason):
        kernels(_cuda.BACKENDS[EMULATED.backend].planner)
        monkeypatch.setattr(_cuda, "device_of", lambda backend, where: device)
        name, reasons = dispatch.preferred(cuda_request(dtype))
        assert name == "portable" and any(reason in r for r in reasons) and len(set(reasons)) == len(reasons)

    def test_an_old_driver_is_a_reason(self, kernels, monkeypatch):
        kernels(FakeKernels())
        monkeypatch.setattr(_cuda, "_is_card", lambda device: True)
        monkeypatch.setattr(_cuda, "_card", lambda index: _cuda.A100)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
        _, reasons = dispatch.preferred(cuda_request())
        assert reasons == ["its kernels were built with CUDA 13.0, and the driver here is one for CUDA 12.4"]

    def test_a_call_on_a_fake_cuda_tensor_follows_the_choice(self, kernels):
        """Tracing for a card that is not here, with and without kernels."""
        for planner, missing in ((FakeKernels(), None), (None, "none")):
            kernels(planner, missing)
            with FakeTensorMode():
                q = torch.empty(2, 8, 4, 16, device="cuda", dtype=torch.float16)
                out, lse = fae.flash_attention(q, q, q, return_lse=True)
            assert (out.device.type, out.shape, lse.dtype) == ("cuda", q.shape, torch.float32)


@pytest.mark.usefixtures("emulator")
class TestEmulated:
    def test_it_is_listed_once_it_is_loaded(self):
        code = "import flash_attn_ext as f; print(f.available_backends())"
        listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
        assert EMULATED.backend not in listed and "portable" in listed
        assert EMULATED.backend in fae.available_backends()

    @pytest.mark.parametrize("call", [fae.flash_attention, fae.explain])
    def test_float64_is_refused(self, call):
        q = torch.randn(1, 8, 2, 16, dtype=torch.float64)
        with pytest.raises(NotImplementedError, match="float64"):
            call(q, q, q, backend=EMULATED.backend)

    @pytest.mark.parametrize("dim", [64, 80, 256, 300])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_explain_describes_the_launches(self, dtype, dim):
        q = torch.empty(2, 500, 8, dim, dtype=dtype, device="meta")
        k = torch.empty(2, 700, 2, dim, dtype=dtype, device="meta")
        plan = fae.explain(q, k, k, causal=True, backend=EMULATED.backend)
        ((kernel, blocks),) = plan.launches
        assert plan.kernel == kernel and str(dtype).removeprefix("torch.") in kernel and plan.isa == "sm_80"
        widest = 256 if dtype == torch.float16 else 128
        tiles = -(-4 * 500 // plan.block_q) * (1 if dim <= widest else -(-dim // (widest // 2)))
        assert blocks == plan.tasks == 2 * 2 * tiles
        assert 0 < plan.shared_bytes <= 99 << 10 and plan.threads % 32 == 0 and plan.workspace_bytes == 0
        assert plan.flops > 0 and plan.bytes > 0
        assert any("slices" in note for note in plan.notes) == ("split" in kernel) == (dim > widest)
        assert kernel in str(plan) and "shared memory" in str(plan) and "emulator only" in str(plan)

    def test_explain_of_the_backward_pass(self):
        q, k, v = half(1, 300, 4, 64)
        bias = torch.zeros(1, 4, 1, 300, requires_grad=True)
        fast = fae.explain(q, k, v, backend=EMULATED.backend, backward=True)
        slow = fae.explain(q, k, v, bias=bias, backend=EMULATED.backend, backward=True, deterministic=True)
        names = [[kernel.split("_float16")[0] for kernel, _ in plan.launches] for plan in (fast, slow)]
        assert names == [["row_stats", "key_grad", "round_query_grad"],
                         ["row_stats", "key_grad", "query_grad", "bias_grad"]]  # fmt: skip
        assert fast.workspace_bytes > slow.workspace_bytes > 0
        assert any("deterministic" in note for note in slow.notes)

    def test_explain_of_extended_calls(self):
        """They take the kernels of modified scores; a gradient of slopes takes the one that sees whole rows."""
        q, k, v = half(1, 300, 4, 64)
        options = {"backend": EMULATED.backend}
        for given in (dict(sinks=torch.zeros(4)), dict(alibi_slopes=torch.ones(4)), dict(dropout_p=0.5)):
            assert fae.explain(q, k, v, **given, **options).kernel.endswith("modified")
        names = []
        for given in (
            dict(sinks=torch.zeros(4, requires_grad=True)),
            dict(alibi_slopes=torch.ones(4, requires_grad=True)),
            dict(alibi_slopes=torch.ones(4)),
        ):
            plan = fae.explain(q, k, v, **given, **options, backward=True)
            names.append([kernel.split("_float16")[0] for kernel, _ in plan.launches])
        assert names == [["row_stats", "key_grad", "round_query_grad", "head_grad"],
                         ["row_stats", "key_grad", "query_grad", "head_grad"],
                         ["row_stats", "key_grad", "round_query_grad"]]  # fmt: skip

    def test_gradients_per_head_do_not_depend_on_the_schedule(self):
        """Also where atomics add up those of queries."""
        case = Case("heads", batch=2, heads=(4, 2), seq=(70, 90), sinks="float32", alibi="h", dropout_p=0.2)
        inputs = build(case, torch.bfloat16)
        found = []
        for seed in range(4):
            fae.testing.set_emulator_seed(seed)
            got = run(inputs, EMULATED.backend)
            found.append([got["dsinks"], got["dalibi_slopes"]])
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

    def test_deterministic_algorithms_of_torch_are_followed(self):
        q, k, v = half(1, 200, 2, 64)
        torch.use_deterministic_algorithms(True)
        try:
            plan = fae.explain(q, k, v, backend=EMULATED.backend, backward=True)
        finally:
            torch.use_deterministic_algorithms(False)
        assert any(kernel.startswith("query_grad") for kernel, _ in plan.launches)
        plan = fae.explain(q, k, v, backend=EMULATED.backend, backward=True)
        assert not any(kernel.startswith("query_grad") for kernel, _ in plan.launches)

    def test_deterministic_gradients_do_not_depend_on_the_schedule(self):
        inputs = build(
            Case("schedule", heads=(2, 1), seq=(140, 200), dim=(32, 32), causal=True), torch.float32
        )
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        found = []
        for seed in range(4):
            fae.testing.set_emulator_seed(seed)
            out = fae.flash_attention(*leaves, causal=True, deterministic=True, backend=EMULATED.backend)
            found.append(torch.autograd.grad(out, leaves, inputs.dout))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

    def test_tf32_follows_torch(self):
        """One product where torch's precision on CUDA allows it: less exact, and never without being asked."""
        inputs = build(Case("tf32", heads=(1, 1), seq=(40, 60), dim=(64, 64)), torch.float32)
        exact = fae.flash_attention(*(t.double() for t in (inputs.q, inputs.k, inputs.v)))
        errors = []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            try:
                out = fae.flash_attention(inputs.q, inputs.k, inputs.v, backend=EMULATED.backend)
                (note,) = (n for n in fae.explain(inputs.q, inputs.k, inputs.v, backend=EMULATED.backend).notes
                           if "TF32" in n)  # fmt: skip
            finally:
                torch.set_float32_matmul_precision("highest")
            assert note.startswith({"highest": "three", "high": "one"}[precision])
            errors.append((out.double() - exact).abs().max().item())
        assert errors[0] < 2e-6 < 1e-5 < errors[1] < 5e-3

    def test_wrong_calls_raise_what_the_cpu_raises(self):
        q, k, v = half(1, 8, 2, 16)
        for changes in (dict(k=k[..., :8]), dict(softcap=-1.0), dict(mask=torch.zeros(8, 8)), dict(v=v.float()),
                        dict(mask=torch.ones(8, 8, dtype=torch.bool, device="meta"))):  # fmt: skip
            texts = []
            for backend in ("cpu", EMULATED.backend):
                with pytest.raises((ValueError, TypeError)) as caught:
                    fae.flash_attention(**{"q": q, "k": k, "v": v, **changes}, backend=backend)
                texts.append((type(caught.value), str(caught.value)))
            assert texts[0] == texts[1]

    def test_compiled(self):
        torch._dynamo.reset()

        def fn(q, k, v):
            return fae.flash_attention(q, k, v, causal=True, backend=EMULATED.backend).sin()

        compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
        for seq in (9, 21):
            leaves = [t.requires_grad_() for t in half(1, seq, 2, 16)]
            results = [(out := f(*leaves), *torch.autograd.grad(out.sum(), leaves)) for f in (fn, compiled)]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize(
        "name", ["emulated", "emulated_forward", "emulated_forward_out", "emulated_backward"]
    )
    def test_opcheck(self, name):
        from test_ops import CASES, op_arguments

        for case in CASES[:3]:
            arguments = op_arguments(
                "::" + name.replace("emulated_", "attention_").replace("emulated", "attention"), case
            )
            torch.library.opcheck(getattr(torch.ops.flash_attn_ext, name).default, arguments)

    @pytest.mark.parametrize("end", ["", "_forward", "_forward_out", "_backward"])
    def test_opcheck_extended(self, end):
        from test_extended_ops import SMALL, op_arguments

        case = Case("served", **SMALL, causal=True, alibi="bh", sinks="float64", dropout_p=0.3)
        arguments = op_arguments("::attention_extended" + end, case)
        op = getattr(torch.ops.flash_attn_ext, "emulated_extended" + end).default
        torch.library.opcheck(op, arguments)


def test_loader_gives_the_reason(tmp_path, monkeypatch):
    assert _load.load_cuda_operators(tmp_path / "missing.so") == "this build holds no CUDA kernels"
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in _load.load_cuda_operators(broken)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert "do not load" in _load.load_cuda_operators(broken)
    with pytest.raises(ImportError, match=r"missing; run `python -m build_tools\.emulated`"):
        fae.testing.load_emulator(tmp_path / "missing.so") if EMULATED.backend not in _cuda.BACKENDS else (
            _missing_emulator(tmp_path, monkeypatch)
        )


def _missing_emulator(tmp_path, monkeypatch):
    monkeypatch.delitem(_cuda.BACKENDS, EMULATED.backend)
    fae.testing.load_emulator(tmp_path / "missing.so")


class TestBuildSettings:
    KNOWN = (80, 86, 89, 90, 100, 120)

    @pytest.mark.parametrize(
        ("text", "archs"),
        [
            ("80", (80,)),
            ("90;80", (80, 90)),
            ("8.0 8.6", (80, 86)),
            ("sm_89,120", (89, 120)),
            ("10.0;", (100,)),
        ],
    )
    def test_archs(self, text, archs):
        assert cuda.parse_archs(text, self.KNOWN) == archs

    @pytest.mark.parametrize("text", ["70", "90a", "x", "8", "80;13.7", ";", "-80"])
    def test_wrong_archs_are_one_sentence(self, text):
        with pytest.raises(native.BuildError, match="FLASH_ATTN_EXT_ARCHS is .*") as caught:
            cuda.parse_archs(text, self.KNOWN)
        assert "\n" not in str(caught.value)

    def test_head_dims(self):
        assert cuda.parse_head_dims("128;64") == (64, 128)
        for text in ("72", "64;x", ",", "-64"):
            with pytest.raises(native.BuildError, match="FLASH_ATTN_EXT_HEAD_DIMS is"):
                cuda.parse_head_dims(text)

    def test_trimmed_builds_keep_slices(self):
        everything, trimmed = cuda.instances(), cuda.instances((64,))
        assert set(trimmed) < set(everything) and len({i.name for i in everything}) == len(everything)
        assert {i for i in everything if i.split} <= set(trimmed)
        assert {i.dim for i in trimmed if i.dim and not i.split} == {64}
        for instance in everything:
            assert (native.SOURCES / "cuda" / "inst" / f"{instance.source}.cu").exists()

    @pytest.mark.parametrize(
        ("environment", "reason"),
        [({"FLASH_ATTN_EXT_CUDA": "0", "PATH": "/usr/bin"}, "FLASH_ATTN_EXT_CUDA=0"),
         ({"PATH": "/nonexistent"}, "no nvcc on the PATH"), ({"CUDA_HOME": "/nonexistent"}, "no nvcc in CUDA_HOME")],
    )  # fmt: skip
    def test_why_there_is_no_cuda(self, environment, reason):
        assert reason in cuda.find_toolkit(environment)

    @pytest.mark.parametrize(
        ("environment", "reason"),
        [({"FLASH_ATTN_EXT_CUDA": "yes"}, "FLASH_ATTN_EXT_CUDA is 'yes'"),
         ({"FLASH_ATTN_EXT_CUDA": "1", "PATH": "/nonexistent"}, "FLASH_ATTN_EXT_CUDA is 1, but there is no nvcc")],
    )  # fmt: skip
    def test_wrong_settings_are_one_sentence(self, environment, reason):
        with pytest.raises(native.BuildError, match=reason):
            cuda.find_toolkit(environment)

    def test_settings_with_a_compiler(self, tmp_path):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\n'\n")
        nvcc.chmod(0o755)
        environment = {
            "CUDA_HOME": str(tmp_path),
            "FLASH_ATTN_EXT_ARCHS": "80;90",
            "FLASH_ATTN_EXT_HEAD_DIMS": "64",
        }
        toolkit = cuda.find_toolkit(environment)
        assert toolkit == cuda.Toolkit(str(nvcc), (80, 90), (64,))
        assert toolkit.code_flags[1::2] == ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90",
                                            "arch=compute_90,code=compute_90"]  # fmt: skip
        with pytest.raises(native.BuildError, match="'75' is none that this nvcc knows: 80, 90"):
            cuda.find_toolkit({**environment, "FLASH_ATTN_EXT_ARCHS": "75"})


def test_build_info_says_how_far_it_has_been_tried():
    info = fae.build_info()
    assert (
        info["cuda"]
        == _load.CUDA_LIBRARY.exists()
        == bool(info["cuda_archs"])
        == bool(info["cuda_head_dims"])
    )
    assert ("emulator only" in info["cuda_note"]) == info["cuda"]
