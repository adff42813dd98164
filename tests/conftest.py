"""Fixtures: every backend and every instruction set of this machine, and seeds."""

from __future__ import annotations

import os

# Tests are many small calls: threads that wait by spinning would take the time of those that work.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from dataclasses import dataclass

import pytest
import torch

import flash_attn_ext as fae
from flash_attn_ext import _C


@dataclass(frozen=True)
class Target:
    """A backend, and for the compiled one the instruction set it is made to use."""

    backend: str
    isa: str | None = None

    @property
    def name(self) -> str:
        return self.isa or self.backend


CPU_TARGETS = [Target("cpu", isa) for isa in reversed(_C.cpu_isas())]
PORTABLE = Target("portable")
STANDARD = Target("standard")
TARGETS = [*CPU_TARGETS, PORTABLE]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long sweeps")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long sweep; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or "slow" in (config.option.markexpr or ""):
        return
    chosen = [item for item in items if "slow" not in item.keywords]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = chosen


def pytest_report_header(config):
    return f"flash_attn_ext {fae.__version__}, torch {torch.__version__}, ISAs {' '.join(_C.cpu_isas())}"


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """The same seed, thread count and environment for every test, whatever the one before left behind."""
    for name in ("FLASH_ATTN_EXT_BACKEND", "FLASH_ATTN_EXT_CPU_ISA", "FLASH_ATTN_EXT_LOG"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def _activate(target: Target, monkeypatch) -> Target:
    if target.isa is not None:
        monkeypatch.setenv("FLASH_ATTN_EXT_CPU_ISA", target.isa)
        assert _C.active_isa() == target.isa and os.environ["FLASH_ATTN_EXT_CPU_ISA"] == target.isa
    return target


@pytest.fixture(params=TARGETS, ids=lambda t: t.name)
def target(request, monkeypatch, steady) -> Target:
    """Each instruction set of the machine, and the portable backend."""
    return _activate(request.param, monkeypatch)


@pytest.fixture(params=[*TARGETS, STANDARD], ids=lambda t: t.name)
def any_target(request, monkeypatch, steady) -> Target:
    """As `target`, and the unfused baseline, for rules that hold there too."""
    return _activate(request.param, monkeypatch)


@pytest.fixture(params=CPU_TARGETS, ids=lambda t: t.name)
def cpu_target(request, monkeypatch, steady) -> Target:
    """Each instruction set of the machine."""
    return _activate(request.param, monkeypatch)


@pytest.fixture(params=["cpu", "portable"])
def backend(request) -> str:
    """The compiled backend with its best instruction set, and the portable one."""
    return request.param
