"""Threads: the same bits for any number of them, calls from several at once, the GIL, fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, build
from harness import run

import flash_attn_ext as fae
from flash_attn_ext import _C

SPLITS = [
    Case("one-head", heads=(1, 1), seq=(300, 300), dim=(32, 32), causal=True),
    Case("decode", heads=(8, 1), seq=(1, 900), dim=(64, 64)),
    Case("group", batch=2, heads=(6, 2), seq=(190, 190), dim=(40, 24), causal=True),
    Case("bias", batch=2, heads=(2, 2), seq=(150, 260), bias="11qk", mask="b1qk"),
    Case("scalar-bias", batch=3, heads=(4, 2), seq=(130, 140), bias="1", softcap=3.0),
    Case("key-bias", batch=3, heads=(4, 2), seq=(130, 140), bias="b11k", lengths=(100, 0, 140)),
    Case("window", heads=(2, 1), seq=(400, 400), window=(60, 20), layout="bhsd"),
    Case("wide", heads=(1, 1), seq=(70, 300), dim=(300, 200)),
    Case("tall", heads=(1, 1), seq=(700, 3), dim=(64, 64)),
]


def same(a: dict, b: dict):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SPLITS, ids=lambda c: c.name)
def test_bitwise_the_same_for_any_thread_count(case, dtype, cpu_target):
    inputs = build(case, dtype)
    torch.set_num_threads(1)
    single = run(inputs, "cpu")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        same(single, run(inputs, "cpu"))


@pytest.mark.parametrize("options", [{}, {"sinks": torch.arange(8.0)}, {"dropout_p": 0.2}], ids=str)
def test_a_hidden_nan_of_one_head_changes_no_bit(options, cpu_target):
    """Heads that lie side by side share a task of decoding; how many do, depends on the threads."""
    q, k, v = torch.randn(1, 1, 8, 40), torch.randn(1, 700, 8, 40), torch.randn(1, 700, 8, 40)
    mask = torch.ones(700, dtype=torch.bool)
    mask[5] = False

    def call():
        torch.manual_seed(1)
        return fae.flash_attention(q, k, v, mask=mask, **options)

    want = call()
    v[0, 5, 3] = torch.nan
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        got = call()
        assert torch.equal(got[:, :, [0, 1, 2, 4, 5, 6, 7]], want[:, :, [0, 1, 2, 4, 5, 6, 7]])
        torch.testing.assert_close(got, want)


def test_bitwise_the_same_from_run_to_run(target):
    inputs = build(SPLITS[2], torch.float32)
    torch.set_num_threads(3)
    first = run(inputs, target.backend)
    for _ in range(3):
        same(first, run(inputs, target.backend))


def test_calls_from_several_threads_at_once(target):
    """Forward and backward of different problems, each with the same result as alone."""
    problems = [build(case, dtype) for case in SPLITS[:4] for dtype in (torch.float32, torch.bfloat16)]
    alone = [run(p, target.backend) for p in problems]
    results: list = [None] * len(problems)
    start = threading.Barrier(len(problems))

    def work(n):
        start.wait()
        for _ in range(3):
            results[n] = run(problems[n], target.backend)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(problems))]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    for expected, got in zip(alone, results, strict=True):
        assert got is not None, "a thread died"
        same(expected, got)


def test_module_calls_from_several_threads_at_once():
    rng = np.random.default_rng(0)
    arrays = [[rng.standard_normal((200, 2, 32), dtype=np.float32) for _ in range(3)] for _ in range(4)]
    alone = [np.empty_like(a[0]) for a in arrays]
    for a, out in zip(arrays, alone, strict=True):
        _C.flash_attention(*a, out, causal=True)
    outs = [np.zeros_like(a[0]) for a in arrays]
    workers = [
        threading.Thread(target=_C.flash_attention, args=(*a, o, True))
        for a, o in zip(arrays, outs, strict=True)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    assert all(np.array_equal(a, b) for a, b in zip(alone, outs, strict=True))


def long_call(seconds: float = 0.6):
    """A call that takes about `seconds` here, and the time that it took when alone."""
    seq = 512
    while True:
        q, k, v = (torch.randn(seq, 2, 64) for _ in range(3))
        start = time.perf_counter()
        fae.flash_attention(q, k, v)
        if time.perf_counter() - start > seconds:
            return q, k, v
        seq *= 2


@pytest.mark.parametrize("entry", ["op", "module"])
def test_the_gil_is_released(entry, monkeypatch):
    """Another Python thread runs while a call is under way."""
    monkeypatch.setenv("FLASH_ATTN_EXT_CPU_ISA", "scalar")  # the slowest: a long call from a short sequence
    torch.set_num_threads(1)
    q, k, v = long_call()
    out = torch.empty_like(q)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.005):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    if entry == "op":
        fae.flash_attention(q, k, v, out=out)
    else:
        _C.flash_attention(q.numpy(), k.numpy(), v.numpy(), out.numpy())
    end = time.perf_counter()
    stop.set()
    ticker.join()
    margin = (end - start) / 10
    assert len([t for t in ticks if start + margin < t < end - margin]) >= 3


def threads_that_worked(call) -> int:
    """How many threads of this process spent at least 5 ticks of CPU time (10 ms each) in `call`."""

    def times():
        spent = {}
        for tid in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{tid}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
            spent[tid] = int(fields[11]) + int(fields[12])
        return spent

    before = times()
    call()
    return sum(after - before.get(tid, 0) >= 5 for tid, after in times().items())


def test_set_num_threads_is_honoured(monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_EXT_CPU_ISA", "scalar")
    torch.set_num_threads(1)
    q, k, v = long_call(0.8)
    assert threads_that_worked(lambda: fae.flash_attention(q, k, v)) == 1
    torch.set_num_threads(2)
    assert threads_that_worked(lambda: fae.flash_attention(q, k, v)) == 2
    one_head = [x[:, :1].contiguous() for x in (q, k, v)]
    assert threads_that_worked(lambda: fae.flash_attention(*one_head)) == 2, "one head uses one thread"


def in_child(work, seconds: float = 60) -> int:
    """The exit code of `work` in a forked child; the child is killed when it hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the forked child still hangs after {seconds} s")


