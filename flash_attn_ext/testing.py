"""For tests: what dropout leaves, and the CUDA kernels on CPU tensors, by an emulator of the card.

The backend "cuda_emulated" exists once `load_emulator` has been called. It runs the sources that a card
runs, checks every access to memory, and takes thousands of times longer; it is for finding mistakes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from . import _cache_call, _cuda, autograd, batching, fake, ops
from ._philox import call_key, draw_state, keep_tile

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
    for name, family, by_backend in (
        ("emulated", ops.PLAIN_FAMILY, ops.BY_BACKEND),
        ("emulated_extended", ops.EXTENDED_FAMILY, ops.EXTENDED_BY_BACKEND),
    ):
        operators = ops.named(name, family)
        fake.register(operators)
        autograd.register(operators)
        batching.register(operators)
        by_backend[BACKEND] = operators
    kvcache = torch.ops.flash_attn_ext.emulated_kvcache.default
    torch.library.register_fake(kvcache, _cache_call.fake)
    _cache_call.BY_BACKEND[BACKEND] = kvcache
    _cuda.BACKENDS[BACKEND] = _cuda.Backend(_cuda.Planner(path))


def set_emulator_seed(seed: int) -> None:
    """Choose the order in which the emulator runs blocks, warps and copies from now on."""
    planner = _cuda.BACKENDS[BACKEND].planner
    planner.library.fae_emulator_set_seed(ctypes.c_uint64(seed))


def next_rng_state(device: torch.device | str = "cpu") -> Tensor:
    """The state, int64 (2,), that the next call with dropout on `device` will draw. Asking draws nothing.

    Example:
        >>> state = next_rng_state()
        >>> out = flash_attention(q, k, v, dropout_p=0.1)
        >>> kept = dropout_mask(state, batch, heads, seq_q, seq_kv, 0.1)
    """
    device = torch.device(device)
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            return draw_state(device)
    with torch.random.fork_rng([device], device_type=device.type):
        return draw_state(device)


def dropout_mask(rng_state: Tensor, batch: int, heads: int, seq_q: int, seq_kv: int, p: float) -> Tensor:
    """Which weights a call with `dropout_p=p` keeps: bool (batch, heads, seq_q, seq_kv) on the same device.

    Args:
        rng_state: int64 (2,), seed and offset; see `next_rng_state`.
        heads: query heads.
    """
    return keep_tile(call_key(rng_state), p, range(batch), range(heads), range(seq_q), range(seq_kv))
