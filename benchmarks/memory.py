"""Peak extra memory of a call, measured in a process of its own.

A fresh process per measurement, because allocators and libraries keep what earlier work touched. The
processes are forked from one that has imported torch but has run nothing, so each costs
milliseconds. What is reported is the growth of the peak resident set during the call, less the
results it returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_PRELOAD = ["torch", "flash_attn_ext", "benchmarks.memory"]


def resident_bytes() -> int:
    """Resident set of this process."""
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
    except OSError:
        return False
    return True


def can_measure() -> bool:
    """Whether this system tells a process its resident set (Linux does)."""
    return os.path.exists("/proc/self/statm")


def available_bytes() -> int | None:
    """Memory that can be used without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


class _Sampler(threading.Thread):
    """Watches the resident set where the kernel's own peak cannot be reset."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = resident_bytes()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.0005)


def peak_growth(fn: Callable[[], object]) -> tuple[int, object]:
    """Runs `fn`; returns how far the resident set rose above its level before, and fn's result."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would hide new use
    before = resident_bytes()
    if _reset_peak():
        result = fn()
        return max(0, _peak_resident_bytes() - before), result
    sampler = _Sampler()
    sampler.start()
    result = fn()
    sampler.stopped.set()
    sampler.join()
    return max(0, sampler.peak - before), result


@dataclass(frozen=True)
class Measurement:
    """One call: `method` is "ours", "torch" or "standard" (unfused)."""

    method: str
    batch: int
    heads: int
    seq: int
    dim: int
    dtype: str = "float32"
    causal: bool = False
    backward: bool = False
    threads: int = 0


def _attention(spec: Measurement) -> Callable:
    import torch.nn.functional as F

    if spec.method == "ours":
        from flash_attn_ext import flash_attention

        return lambda q, k, v: flash_attention(q, k, v, causal=spec.causal, layout="bhsd")
    if spec.method == "torch":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=spec.causal)
    return lambda q, k, v: standard_attention(q, k, v, spec.causal)


def standard_attention(q, k, v, causal: bool):
    """Attention as the textbook has it, on (batch, heads, seq, dim): every score exists at once."""
    import torch

    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def _measure_here(spec: Measurement) -> int:
    import torch

    if spec.threads:
        torch.set_num_threads(spec.threads)
    attention = _attention(spec)
    dtype = getattr(torch, spec.dtype)

    def tensor(seq: int):
        return torch.randn(spec.batch, spec.heads, seq, spec.dim, dtype=dtype)

    def leaves(seq: int):
        return [tensor(seq).requires_grad_(spec.backward) for _ in range(3)]

    # A small call first: thread pools and libraries that load on first use are not the call's.
    for seq in (64, 65):
        small = leaves(seq)
        out = attention(*small)
        if spec.backward:
            torch.autograd.grad(out, small, torch.ones_like(out))
    inputs = leaves(spec.seq)
    if not spec.backward:
        growth, out = peak_growth(lambda: attention(*inputs))
        results = (out,)
    else:
        out, dout = attention(*inputs), tensor(spec.seq)
        growth, results = peak_growth(lambda: torch.autograd.grad(out, inputs, dout))
    return max(0, growth - sum(t.numel() * t.element_size() for t in results))


def _child(spec: Measurement, pipe) -> None:
    try:
        pipe.send(_measure_here(spec))
    except Exception as error:  # whatever it is, the parent tells the user
        pipe.send(f"{type(error).__name__}: {error}")


def peak_extra_bytes(spec: Measurement) -> int:
    """Peak memory of one call beyond its inputs and results, in bytes.

    Raises RuntimeError with the child's reason when the call failed there (or was killed, as for
    want of memory).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(spec, sender), daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    if isinstance(answer, int):
        return answer
    raise RuntimeError(f"{spec.method}: {answer or f'the process ended with code {process.exitcode}'}")
