"""The pybind11 module: NumPy arrays, torch tensors, buffers and DLPack objects, no torch needed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import attend, complaint, relative_error, unfused

import flash_attn_ext as fae
from flash_attn_ext import _C

SHAPES = {
    "2d": ((33, 16), (47, 16), (47, 24), (33, 24)),
    "3d": ((33, 4, 16), (47, 2, 16), (47, 2, 24), (33, 4, 24)),
    "4d": ((2, 33, 4, 16), (2, 47, 2, 16), (2, 47, 2, 24), (2, 33, 4, 24)),
    "empty": ((2, 0, 4, 16), (2, 47, 2, 16), (2, 47, 2, 24), (2, 0, 4, 24)),
    "no-keys": ((2, 5, 4, 16), (2, 0, 2, 16), (2, 0, 2, 24), (2, 5, 4, 24)),
    "large": ((300, 3, 40), (290, 1, 40), (290, 1, 72), (300, 3, 72)),
}


def tensors(shapes, dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes[:3])
    return q, k, v, torch.full(shapes[3], 9.0, dtype=dtype)


@pytest.mark.parametrize("kind", ["numpy", "torch", "dlpack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_any_array(name, dtype, kind, cpu_target):
    if kind == "numpy" and dtype == torch.bfloat16:
        kind = "torch"  # NumPy has no bfloat16
    wrap = {"numpy": lambda t: t.numpy(), "torch": lambda t: t, "dlpack": OnlyDlpack}[kind]
    for causal, scale in [(False, None), (True, None), (True, 0.3), (False, -0.5)]:
        q, k, v, out = tensors(SHAPES[name], dtype)
        assert _C.flash_attention(*map(wrap, (q, k, v, out)), causal, scale) is None
        exact = attend(q, k, v, causal=causal, scale=scale)
        plain = (unfused(q, k, v, causal=causal, scale=scale, other=o).out for o in (False, True))
        error = 1.5 * max(relative_error(p, exact.out) for p in plain)
        assert not complaint("out", out, exact.out, error)
        assert torch.equal(out, fae.flash_attention(q, k, v, causal=causal, scale=scale))


class OnlyDlpack:
    """An object that offers DLPack and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_keywords_and_mixed_kinds():
    q, k, v, out = tensors(SHAPES["3d"], torch.float32)
    _C.flash_attention(q=q.numpy(), k=OnlyDlpack(k), v=v, out=memoryview(out.numpy()), causal=True, scale=0.5)
    assert torch.equal(out, fae.flash_attention(q, k, v, causal=True, scale=0.5))


def test_strided_arrays():
    q, k, v, out = tensors(SHAPES["3d"], torch.float32)
    expected = fae.flash_attention(q, k, v)
    wide = np.zeros((33, 4, 48), np.float32)
    fortran = [np.asfortranarray(x.numpy()) for x in (q, k, v)]
    _C.flash_attention(*fortran, wide[..., ::2])
    assert np.array_equal(wide[..., ::2], expected.numpy()) and not wide[..., 1::2].any()
    every_other = np.repeat(k.numpy(), 2, axis=0)[::2]
    broadcast = np.broadcast_to(v.numpy()[:, :1], v.shape)
    _C.flash_attention(q.numpy(), every_other, broadcast, out.numpy())
    assert torch.equal(out, fae.flash_attention(q, k, v[:, :1].expand(47, 2, 24)))


def test_negative_strides():
    """Reversed arrays are legal NumPy: either the right answer or a refusal that names the argument."""
    q, k, v, out = tensors(SHAPES["3d"], torch.float32)
    backwards = [np.ascontiguousarray(x.numpy()[::-1])[::-1] for x in (q, k, v)]
    assert backwards[0].strides[0] < 0
    try:
        _C.flash_attention(*backwards, out.numpy())
    except ValueError as error:
        assert "q" in str(error) and torch.equal(out, torch.full_like(out, 9.0))
    else:
        assert torch.equal(out, fae.flash_attention(q, k, v))


def test_inputs_may_be_read_only():
    q, k, v, out = (t.numpy() for t in tensors(SHAPES["3d"], torch.float32))
    for a in (q, k, v):
        a.flags.writeable = False
    _C.flash_attention(q, k, v, out)
    assert not (out == 9.0).all()


def frozen(array):
    array.flags.writeable = False
    return array


def f32(*shape):
    return np.zeros(shape, np.float32)


