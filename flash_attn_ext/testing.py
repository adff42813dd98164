"""For tests: the CUDA kernels on CPU tensors, by an emulator of the card.

The backend "cuda_emulated" exists once `load_emulator` has been called. It runs the sources that a card
runs, checks every access to memory, and takes thousands of times longer; it is for finding mistakes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from . import _cuda, autograd, fake, ops

BACKEND = "cuda_emulated"
_BUILT = Path(__file__).resolve().parent.parent / "build" / "emulated" / "libflash_attn_ext_emulated.so"


def load_emulator(library: str | Path | None = None) -> None:
    """Make the backend "cuda_emulated" available; once is enough.

    Args:
        library: what `python -m build_tools.emulated` has built; by default in this source tree.

    Raises:
        ImportError: it is missing or does not load.

    Example:
        >>> load_emulator()
        >>> flash_attention(q, k, v, backend="cuda_emulated")
    """
    if BACKEND in _cuda.BACKENDS:
        return
    path = Path(library or _BUILT)
    if not path.exists():
        raise ImportError(f"{path} is missing; run `python -m build_tools.emulated` in the source tree")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"{path} does not load in torch {torch.__version__} ({error})") from error
    operators = ops.named("emulated")
    fake.register(operators)
    autograd.register(operators)
    ops.BY_BACKEND[BACKEND] = operators
    _cuda.BACKENDS[BACKEND] = _cuda.Backend(_cuda.Planner(path))


def set_emulator_seed(seed: int) -> None:
    """Choose the order in which the emulator runs blocks, warps and copies from now on."""
    planner = _cuda.BACKENDS[BACKEND].planner
    planner.library.fae_emulator_set_seed(ctypes.c_uint64(seed))
