"""Compiles and links the native binaries with ninja: incremental, parallel, with header dependencies.

``setup.py`` calls :func:`build`; ``python -m build_tools.native`` does the same in place, for quick rebuilds.
Two binaries come out, both linked from the same core and CPU objects:

- ``flash_attn_ext/_C.<abi>.so``: the pybind11 module; sees no torch header.
- ``flash_attn_ext/lib/libflash_attn_ext_cpu.so``: the operators, on libtorch's stable ABI.

Environment: ``CXX`` (compiler), ``CXXFLAGS`` (appended), ``MAX_JOBS`` (compilers at once, default all cores).
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
PACKAGE = "flash_attn_ext"
OPERATOR_LIBRARY = f"{PACKAGE}/lib/lib{PACKAGE}_cpu.so"
EXTENSION_MODULE = f"{PACKAGE}/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
BINARIES = (EXTENSION_MODULE, OPERATOR_LIBRARY)

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)
# The floor of the stable ABI, as libtorch encodes it: major, minor, patch in the top three bytes.
TORCH_TARGET_VERSION = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"

CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
EXPORTS = ROOT / "build_tools" / "exports.map"  # everything else stays inside its binary
LINK_FLAGS = ["-shared", "-pthread", f"-Wl,--version-script={EXPORTS}", "-Wl,-z,defs", "-Wl,--as-needed"]

# An ISA file sets its own target by pragma; only those of the machine's architecture compile.
ISA_BY_MACHINE = {
    "x86_64": ("scalar", "avx2", "avx512", "avx512bf16"),
    "aarch64": ("scalar", "neon"),
}
MACHINE_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildError(RuntimeError):
    """A build that cannot start; the message is one sentence for the user."""


@dataclass(frozen=True)
class Torch:
    """The torch to compile against: found on disk, never imported."""

    include: Path
    lib: Path
    version: str


def check_python() -> None:
    """Raise :class:`BuildError` below the oldest supported Python."""
    if sys.version_info < MIN_PYTHON:
        raise BuildError(
            f"flash_attn_ext needs Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer; "
            f"this is Python {platform.python_version()}."
        )


def find_torch() -> Torch:
    """Locate the installed torch and check its version, without importing it."""
    needed = f"{MIN_TORCH[0]}.{MIN_TORCH[1]}"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            f"flash_attn_ext needs torch {needed} or newer to build, and torch is not installed: "
            f"run `pip install 'torch>={needed}'`, or drop --no-build-isolation."
        )
    home = Path(spec.origin).parent
    found = re.search(r"__version__\s*(?::[^=]+)?=\s*['\"]([^'\"]+)", (home / "version.py").read_text())
    version = found.group(1) if found else "unknown"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or tuple(map(int, numbers.groups())) < MIN_TORCH:
        raise BuildError(f"flash_attn_ext needs torch {needed} or newer; torch {version} is installed.")
    return Torch(home / "include", home / "lib", version)


def find_compiler() -> str:
    """The C++ compiler command: ``$CXX``, or the first of g++, clang++, c++."""
    wanted = os.environ.get("CXX")
    for command in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    raise BuildError(
        f"flash_attn_ext needs a C++17 compiler: {f'CXX={wanted}' if wanted else 'g++'} was not found; "
        "install g++ (Debian, Ubuntu: `apt install g++`) or set CXX."
    )


def machine() -> str:
    """The architecture that the binaries are built for."""
    name = platform.machine().lower()
    name = MACHINE_ALIASES.get(name, name)
    if name not in ISA_BY_MACHINE:
        raise BuildError(f"flash_attn_ext builds on {' and '.join(ISA_BY_MACHINE)}; this machine is {name}.")
    return name


def sources(room: str) -> list[Path]:
    """The source files of one room of ``csrc/`` for this machine, in a stable order."""
    files = sorted((SOURCES / room).glob("*.cpp"))
    if room == "cpu":
        files += [SOURCES / "cpu" / "isa" / f"isa_{isa}.cpp" for isa in ISA_BY_MACHINE[machine()]]
    return files


def package_version() -> str:
    """The one version number of the project, from pyproject.toml."""
    found = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, "pyproject.toml states no version"
    return found.group(1)


def _quote(path: Path | str) -> str:
    """A path as ninja wants it in a build statement."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(output: Path) -> str:
    """The text of build.ninja, for binaries under ``output`` (the folder that holds the package)."""
    import pybind11

    torch = find_torch()
    flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    about = {
        "FAE_VERSION": package_version(),
        "FAE_CXX_FLAGS": " ".join(flags),
        "FAE_ISAS": ",".join(ISA_BY_MACHINE[machine()]),
    }
    rooms = {
        "core": [],
        "cpu": [],
        "torch": [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch.include)],
        "python": [
            *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]),
            *(f'-D{name}="{value}"' for name, value in about.items()),
        ],
    }
    lines = [
        f"cxx = {find_compiler()}",
        f"flags = {shlex.join([*flags, f'-I{SOURCES}'])}",
        f"link_flags = {shlex.join(LINK_FLAGS)}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags $room_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $source",
        "rule link",
        # A fresh file, not an overwritten one: a running process keeps the old one intact.
        "  command = rm -f $out && $cxx -o $out $in $link_flags $libraries",
        "  description = link $out",
    ]
    objects: dict[str, list[str]] = {}
    for room, room_flags in rooms.items():
        lines.append(f"{room}_flags = {shlex.join(room_flags).replace('$', '$$')}")
        for source in sources(room):
            relative = source.relative_to(SOURCES)
            target = _quote(Path("obj") / relative.with_suffix(".o"))
            objects.setdefault(room, []).append(target)
            lines.append(f"build {target}: compile {_quote(source)}")
            lines.append(f"  room_flags = ${room}_flags")
            lines.append(f"  source = csrc/{relative}")
    shared = [*objects.get("core", []), *objects.get("cpu", [])]
    binaries = [
        # Python's own symbols come from the interpreter.
        (EXTENSION_MODULE, [*shared, *objects["python"]], ["-Wl,-z,undefs"]),
        # Found by name among the libraries that `import torch` has loaded: no run path is needed.
        (OPERATOR_LIBRARY, [*shared, *objects["torch"]], [f"-L{torch.lib}", "-ltorch_cpu"]),
    ]
    for name, inputs, libraries in binaries:
        lines.append(f"build {_quote(output / name)}: link {' '.join(inputs)}")
        lines.append(f"  libraries = {shlex.join(libraries)}")
    return "\n".join(lines) + "\n"


def build(output: Path = ROOT, work: Path | None = None) -> list[Path]:
    """Build both binaries into the package under ``output``; returns their paths.

    ``work`` keeps objects between calls (default ``build/native-<python>``). Raises :class:`BuildError`.
    """
    check_python()
    compiler, torch = find_compiler(), find_torch()
    work = work or ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
    work.mkdir(parents=True, exist_ok=True)
    for name in BINARIES:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
    text = ninja_file(output.resolve())
    isas = ", ".join(ISA_BY_MACHINE[machine()])
    print(f"flash_attn_ext: CPU-only build ({isas}) with {compiler}, torch {torch.version}", flush=True)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
        (work / "build.ninja").write_text(text)
        command = [sys.executable, "-m", "ninja", "-C", str(work), "-j", jobs]
        status = subprocess.run(command).returncode
    if status:
        raise BuildError(
            f"flash_attn_ext did not compile: the compiler's messages are above (ninja returned {status})."
        )
    return [output / name for name in BINARIES]


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"error: {error}")
