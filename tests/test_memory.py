"""Memory beyond inputs and outputs is O(S): peak resident size of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import EXTENDED_TARGETS

import flash_attn_ext as fae

MEASURE = textwrap.dedent(
    """
    import json, sys, threading, time
    import torch
    import flash_attn_ext as fae

    seq_q, seq, heads, dim, backward, backend, causal, option, dtype = json.loads(sys.argv[1])
    dtype = getattr(torch, dtype)
    torch.set_num_threads(2)

    def resident(field):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

    def tensors(seq_q, seq):
        lengths = (seq_q, seq, seq)
        qkv = [torch.randn(1, n, heads, dim).to(dtype).requires_grad_(backward) for n in lengths]
        extra = {}
        if option == "mask":
            extra["mask"] = torch.ones(1, 1, 1, seq, dtype=torch.bool)
        if option == "bias":
            extra["bias"] = torch.zeros(1, heads, 1, seq).requires_grad_(backward)
        if option == "expanded":
            qkv[1], qkv[2] = (x[:, :, :1].expand(1, seq, heads, dim) for x in qkv[1:])
        if option == "strided":
            qkv[1:] = [torch.randn(1, seq, heads, 2 * dim).to(dtype)[..., ::2] for _ in range(2)]
        if option == "transposed":
            qkv[1:] = [torch.randn(1, heads, dim, seq).to(dtype).permute(0, 3, 1, 2) for _ in range(2)]
        if option == "typed":
            ids = torch.arange(2 * seq) // 700
            extra["mask"] = fae.masks.DocumentMask(ids[:seq_q], ids[:seq]) & fae.masks.PrefixLMMask(seq // 3)
        if option == "blocks":
            extra["mask"] = fae.masks.BlockSparseMask(torch.rand(-(-seq_q // 64), -(-seq // 64)) < 0.5, 64, 64)
        if option == "scores":
            extra["alibi_slopes"], extra["sinks"] = (torch.rand(heads).requires_grad_(backward) for _ in range(2))
        if option == "dropout":
            extra["dropout_p"] = 0.2
        return qkv, extra

    def call(qkv, extra, dout):
        if option == "packed":  # two sequences, the first of them short
            cu = [torch.tensor([0, len(x[0]) // 8, len(x[0])]) for x in qkv[:2]]
            packed = [x[0] for x in qkv]
            out = fae.flash_attention_varlen(*packed, *cu, causal=causal, backend=backend)[None]
            return out, torch.autograd.grad(out, qkv, dout) if backward else ()
        out = fae.flash_attention(*qkv, causal=causal, backend=backend, **extra)
        if option == "gradients of gradients":
            first = torch.autograd.grad(out, qkv, dout, create_graph=True)
            return out, torch.autograd.grad(first, qkv, [torch.ones_like(g) for g in first])
        return out, torch.autograd.grad(out, [x for x in qkv if x.requires_grad], dout) if backward else ()

    small, extra = tensors(64, 64)
    call(small, extra, torch.ones_like(small[0]))  # what the first call sets up once
    qkv, extra = tensors(seq_q, seq)
    dout = torch.ones(1, seq_q, heads, dim, dtype=dtype) if backward else None
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak starts again from here
    except OSError:
        pass
    before = resident("VmRSS")
    assert resident("VmHWM") < before + 2**20 * 16, "the peak could not be reset"
    out, grads = call(qkv, extra, dout)
    produced = sum(t.numel() * t.element_size() for t in (out, *grads))
    print(json.dumps(resident("VmHWM") - before - produced))
    """
)


def extra_bytes(
    seq, heads=1, dim=64, backward=False, backend="cpu", causal=True, option="", dtype="float32", seq_q=None
) -> int:
    """Peak resident bytes beyond inputs and outputs of one call in a fresh process."""
    arguments = json.dumps([seq_q or seq, seq, heads, dim, backward, backend, causal, option, dtype])
    # Memory returned is given back at once: how much malloc keeps would vary from run to run, by three times.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    if "the peak could not be reset" in done.stderr:
        pytest.skip("this kernel does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


MIB = 2**20


def test_the_measurement_sees_a_score_matrix():
    """The O(N^2) baseline at S=4096 holds at least one 64 MiB matrix."""
    assert extra_bytes(4096, backend="standard") > 60 * MIB


@pytest.mark.parametrize("option", ["", "bias"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_small(backend, backward, option):
    assert extra_bytes(4096, backward=backward, backend=backend, option=option) < 32 * MIB


@pytest.mark.parametrize("option", ["typed", "blocks", "scores", "dropout", "packed"])
@pytest.mark.parametrize("backend", sorted({t.backend for t in EXTENDED_TARGETS}))
def test_what_the_extended_operators_take(backend, option):
    """Not even a bool of every score, 36 MiB, forward or backward."""
    assert extra_bytes(6144, backward=True, backend=backend, option=option) < 34 * MIB


def test_second_order():
    """Tiles of 512 x 512 with all that their derivatives need; one matrix of scores would be 144 MiB."""
    assert extra_bytes(6144, backward=True, option="gradients of gradients") < 128 * MIB


@pytest.mark.parametrize("option", ["expanded", "strided", "transposed"])
def test_keys_and_values_are_not_copied(option):
    """A few queries over long keys: a copy of K and V as they are seen would be 128 MiB."""
    assert extra_bytes(32768, heads=8, option=option, seq_q=16) < 32 * MIB


def test_forward_at_16384():
    assert extra_bytes(16384, heads=8) <= 64 * MIB


def test_backward_at_16384():
    assert extra_bytes(16384, heads=8, backward=True) <= 128 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("option", ["", "mask", "strided"])
def test_other_dtypes_and_options(dtype, option):
    assert extra_bytes(16384, heads=4, option=option, dtype=dtype) <= 64 * MIB
    assert extra_bytes(8192, heads=4, option=option, dtype=dtype, backward=True) <= 128 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited on Linux alone")
def test_a_cache_is_not_written_without_memory_for_the_rest():
    """Of 2^14 sequences that share one page, 2^10 ranges of keys each: their partial results are gigabytes."""
    resource = pytest.importorskip("resource")
    batch, keys = 1 << 14, 1 << 18
    caches = [torch.zeros(1, keys, 1, 1) for _ in range(2)]
    q, k = torch.randn(batch, 1, 12, 1), torch.ones(batch, 1, 1, 1)
    call = {
        "cache_lengths": torch.full((batch,), keys - 1),
        "block_table": torch.zeros(batch, 1, dtype=torch.int32),
    }
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), limits[1]))
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            fae.flash_attention_with_kvcache(q, *caches, k, k, num_splits=1 << 10, **call)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not caches[0].any() and not caches[1].any()
