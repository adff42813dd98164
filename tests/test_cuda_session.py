"""The session on a card (`python -m benchmarks.cuda`), as far as it goes without one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import EMULATED

import flash_attn_ext as fae
from benchmarks.cuda import bench, cases, session


def test_cases():
    every = cases.all_cases()
    assert len({case.name + case.group for case in every}) == len(every)
    assert all(isinstance(case.causal, bool) for case in every)  # torch takes nothing else
    small = cases.small_cases()
    assert {case.page > 0 for case in small} == {case.seq_q > 0 for case in small} == {False, True}
    assert any(case.sinks for case in small) and any(case.alibi for case in small)


@pytest.mark.usefixtures("emulator")
def test_rehearsal(monkeypatch):
    """Every kind of case, against torch in fp32; and what is wrong is said."""
    results = {"rehearsed": [], "void": []}
    bench.rehearse(results, EMULATED.backend)
    assert results == {"rehearsed": [case.name for case in cases.small_cases()], "void": []}
    assert fae.explain(*3 * [torch.randn(1, 4, 1, 8)]).backend == "cpu"  # the choice is as it was
    one = cases.small_cases()[0]
    monkeypatch.setattr(bench, "small_cases", lambda: [one])
    monkeypatch.setattr(bench.CudaProblem, "ours", lambda self, q, k, v: q + 0 * (k.sum() + v.sum()))
    bench.rehearse(results := {"rehearsed": [], "void": []}, EMULATED.backend)
    assert not results["rehearsed"] and one.name in results["void"][0] and "off by" in results["void"][0]


@pytest.mark.parametrize("dry_run", [False, True])
def test_steps(dry_run):
    """Every module that a step runs is there."""
    steps = session.steps(dry_run)
    for step in steps:
        command = list(step.command)
        module = command[command.index("-m") + 1]
        assert importlib.util.find_spec(module), step.name
        assert bool(step.needs) == (command[0] == "compute-sanitizer")
