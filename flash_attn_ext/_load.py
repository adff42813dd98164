"""Loads the native binaries: the pybind11 module ``_C`` and the operators.

Each way in which that can fail (not built, built for another Python, an old torch) is an
ImportError of one sentence.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

OPERATOR_LIBRARY = Path(__file__).resolve().parent / "lib" / "libflash_attn_ext_cpu.so"
CUDA_LIBRARY = OPERATOR_LIBRARY.with_name("libflash_attn_ext_cuda.so")
MIN_TORCH = (2, 11)


def check_torch(version: str) -> None:
    """Raise ImportError, in one sentence, for a torch below the oldest supported one."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < MIN_TORCH:
        needed = ".".join(map(str, MIN_TORCH))
        raise ImportError(f"flash_attn_ext needs torch {needed} or newer; this is torch {version}.")


def load_module(name: str = f"{__package__}._C") -> ModuleType:
    """Import the pybind11 module.

    Raises:
        ImportError: it is missing (the package was not built for this Python) or does not load.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"flash_attn_ext is not built for this Python ({error}); "
            "run `pip install -e .` in its source tree."
        ) from error


def load_operators(library: Path = OPERATOR_LIBRARY) -> None:
    """Register ``torch.ops.flash_attn_ext.*`` from the compiled library.

    Raises:
        ImportError: the library is missing or does not load in this torch.
    """
    if not library.exists():
        raise ImportError(
            f"flash_attn_ext is not built: {library} is missing; run `pip install -e .` in its source tree."
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"flash_attn_ext's operators do not load in torch {torch.__version__} ({error}); "
            "build the package again with `pip install -e .`."
        ) from error


def load_cuda_operators(library: Path = CUDA_LIBRARY) -> str | None:
    """Register the CUDA kernels of the same operators. Returns why there are none, or None."""
    if not library.exists():
        return "this build holds no CUDA kernels"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA kernels do not load in torch {torch.__version__} ({error})"
    return None


check_torch(torch.__version__)
_C = load_module()