BAD = {
    "q-list": (dict(q=[[1.0]]), TypeError, "q.*list"),
    "k-none": (dict(k=None), TypeError, "k.*None"),
    "v-text": (dict(v="abc"), TypeError, "v"),
    "q-1d": (dict(q=f32(16)), ValueError, r"q.*\(16,\)"),
    "q-5d": (dict(q=f32(1, 1, 33, 4, 16)), ValueError, r"q.*\(1, 1, 33, 4, 16\)"),
    "k-rank": (dict(k=f32(47, 16)), ValueError, r"k.*\(47, 16\)"),
    "k-dim": (dict(k=f32(47, 2, 15)), ValueError, r"k.*\(47, 2, 15\)"),
    "heads": (dict(k=f32(47, 3, 16), v=f32(47, 3, 24)), ValueError, r"\(47, 3, 16\)"),
    "v-seq": (dict(v=f32(46, 2, 24)), ValueError, r"v.*\(46, 2, 24\)"),
    "k-dtype": (dict(k=np.zeros((47, 2, 16))), TypeError, "k.*float64"),
    "int": (dict(q=np.zeros((33, 4, 16), np.int32)), TypeError, "q.*int32"),
    "object": (dict(q=np.zeros((33, 4, 16), object)), TypeError, "q"),
    "big-endian": (dict(q=np.zeros((33, 4, 16), ">f4")), (TypeError, ValueError), "q"),
    "complex": (dict(v=np.zeros((47, 2, 24), np.complex64)), TypeError, "v"),
    "out-shape": (dict(out=f32(33, 4, 16)), ValueError, r"out.*\(33, 4, 16\)"),
    "out-dtype": (dict(out=np.zeros((33, 4, 24))), TypeError, "out.*float64"),
    "out-frozen": (dict(out=frozen(f32(33, 4, 24))), (TypeError, ValueError), "out"),
    "out-broadcast": (dict(out=np.lib.stride_tricks.as_strided(f32(33, 24), (33, 4, 24), (96, 0, 4))), ValueError, "out"),
    "out-list": (dict(out=[0.0]), TypeError, "out.*list"),
    "scale-nan": (dict(scale=float("nan")), ValueError, "scale.*nan"),
    "scale-text": (dict(scale="x"), TypeError, "scale|argument"),
    "requires-grad": (dict(q=torch.zeros(33, 4, 16, requires_grad=True)), (TypeError, ValueError, RuntimeError, BufferError), "(?i)require"),
    "out-meta": (dict(out=torch.zeros(33, 4, 24, device="meta")), (TypeError, ValueError, BufferError), "out|meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_input(name):
    changes, kind, pattern = BAD[name]
    q, k, v, out = (t.numpy() for t in tensors(SHAPES["3d"], torch.float32))
    arguments = {"q": q, "k": k, "v": v, "out": out, **changes}
    with pytest.raises(kind, match=pattern):
        _C.flash_attention(**arguments)
    assert (out == 9.0).all()


def test_out_that_overlaps_an_input():
    buffer = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    before = buffer.copy()
    q, k, v = (buffer[i * 1000 : i * 1000 + 640].reshape(10, 4, 16) for i in range(3))
    for out in (q, k, v, buffer[600:1240].reshape(10, 4, 16)):
        with pytest.raises(ValueError, match="out"):
            _C.flash_attention(q, k, v, out)
    assert np.array_equal(buffer, before)


def test_works_without_torch():
    """The module loads and computes in a process that never imports torch."""
    code = (
        "import sys, importlib.util, numpy as np\n"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r})\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "q = np.eye(4, dtype=np.float32); out = np.empty_like(q)\n"
        "m.flash_attention(q, q, q, out, scale=0.0)\n"
        "assert np.allclose(out, 0.25) and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_memory_is_not_leaked():
    """References to arrays and capsules are given back."""
    arrays = [t.numpy() for t in tensors(SHAPES["3d"], torch.float32)]
    capsules = [OnlyDlpack(torch.from_numpy(a)) for a in arrays]
    _C.flash_attention(*arrays)
    _C.flash_attention(*capsules)
    counts = [sys.getrefcount(x) for x in (*arrays, *(c.tensor for c in capsules))]
    for _ in range(20):
        _C.flash_attention(*arrays)
        _C.flash_attention(*capsules)
        with pytest.raises(ValueError):
            _C.flash_attention(arrays[0], arrays[1], arrays[2], arrays[0])
    assert [sys.getrefcount(x) for x in (*arrays, *(c.tensor for c in capsules))] == counts


def test_introspection():
    info = _C.build_info()
    assert (
        isinstance(info["cuda"], bool)
        and set(_C.cpu_isas()) <= set(info["isas"])
        and "scalar" in info["isas"]
    )
    assert info["version"] == fae.__version__ and info["compiler"] and info["flags"]
    assert _C.active_isa() == _C.cpu_isas()[0]
    rows = _C.variants()
    assert {(r["isa"], r["dtype"]) for r in rows} == {
        (i, d) for i in info["isas"] for d in ("float16", "bfloat16", "float32", "float64")
    }
    assert all(r["kernel"] for r in rows)


def desc(q, k, v, **changes):
    def one(t):
        return (
            None
            if t is None
            else (tuple(t.shape), tuple(t.stride()), str(t.dtype).removeprefix("torch."), "cpu")
        )

    options = dict(
        mask=None,
        bias=None,
        kv_lengths=None,
        out=None,
        layout=0,
        causal=0,
        window=(-1, -1),
        scale=None,
        softcap=0.0,
    )
    return {"q": one(q), "k": one(k), "v": one(v), **{**options, **changes}}


def test_validate():
    q, k, v, _ = tensors(SHAPES["4d"], torch.float32)
    assert _C.validate(desc(q, k, v)) is None
    kind, text = _C.validate(desc(q, k[..., :8], v))
    assert kind == "value" and "k" in text and "(2, 47, 2, 8)" in text
    kind, text = _C.validate(desc(q, k.double(), v))
    assert kind == "type" and "float64" in text


def test_plan():
    """Visible work alone is counted: causal half, windows their band."""
    q, k, v = (torch.empty(1, 4096, 2, 64) for _ in range(3))
    dense = _C.plan(desc(q, k, v))
    causal = _C.plan(desc(q, k, v, causal=1))
    window = _C.plan(desc(q, k, v, window=(128, 128)))
    assert dense["flops"] == pytest.approx(4 * 4096 * 4096 * 2 * 64)
    assert 0.5 * dense["flops"] <= causal["flops"] < 0.6 * dense["flops"]
    assert window["flops"] < 0.2 * dense["flops"]
    assert dense["workspace_bytes"] < 64 * 2**20 and dense["isa"] == _C.active_isa()
    for isa in _C.cpu_isas():
        assert _C.plan(desc(q, k, v), isa, 2, True)["isa"] == isa
    with pytest.raises(ValueError, match="isa"):
        _C.plan(desc(q, k, v), "sse9")
    with pytest.raises(ValueError, match="k"):
        _C.plan(desc(q, k[..., :8], v))
