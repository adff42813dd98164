"""The CUDA kernels as seen from Python: whether they are here, what they cannot serve, and their plans.

The planner is C++ (csrc/cuda/launch/plan.cpp), in the library of the kernels, and plain C to call. Whatever
it objects to is a reason that the user reads.
"""

from __future__ import annotations

import ctypes
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import _load
from ._compiling import constant_when_compiled
from ._options import Options
from ._problem import heads_first

# What `explain` and `build_info` have to say about them.
MATURITY = "the CUDA kernels have so far run on a host emulator only, not on a card"

_DTYPES = {
    name: code for code, name in enumerate((torch.float16, torch.bfloat16, torch.float32, torch.float64))
}


class Device(NamedTuple):
    """What the planner asks of a card."""

    compute_capability: int  # 10 major + minor
    shared_bytes: int  # that a block may have
    l2_bytes: int
    multiprocessors: int


MAX_DIM = 1024

# An A100, for tensors that are on no card: fake and meta ones. The emulator is like the smallest cards.
A100 = Device(80, 163 << 10, 40 << 20, 108)
EMULATED = Device(80, 99 << 10, 32 << 20, 16)


class _Query(ctypes.Structure):
    """FaeCudaQuery of csrc/cuda/launch/c_api.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads_q", "heads_kv", "seq_q", "seq_kv")),
        *((name, ctypes.c_int64) for name in ("dim", "dim_v")),
        ("dbias_shape", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ("shared_bytes", "l2_bytes", "multiprocessors", "num_splits")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("dtype", "biased", "need_bias_grad", "backward")),
        *((name, ctypes.c_int32) for name in ("deterministic", "fast_fp32")),
        *((name, ctypes.c_int32) for name in ("with_sinks", "need_sink_grad", "with_slopes")),
        *((name, ctypes.c_int32) for name in ("need_slope_grad", "with_dropout", "compute_capability")),
        ("batch_invariant", ctypes.c_int32),
    )


class Planner:
    """The C functions of one library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.fae_cuda_plan.restype = ctypes.c_int64
        self.library.fae_cuda_variants.restype = ctypes.c_int64

    @staticmethod
    def _read(function, *arguments) -> object:
        size = 1 << 14
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = function(*arguments, buffer, ctypes.c_int64(size))
            if length < size:
                return json.loads(buffer.value)
            size = length + 1

    def plan(self, query: _Query) -> dict:
        """{"objections": [...], "launches": [{"kernel": ..., "blocks": ...}], "workspace_bytes": ...}"""
        return self._read(self.library.fae_cuda_plan, ctypes.byref(query))

    def variants(self) -> list[dict]:
        """The compiled kernels."""
        return self._read(self.library.fae_cuda_variants)


@dataclass
class Backend:
    """A place that the kernels run in: planner is None where they cannot be had, and missing says why."""

    planner: Planner | None = None
    missing: str | None = None


# "cuda", and "cuda_emulated" once testing.load_emulator() has been called.
BACKENDS: dict[str, Backend] = {"cuda": Backend(missing="it has not been loaded")}


def forget() -> None:
    """Ask again what has been asked before: for tests that change the answers."""
    for cached in (_objections, _card, _driver_objection):
        cached.cache_clear()


def load() -> None:
    """Load the kernels where they were built and torch has CUDA."""
    missing = _load.load_cuda_operators()
    BACKENDS["cuda"] = Backend(None if missing else Planner(_load.CUDA_LIBRARY), missing)


def device_of(backend: str, device: torch.device) -> Device:
    """The card that a plan is for."""
    if backend != "cuda":
        return EMULATED
    if not _is_card(device):
        return A100
    return _card(torch.cuda.current_device() if device.index is None else device.index)


def _is_card(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


@functools.lru_cache(maxsize=64)
def _card(index: int) -> Device:
    card = torch.cuda.get_device_properties(index)
    return Device(
        10 * card.major + card.minor,
        card.shared_memory_per_block_optin,
        card.L2_cache_size,
        card.multi_processor_count,
    )


@functools.lru_cache(maxsize=1)
def _driver_objection(planner: Planner) -> str | None:
    """Why this machine's driver cannot run what the library was built with."""
    built, driver = planner.library.fae_cuda_runtime_version(), torch._C._cuda_getDriverVersion()
    if driver // 1000 >= built // 1000:
        return None
    return (
        f"its kernels were built with CUDA {built // 1000}.{built % 1000 // 10}, "
        f"and the driver here is one for CUDA {driver // 1000}.{driver % 1000 // 10}"
    )


def unavailable(backend: str) -> str | None:
    """Why the backend cannot run in this process, or None."""
    found = BACKENDS[backend]
    if found.missing:
        return found.missing
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    return None


def query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Options,
    device: Device,
    **options: int,
) -> _Query:
    """The planner's question; `options` are backward, deterministic, fast_fp32, num_splits, batch_invariant
    and the gradients needed."""
    q, k, v = (heads_first(t, given.layout) for t in (q, k, v))
    shape = () if given.bias is None else tuple(given.bias.shape)
    return _Query(
        batch=q.shape[0],
        heads_q=q.shape[1],
        heads_kv=k.shape[1],
        seq_q=q.shape[2],
        seq_kv=k.shape[2],
        dim=q.shape[3],
        dim_v=v.shape[3],
        dbias_shape=(ctypes.c_int64 * 4)(*(1,) * (4 - len(shape)), *shape),
        scale=1.0 if given.scale is None else given.scale,
        softcap=given.softcap,
        dtype=_DTYPES[q.dtype],
        biased=given.bias is not None,
        with_slopes=given.alibi_slopes is not None,
        with_dropout=given.rng_state is not None,
        with_sinks=given.sinks is not None,
        **device._asdict(),
        **options,
    )


