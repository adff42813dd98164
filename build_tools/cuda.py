"""The CUDA kernels: which of them there are, and how nvcc is found and asked to compile them.

Environment:

- ``FLASH_ATTN_EXT_CUDA``: 0 for no CUDA build; 1 to make the want of nvcc an error.
- ``CUDA_HOME``: where nvcc is; default: on the PATH.
- ``FLASH_ATTN_EXT_ARCHS``, such as "80;90": code for these, and PTX of the last for newer cards; default 80.
- ``FLASH_ATTN_EXT_HEAD_DIMS``, such as "64;128": only these tiles; default all. Other head dims take a larger
  tile, or are cut into slices, which is slower.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from build_tools.ninja import BuildError

OLDEST_ARCH = 80

# Of each file of csrc/cuda/inst and element type: the tiles' head dims, and the width of the slices that
# longer ones are cut into. What takes longest to compile comes first.
_WHOLE_AND_SLICE = {
    "backward": {"BFloat16": ((128, 64), 64), "Float16": ((128, 64), 64), "float": ((64,), 64)},
    "forward": {
        "float": ((128, 64), 64),
        "BFloat16": ((256, 128, 96, 64), 128),
        "Float16": ((256, 128, 96, 64), 128),
    },
}
HEAD_DIMS = sorted({d for types in _WHOLE_AND_SLICE.values() for dims, _ in types.values() for d in dims})


@dataclass(frozen=True)
class Instance:
    """One compilation of a file of csrc/cuda/inst."""

    source: str
    type: str = ""
    dim: int = 0
    split: bool = False

    @property
    def name(self) -> str:
        parts = [self.source, self.type, str(self.dim or ""), "split" if self.split else ""]
        return "_".join(filter(None, parts))

    @property
    def defines(self) -> list[str]:
        """What the file has to be told."""
        if not self.type:
            return []
        dim = [f"-DFAE_DIM={self.dim}", f"-DFAE_SPLIT={str(self.split).lower()}"] if self.dim else []
        return [f"-DFAE_TYPE={self.type}", *dim]


def instances(head_dims: tuple[int, ...] = tuple(HEAD_DIMS)) -> list[Instance]:
    """Every compilation of a build with these head dims; with slices always, so that any head dim works."""
    found = []
    for source, types in _WHOLE_AND_SLICE.items():
        for type_, (whole, width) in types.items():
            found.append(Instance(source, type_, width, split=True))
            found += [Instance(source, type_, dim) for dim in whole if dim in head_dims]
            found.append(Instance(f"{source}_aux", type_))
    return [*found, Instance("memory")]


@dataclass(frozen=True)
class Toolkit:
    """What a CUDA build is made with and for."""

    nvcc: str
    archs: tuple[int, ...]
    head_dims: tuple[int, ...]

    @property
    def code_flags(self) -> list[str]:
        """Machine code for each arch, and PTX from which drivers compile for cards newer than the last."""
        newest = self.archs[-1]
        wanted = [*(f"arch=compute_{a},code=sm_{a}" for a in self.archs),
                  f"arch=compute_{newest},code=compute_{newest}"]  # fmt: skip
        return [part for flag in wanted for part in ("-gencode", flag)]


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """The nvcc of CUDA_HOME, or the first on the PATH."""
    home = environment.get("CUDA_HOME")
    if home:
        return shutil.which(str(Path(home) / "bin" / "nvcc"))
    return shutil.which("nvcc", path=environment.get("PATH"))


def known_archs(nvcc: str) -> list[int]:
    """The architectures that this nvcc compiles for, from the oldest that the kernels run on."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    found = sorted({int(number) for number in re.findall(r"compute_(\d+)\b", listed.stdout)})
    return [arch for arch in found if arch >= OLDEST_ARCH]


def _entries(name: str, text: str) -> list[str]:
    found = [entry for entry in re.split(r"[;, ]+", text) if entry]
    if not found:
        raise BuildError(f"{name} is {text!r}, but must hold at least one number or be unset.")
    return found


def parse_archs(text: str, known: Collection[int]) -> tuple[int, ...]:
    """ "80;9.0" as (80, 90). Raises BuildError for what `known` does not hold."""
    name = "FLASH_ATTN_EXT_ARCHS"
    archs = set()
    for entry in _entries(name, text):
        number = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)", entry)
        arch = int("".join(number.groups())) if number else 0
        if arch not in known:
            allowed = ", ".join(map(str, known)) or "none"
            raise BuildError(f"{name} is {text!r}, and {entry!r} is none that this nvcc knows: {allowed}.")
        archs.add(arch)
    return tuple(sorted(archs))


def parse_head_dims(text: str) -> tuple[int, ...]:
    """ "64;128" as (64, 128). Raises BuildError for head dims that have no tile."""
    name = "FLASH_ATTN_EXT_HEAD_DIMS"
    dims = set()
    for entry in _entries(name, text):
        if not entry.isdecimal() or int(entry) not in HEAD_DIMS:
            allowed = ", ".join(map(str, HEAD_DIMS))
            raise BuildError(f"{name} is {text!r}, and {entry!r} is none of {allowed}.")
        dims.add(int(entry))
    return tuple(sorted(dims))


def find_toolkit(environment: Mapping[str, str] = os.environ) -> Toolkit | str:
    """What to build with, or one reason why the build has no CUDA. Raises BuildError for a wrong setting."""
    wanted = environment.get("FLASH_ATTN_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"FLASH_ATTN_EXT_CUDA is {wanted!r}, but must be 0, 1 or unset.")
    if wanted == "0":
        return "FLASH_ATTN_EXT_CUDA=0"
    nvcc = find_nvcc(environment)
    if not nvcc:
        home = environment.get("CUDA_HOME")
        reason = f"no nvcc in CUDA_HOME={home}" if home else "no nvcc on the PATH, and CUDA_HOME is not set"
        if wanted == "1":
            raise BuildError(f"FLASH_ATTN_EXT_CUDA is 1, but there is {reason}.")
        return reason
    known = known_archs(nvcc)
    if OLDEST_ARCH not in known and not environment.get("FLASH_ATTN_EXT_ARCHS"):
        raise BuildError(
            f"{nvcc} does not compile for compute capability {OLDEST_ARCH / 10}: "
            "set FLASH_ATTN_EXT_ARCHS, or FLASH_ATTN_EXT_CUDA=0 for a build without CUDA."
        )
    archs = parse_archs(environment.get("FLASH_ATTN_EXT_ARCHS") or str(OLDEST_ARCH), known)
    dims = environment.get("FLASH_ATTN_EXT_HEAD_DIMS")
    return Toolkit(nvcc, archs, parse_head_dims(dims) if dims else tuple(HEAD_DIMS))