def check_after_fork(backend: str):
    """The pool has threads in the parent; the child has none of them, and gets the same bits.

    The child compares with NumPy: torch's own parallel operations, torch.equal among them, wait
    for the pool's lost threads forever.
    """
    inputs = build(SPLITS[2], torch.float32)
    torch.set_num_threads(2)
    expected = run(inputs, backend)
    array = inputs.q[0, :, 0].numpy()
    expected_array, got_array = np.empty_like(array), np.empty_like(array)
    _C.flash_attention(array, array, array, expected_array)

    def work():
        _C.flash_attention(array, array, array, got_array)
        results = [
            (expected, run(inputs, backend)),
            (expected, run(inputs, backend)),
            ({0: expected_array}, {0: got_array}),
        ]
        return all(np.array_equal(want[n], got[n]) for want, got in results for n in want)

    # Autograd itself refuses to run a backward pass in a fork once it has started its own threads;
    # calls on CPU tensors stay on the calling thread, so it does not here.
    assert in_child(work) == 0
    same(expected, run(inputs, backend))


def test_works_after_fork(cpu_target):
    """In a process of its own: tests before this one may have started autograd's threads."""
    program = f"import test_threads; test_threads.check_after_fork({cpu_target.backend!r})"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, check=True, timeout=180)


def _square(n: int) -> float:
    q = torch.full((1, 64, 2, 16), float(n))
    return float(fae.flash_attention(q, q, q).sum())


def test_works_in_a_multiprocessing_pool():
    import multiprocessing

    torch.set_num_threads(2)
    here = [_square(n) for n in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_square, range(4)).get(timeout=60) == here