def _refusals(planner: Planner, device: Device, dtype: torch.dtype, dim: int) -> tuple[str, ...]:
    """What no kernel of this build can do for this dtype and head dim on this card, forward or backward."""
    found: dict[str, None] = {}
    for backward, deterministic, biased in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 1)):
        question = _Query(
            *(1,) * 5, dim, dim, scale=1.0, dtype=_DTYPES[dtype], biased=biased, need_bias_grad=biased,
            dbias_shape=(ctypes.c_int64 * 4)(1, 1, 1, 1), backward=backward, deterministic=deterministic,
            **device._asdict(),
        )  # fmt: skip
        found.update(dict.fromkeys(planner.plan(question)["objections"]))
    return tuple(found)


@constant_when_compiled
def objections(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> tuple[str, ...]:
    """Every reason why the kernels cannot serve tensors of this dtype and largest head dim, of which 0 stands
    for any, on this device."""
    return _objections(backend, device, dtype, dim or MAX_DIM)


@functools.lru_cache(maxsize=1024)
def _objections(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> tuple[str, ...]:
    found, reasons = BACKENDS[backend], []
    home = "cuda" if backend == "cuda" else "cpu"
    if found.missing:
        reasons.append(found.missing)
    if device.type not in (home, "meta"):
        reasons.append(f"its kernels run on {home.upper()} tensors, q is on {device.type}")
    if found.planner is None or dtype not in _DTYPES:
        return tuple(reasons)
    if backend == "cuda" and _is_card(device) and (reason := _driver_objection(found.planner)):
        reasons.append(reason)
    reasons += _refusals(found.planner, device_of(backend, device), dtype, dim)
    return tuple(reasons)


def explain(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Options,
    deterministic: bool | None,
    backward: bool,
    num_splits: int,
    batch_invariant: bool,
) -> dict:
    """What of `introspect.Plan` is the kernels' own.

    Raises:
        NotImplementedError: the planner objects to something that no smaller call would have shown.
    """
    device = device_of(backend, q.device)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    fast_fp32 = q.dtype == torch.float32 and tf32_is_allowed()
    options = {
        "backward": backward,
        "deterministic": deterministic,
        "fast_fp32": fast_fp32,
        "num_splits": num_splits,
        "batch_invariant": batch_invariant,
    }
    for name, option in (
        ("need_bias_grad", given.bias),
        ("need_slope_grad", given.alibi_slopes),
        ("need_sink_grad", given.sinks),
    ):
        options[name] = backward and option is not None and option.requires_grad
    question = query(q, k, v, given, device, **options)
    plan = BACKENDS[backend].planner.plan(question)
    if plan["objections"]:
        reasons = "; ".join(plan["objections"])
        raise NotImplementedError(f"backend {backend!r} cannot serve this call: {reasons}")
    launches = plan["launches"]
    main = next(launch for launch in launches if launch["pass"] in ("forward", "key_grad"))
    return {
        "kernel": main["kernel"],
        "isa": "sm_80",
        "block_q": main["tile_q"],
        "block_kv": main["tile_kv"],
        "chunks": 1,
        "splits": plan["num_splits"],
        "tasks": sum(launch["blocks"] for launch in launches),
        "threads": main["threads"],
        "shared_bytes": main["shared_bytes"],
        "launches": [(launch["kernel"], launch["blocks"]) for launch in launches],
        "workspace_bytes": plan["workspace_bytes"],
        "notes": _notes(main, max(q.shape[-1], v.shape[-1]), fast_fp32, backward and deterministic),
    }


def _notes(main: dict, dim: int, fast_fp32: bool, deterministic: bool) -> list[str]:
    notes = []
    if main["split"]:
        notes.append(
            f"a head dim of {dim} is cut into slices of {main['dim']}, which is slower than a whole one"
        )
    if main["dtype"] == "float32":
        products = "one TF32 product" if fast_fp32 else "three TF32 products"
        notes.append(f"{products} for each of float32")
    if deterministic:
        notes.append("deterministic gradients take a second pass over the keys")
    return [*notes, MATURITY]


@constant_when_compiled
def tf32_is_allowed() -> bool:
    """Whether torch's precision of float32 products on CUDA permits TF32."""
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
