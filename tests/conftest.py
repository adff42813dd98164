"""Fixtures: every backend and every instruction set of this machine, the CUDA kernels on a card or on the
emulator, and seeds."""

from __future__ import annotations

import os

# Tests are many small calls: threads that wait by spinning would take the time of those that work.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool

import flash_attn_ext as fae
from flash_attn_ext import _C

sys.path.append(str(Path(__file__).resolve().parent.parent))
from build_tools.emulated import build as build_emulator
from build_tools.ninja import BuildError


@dataclass(frozen=True)
class Target:
    """A backend, and for the compiled one the instruction set it is made to use."""

    backend: str
    isa: str | None = None

    @property
    def name(self) -> str:
        return self.isa or self.backend

    @property
    def device(self) -> str:
        return "cuda" if self.backend == "cuda" else "cpu"

    @property
    def on_cuda_kernels(self) -> bool:
        return self.backend in ("cuda", "cuda_emulated")

    @property
    def widest(self) -> torch.dtype:
        """The most precise dtype that it has kernels for."""
        return torch.float32 if self.on_cuda_kernels else torch.float64

    @property
    def repeatable(self) -> dict:
        """Options with which gradients are bitwise the same from run to run."""
        return {"deterministic": True} if self.on_cuda_kernels else {}

    def schedules(self) -> Iterator[dict]:
        """Options to run a problem with, one after the other: the CUDA kernels must give a right result in every
        order of blocks, warps and copies, and with deterministic gradients."""
        if self.backend == "cuda_emulated":
            for seed in SEEDS:
                fae.testing.set_emulator_seed(seed)
                yield {"deterministic": seed == SEEDS[-1]}
        elif self.backend == "cuda":
            yield from ({"deterministic": False}, {"deterministic": True})
        else:
            yield {}

    def one_schedule(self, number: int) -> dict:
        """One of those, where there are many problems: another for each `number`."""
        found = list(self.schedules())
        if self.backend == "cuda_emulated":
            fae.testing.set_emulator_seed(SEEDS[number % len(SEEDS)])
        return found[number % len(found)]


SEEDS = (1, 2, 3)
CPU_TARGETS = [Target("cpu", isa) for isa in reversed(_C.cpu_isas())]
PORTABLE = Target("portable")
STANDARD = Target("standard")
TARGETS = [*CPU_TARGETS, PORTABLE]
# Those that serve what the plain operators do not know.
EXTENDED_TARGETS = [*CPU_TARGETS, PORTABLE]
EMULATED = Target("cuda_emulated")
CARD = Target("cuda")
# Why there is no card to test on: an empty text where there is one.
NO_CARD = fae.dispatch.unavailable().get("cuda", "")
CUDA_TARGETS = [EMULATED] if NO_CARD else [EMULATED, CARD]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long sweeps")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long sweep; runs with --slow")
    config.addinivalue_line("markers", "emulated: set for what takes the library of the CUDA emulator")
    config.addinivalue_line(
        "markers", "cuda: its `target` is also the CUDA kernels: on the emulator, and on a card"
    )


def pytest_generate_tests(metafunc):
    own = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    fixtures = {
        "target": TARGETS,
        "any_target": [*TARGETS, STANDARD],
        "extended_target": EXTENDED_TARGETS,
    }
    for fixture, targets in fixtures.items():
        if fixture in metafunc.fixturenames and fixture not in own:
            more = CUDA_TARGETS if metafunc.definition.get_closest_marker("cuda") else []
            metafunc.parametrize(fixture, [*targets, *more], ids=lambda t: t.name, indirect=True)


# The most products (batch heads seq_q seq_kv (dim + dim_v)) of a case for the emulator, which does some 5 to 20
# million a second; --slow takes twelve times as many, which leaves out next to nothing.
EMULATED_WORK = 4_000_000
EMULATED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _names_emulator(item) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(
        value is EMULATED or (isinstance(value, str) and value == EMULATED.name) for value in parameters
    )


def _is_for_emulator(item) -> bool:
    """Whether a test on the emulator is small enough and has a dtype that the kernels know. Of extended cases
    every other one is its turn, in one dtype; with --slow they are all."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if EMULATED not in (parameters.get(name) for name in ("target", "any_target", "extended_target")):
        return True
    slow = item.config.getoption("--slow")
    dtype, case = parameters.get("dtype"), parameters.get("case")
    if dtype == torch.float64:
        return False
    if case is None:
        return True
    if case.is_extended and dtype is not None and not slow:
        turn = zlib.crc32(case.name.encode()) % (2 * len(EMULATED_DTYPES))
        if turn >= len(EMULATED_DTYPES) or EMULATED_DTYPES[turn] != dtype or max(case.seq) > 400:
            return False
    work = case.batch * case.heads[0] * case.seq[0] * case.seq[1] * sum(case.dim)
    return work <= EMULATED_WORK * (12 if slow else 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "emulator" in getattr(item, "fixturenames", ()) or _names_emulator(item):
            item.add_marker("emulated")
    slow = config.getoption("--slow") or "slow" in (config.option.markexpr or "")
    chosen = [item for item in items if slow or "slow" not in item.keywords]
    chosen = [item for item in chosen if _is_for_emulator(item)]
    if len(chosen) < len(items):
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen


def pytest_report_header(config):
    head = f"flash_attn_ext {fae.__version__}, torch {torch.__version__}, ISAs {' '.join(_C.cpu_isas())}"
    card = f"not on a card: {NO_CARD}" if NO_CARD else f"and on {torch.cuda.get_device_name()}"
    return [head, f"CUDA kernels on the emulator, {card}"]


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


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """Process groups by their size, each started when it is first asked for."""
    pools: dict[int, RankPool] = {}

    def of(size: int) -> RankPool:
        if size not in pools:
            pools[size] = RankPool(size)
        return pools[size]

    yield of
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def emulator() -> None:
    """The backend "cuda_emulated", built when it is not up to date; parallel workers take turns."""
    try:
        fae.testing.load_emulator(build_emulator())
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)
    fae.testing.set_emulator_seed(SEEDS[0])


def _activate(request, monkeypatch) -> Target:
    target = request.param
    if target == EMULATED:
        request.getfixturevalue("emulator")
    if target.isa is not None:
        monkeypatch.setenv("FLASH_ATTN_EXT_CPU_ISA", target.isa)
        assert _C.active_isa() == target.isa and os.environ["FLASH_ATTN_EXT_CPU_ISA"] == target.isa
    return target


@pytest.fixture
def target(request, monkeypatch, steady) -> Target:
    """Each instruction set of the machine, the portable backend, and for tests marked `cuda` the CUDA kernels."""
    return _activate(request, monkeypatch)


@pytest.fixture
def any_target(request, monkeypatch, steady) -> Target:
    """As `target`, and the unfused baseline, for rules that hold there too."""
    return _activate(request, monkeypatch)


@pytest.fixture(params=CPU_TARGETS, ids=lambda t: t.name)
def cpu_target(request, monkeypatch, steady) -> Target:
    """Each instruction set of the machine."""
    return _activate(request, monkeypatch)


@pytest.fixture
def extended_target(request, monkeypatch, steady) -> Target:
    """As `target`, for calls of the extended operators: for tests marked `cuda`, of what the CUDA kernels serve."""
    return _activate(request, monkeypatch)


@pytest.fixture(params=["cpu", "portable"])
def backend(request) -> str:
    """The compiled backend with its best instruction set, and the portable one."""
    return request.param
