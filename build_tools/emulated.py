"""Compiles the CUDA kernels for the CPU: the library of the backend "cuda_emulated", for tests.

``python -m build_tools.emulated`` builds it; tests do so on demand. The sources are those that nvcc compiles,
with csrc/cuda/emu in the place of a card: the library needs neither CUDA nor a card, and is too slow for use.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from build_tools import cuda, native, ninja
from build_tools.ninja import BuildError, NinjaFile

WORK = native.ROOT / "build" / "emulated"
LIBRARY = WORK / "libflash_attn_ext_emulated.so"
CXX_FLAGS = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def ninja_file() -> NinjaFile:
    """What to build."""
    torch = native.find_torch()
    file = native.begin_ninja_file(CXX_FLAGS, torch)
    objects = native.Objects(file)
    inputs = []
    for instance in cuda.instances():
        file.variable(f"{instance.name}_flags", [*instance.defines, "-x", "c++"])
        source = native.SOURCES / "cuda" / "inst" / f"{instance.source}.cu"
        inputs.append(objects.compile(source, f"{instance.name}_flags", name=instance.name))
    inputs += objects.operators("emulated")
    inputs += objects.room("cuda/launch") + objects.room("cuda/emu") + objects.room("core")
    libraries = shlex.join([f"-L{torch.lib}", "-ltorch_cpu"])
    file.build(LIBRARY, "link", inputs, libraries=libraries)
    return file


def build() -> Path:
    """Bring the library up to date; returns its path. Raises BuildError."""
    ninja.run(WORK, ninja_file())
    return LIBRARY


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"error: {error}")
