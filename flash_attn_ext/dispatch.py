"""Which backend serves a call: the one place where that is decided, explained and logged."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _cuda
from ._errors import choice

if TYPE_CHECKING:
    from .config import AttentionConfig

BACKENDS = ("auto", "cpu", "cuda", "portable", "standard")

logger = logging.getLogger("flash_attn_ext")
_logged: set[str] = set()


# `set_backend`'s choice; until then FLASH_ATTN_EXT_BACKEND's.
_default = os.environ.get("FLASH_ATTN_EXT_BACKEND") or "auto"
_default_from = "FLASH_ATTN_EXT_BACKEND"


def is_auto() -> bool:
    """Whether nobody has set another default."""
    return _default == "auto"


def configure_logging() -> None:
    """FLASH_ATTN_EXT_LOG=debug (info, warning, ...) shows this package's log on stderr."""
    level = os.environ.get("FLASH_ATTN_EXT_LOG")
    if not level:
        return
    names = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if level.upper() not in names:
        raise ValueError(f"FLASH_ATTN_EXT_LOG must be one of {', '.join(names)}, got {level!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())


def log_once(level: int, message: str) -> None:
    """Log a message the first time that it comes up in this process; never while torch traces."""
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.log(level, message)


_AUTO = {
    "cpu": "auto: cpu kernels serve tensors on cpu",
    "cuda": "auto: cuda kernels serve tensors on cuda",
}


def takes_cpu(compiling: bool) -> bool:
    """Whether "auto" stands for the CPU's kernels where tensors are on the CPU; logged as it is. `compiling`:
    whether torch traces, whose graph must not depend on what has been logged."""
    if _default != "auto":
        return False
    if not compiling and _AUTO["cpu"] not in _logged:
        log_once(logging.DEBUG, _AUTO["cpu"])
    return True


def _known() -> list[str]:
    """Every name that a caller may give: a backend of tests is one once it has been loaded."""
    return [*BACKENDS, *(name for name in _cuda.BACKENDS if name not in BACKENDS)]


def check_backend_name(argument: str, name: object) -> None:
    choice(argument, name, dict.fromkeys(_known()))


def set_backend(name: str) -> None:
    """Make `name` the backend of every later call that does not name one; "auto" undoes it.

    Args:
        name: "auto", "cpu", "cuda", "portable" or "standard".

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: it exists and cannot run here; the message says why.
    """
    check_backend_name("backend name", name)
    if name in _cuda.BACKENDS and (reason := _cuda.unavailable(name)):
        raise NotImplementedError(f"backend {name!r} is unavailable: {reason}")
    global _default, _default_from
    _default, _default_from = name, "set_backend"


def unavailable() -> dict[str, str]:
    """Backends that cannot run in this process, and why."""
    reasons = {name: _cuda.unavailable(name) for name in _cuda.BACKENDS}
    return {name: reason for name, reason in reasons.items() if reason}


def available_backends() -> list[str]:
    """Backends that can run here, in the order in which "auto" prefers them.

    Example:
        >>> available_backends()
        ['cpu', 'portable', 'standard']
    """
    missing = unavailable()
    return [name for name in _known() if name != "auto" and name not in missing]


class Request(NamedTuple):
    """What of a call the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    dim: int  # the larger of q's and v's; 0 is unknown
    batch_invariant: bool

    @classmethod
    def of(cls, q: Tensor, v: Tensor, batch_invariant: bool) -> Request:
        """While torch traces, a size may be a symbol, and the choice must not depend on it."""
        sized = not torch.compiler.is_compiling() and q.dim() and v.dim()
        dim = max(q.shape[-1], v.shape[-1]) if sized else 0
        return cls(q.device, q.dtype, dim, batch_invariant)


def objections(backend: str, request: Request) -> list[str]:
    """Every reason why `backend` cannot serve such a call; empty when it can."""
    reasons = []
    device = request.device
    if backend in _cuda.BACKENDS:
        reasons += _cuda.objections(backend, device, request.dtype, request.dim)
    if backend == "cpu" and device.type != "cpu":
        reasons.append(f"its kernels run on the CPU, q is on {device.type}")
    if backend == "standard" and request.batch_invariant:
        reasons.append("batch_invariant=True: one large product may round differently at another size")
    return reasons


def resolve(backend: str, configured: str, request: Request) -> str:
    """The backend that serves a call: what it names, else its config, else the default, else the best.

    Raises:
        ValueError: a name that is no backend. NotImplementedError: a backend that cannot serve the call.
    """
    for argument, name in (("backend", backend), ("config.backend", configured)):
        if name != "auto":
            check_backend_name(argument, name)
            return _required(name, request)
    if _default != "auto":
        check_backend_name(_default_from, _default)
        return _required(_default, request)
    name, reasons = preferred(request)
    if reasons:
        why = "; ".join(reasons)
        log_once(
            logging.WARNING,
            f"auto: the slower backend 'portable' serves tensors on {request.device.type}: {why}",
        )
    else:
        log_once(logging.DEBUG, _AUTO[name])
    return name


def preferred(request: Request) -> tuple[str, list[str]]:
    """What "auto" takes, and why nothing better."""
    kind = request.device.type
    if kind in ("cpu", "meta"):
        return "cpu", []
    if kind != "cuda":
        return "portable", [f"there are no kernels for device {kind!r} in this build"]
    reasons = objections("cuda", request)
    return ("portable" if reasons else "cuda"), reasons


# What of a config's advice a backend takes; the others take none.
_ADVICE = {"cpu": ("block_q", "block_kv", "num_splits"), "portable": ("block_q", "block_kv")}
_ADVICE_ON_CUDA = ("num_splits",)


def blocks(name: str, config: AttentionConfig, batch_invariant: bool) -> tuple[int, int]:
    """(block_q, block_kv) as backend `name` is advised, 0 being its own choice. Says so, once, where advice
    is given that it does not take."""
    one_query = batch_invariant and name == "portable"  # no product depends on how many there are
    known = _ADVICE_ON_CUDA if name in _cuda.BACKENDS else _ADVICE.get(name, ())
    taken = {}
    for field in ("block_q", "block_kv", "num_splits"):
        advice = getattr(config, field)
        taken[field] = field in known and not (one_query and field == "block_q")
        if advice is not None and not taken[field]:
            log_once(logging.WARNING, f"config.{field}: backend {name!r} makes no use of it")
    sizes = (getattr(config, field) if taken[field] else None for field in ("block_q", "block_kv"))
    block_q, block_kv = (size or 0 for size in sizes)
    return (1 if one_query else block_q), block_kv


def _required(name: str, request: Request) -> str:
    if reasons := objections(name, request):
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {'; '.join(reasons)}")
    return name
