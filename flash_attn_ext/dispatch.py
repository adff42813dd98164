"""Which backend serves a call: the one place where that is decided, explained and logged."""

from __future__ import annotations

import logging
import os

import torch

from ._errors import choice

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


_AUTO_CPU = "auto: cpu kernels serve tensors on cpu"


def log_auto_cpu() -> None:
    if _AUTO_CPU not in _logged:
        log_once(logging.DEBUG, _AUTO_CPU)


def check_backend_name(argument: str, name: object) -> None:
    choice(argument, name, dict.fromkeys(BACKENDS))


def set_backend(name: str) -> None:
    """Make `name` the backend of every later call that does not name one; "auto" undoes it.

    Args:
        name: "auto", "cpu", "portable" or "standard".

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: it exists and cannot run here; the message says why.
    """
    check_backend_name("backend name", name)
    if name == "cuda":
        raise NotImplementedError(f"backend 'cuda' is unavailable: {unavailable()['cuda']}")
    global _default, _default_from
    _default, _default_from = name, "set_backend"


def unavailable() -> dict[str, str]:
    """Backends that cannot run in this installation, and why."""
    return {"cuda": "this build holds no CUDA kernels"}


def available_backends() -> list[str]:
    """Backends that can run here, in the order in which "auto" prefers them.

    Example:
        >>> available_backends()
        ['cpu', 'portable', 'standard']
    """
    missing = unavailable()
    return [name for name in BACKENDS if name != "auto" and name not in missing]


def objections(backend: str, device: torch.device, batch_invariant: bool = False) -> list[str]:
    """Every reason why `backend` cannot serve such a call; empty when it can."""
    reasons = []
    if reason := unavailable().get(backend):
        reasons.append(reason)
    if backend == "cpu" and device.type != "cpu":
        reasons.append(f"its kernels run on the CPU, q is on {device.type}")
    if backend == "standard" and batch_invariant:
        reasons.append("batch_invariant=True: one large product may round differently at another size")
    return reasons


def resolve(backend: str, configured: str, device: torch.device, batch_invariant: bool) -> str:
    """The backend that serves a call: what it names, else its config, else the default, else the best.

    Raises:
        ValueError: a name that is no backend. NotImplementedError: a backend that cannot serve the call.
    """
    for argument, name in (("backend", backend), ("config.backend", configured)):
        if name != "auto":
            check_backend_name(argument, name)
            return _required(name, device, batch_invariant)
    if _default != "auto":
        check_backend_name(_default_from, _default)
        return _required(_default, device, batch_invariant)
    if device.type in ("cpu", "meta"):
        log_auto_cpu()
        return "cpu"
    log_once(
        logging.WARNING,
        f"auto: no kernels for device {device.type!r} in this build, using the slower backend 'portable'",
    )
    return "portable"


def _required(name: str, device: torch.device, batch_invariant: bool) -> str:
    if reasons := objections(name, device, batch_invariant):
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {'; '.join(reasons)}")
    return name
