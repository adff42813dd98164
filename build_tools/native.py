"""Compiles and links the native binaries with ninja: incremental, parallel, with header dependencies.

``setup.py`` calls :func:`build`; ``python -m build_tools.native`` does the same in place, for quick rebuilds.
Two or three binaries come out:

- ``flash_attn_ext/_C.<abi>.so``: the pybind11 module; sees no torch header.
- ``flash_attn_ext/lib/libflash_attn_ext_cpu.so``: the operators on CPU tensors, on libtorch's stable ABI.
- ``flash_attn_ext/lib/libflash_attn_ext_cuda.so``: the same on CUDA tensors, where nvcc is found.

Environment: ``CXX`` (compiler), ``CXXFLAGS`` (appended), ``MAX_JOBS`` (compilers at once, default all cores);
for CUDA what cuda.py says.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from build_tools import cuda, ninja
from build_tools.ninja import BuildError, NinjaFile

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
PACKAGE = "flash_attn_ext"
OPERATOR_LIBRARY = f"{PACKAGE}/lib/lib{PACKAGE}_cpu.so"
EXTENSION_MODULE = f"{PACKAGE}/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
CUDA_LIBRARY = f"{PACKAGE}/lib/lib{PACKAGE}_cuda.so"
BINARIES = (EXTENSION_MODULE, OPERATOR_LIBRARY)  # of every build

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)
# The floor of the stable ABI, as libtorch encodes it: major, minor, patch in the top three bytes.
TORCH_TARGET_VERSION = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"

CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
# nvcc hands what stands behind -Xcompiler to the host compiler, -Xlinker's to the linker.
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
EXPORTS = ROOT / "build_tools" / "exports.map"  # everything else stays inside its binary
LINK_FLAGS = ["-shared", "-pthread", f"-Wl,--version-script={EXPORTS}", "-Wl,-z,defs", "-Wl,--as-needed"]

# An ISA file sets its own target by pragma; only those of the machine's architecture compile.
ISA_BY_MACHINE = {
    "x86_64": ("scalar", "avx2", "avx512", "avx512bf16", "amx"),
    "aarch64": ("scalar", "neon"),
}
MACHINE_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


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


# Files of csrc/torch that belong to one operator library; the others are linked into each.
OWN_TORCH_FILES = {
    "cpu": {"backend_cpu.cpp", "executor.cpp"},
    "cuda": {"backend_cuda.cpp"},
    "emulated": {"backend_emulated.cpp"},
}


def sources(room: str) -> list[Path]:
    """The source files of one room of ``csrc/`` for this machine, in a stable order."""
    files = sorted((SOURCES / room).glob("*.cpp"))
    if room == "cpu":
        files += [SOURCES / "cpu" / "isa" / f"isa_{isa}.cpp" for isa in ISA_BY_MACHINE[machine()]]
    return files


def operator_sources(library: str) -> list[Path]:
    """The files of csrc/torch that make up one operator library: "cpu", "cuda" or "emulated"."""
    elsewhere = set().union(*OWN_TORCH_FILES.values()) - OWN_TORCH_FILES[library]
    return [file for file in sources("torch") if file.name not in elsewhere]


def package_version() -> str:
    """The one version number of the project, from pyproject.toml."""
    found = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, "pyproject.toml states no version"
    return found.group(1)


def torch_flags(torch: Torch) -> list[str]:
    """Of files that see libtorch's stable headers."""
    return [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch.include)]


def cxx_flags() -> list[str]:
    return [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]


class Objects:
    """Adds compilations to a ninja file, each source at most once."""

    def __init__(self, file: NinjaFile) -> None:
        self.file = file
        self._done: dict[str, str] = {}

    def compile(self, source: Path, flags: str, rule: str = "compile", name: str = "") -> str:
        """The object of `source`, of its own or another name, made with the flags of this ninja variable."""
        relative = source.relative_to(SOURCES)
        target = str(Path("obj") / (relative.with_name(name + ".o") if name else relative.with_suffix(".o")))
        if target not in self._done:
            self._done[target] = target
            shown = f"csrc/{relative}" + (f" ({name})" if name else "")
            self.file.build(target, rule, [source], room_flags=f"${flags}", source=shown)
        return target

    def room(self, name: str) -> list[str]:
        return [self.compile(source, f"{name.split('/')[0]}_flags") for source in sources(name)]

    def operators(self, library: str) -> list[str]:
        return [self.compile(source, "torch_flags") for source in operator_sources(library)]


def begin_ninja_file(flags: list[str], torch: Torch) -> NinjaFile:
    """Rules for C++, and flags of the rooms that every binary has."""
    file = NinjaFile()
    file.variable("cxx", shlex.split(find_compiler()))
    file.variable("flags", [*flags, f"-I{SOURCES}"])
    file.variable("link_flags", LINK_FLAGS)
    file.variable("core_flags", [])
    file.variable("cpu_flags", [])
    file.variable("cuda_flags", [])
    file.variable("torch_flags", torch_flags(torch))
    compile_command = "$cxx -MD -MF $out.d $flags $room_flags -c $in -o $out"
    file.rule("compile", compile_command, "compile $source", depfile=True)
    # A fresh file, not an overwritten one: a running process keeps the old one intact.
    file.rule("link", "rm -f $out && $cxx -o $out $in $link_flags $libraries", "link $out")
    return file


def add_cuda(objects: Objects, output: Path, torch: Torch, toolkit: cuda.Toolkit) -> None:
    """The CUDA library. nvcc links, for it knows where its runtime is."""
    file = objects.file
    file.variable("nvcc", [toolkit.nvcc])
    file.variable("nvcc_flags", [*NVCC_FLAGS, *toolkit.code_flags, f"-I{SOURCES}"])
    linker = [f"-Xlinker={flag.removeprefix('-Wl,')}" for flag in LINK_FLAGS if flag.startswith("-Wl,")]
    file.variable("nvcc_link_flags", ["-shared", "--cudart=static", "--no-device-link", *linker])
    compile_command = "$nvcc -MD -MF $out.d $nvcc_flags $room_flags -c $in -o $out"
    file.rule("nvcc", compile_command, "compile $source", depfile=True)
    file.rule("nvcc_link", "rm -f $out && $nvcc -o $out $in $nvcc_link_flags $libraries", "link $out")
    inputs = []
    for instance in [*cuda.instances(toolkit.head_dims), cuda.Instance("device")]:
        file.variable(f"{instance.name}_flags", instance.defines)
        source = SOURCES / "cuda" / "inst" / f"{instance.source}.cu"
        inputs.append(objects.compile(source, f"{instance.name}_flags", "nvcc", instance.name))
    inputs += objects.room("cuda/launch") + objects.operators("cuda") + objects.room("core")
    libraries = shlex.join([f"-L{torch.lib}", "-ltorch_cpu", "-ldl"])
    file.build(output / CUDA_LIBRARY, "nvcc_link", inputs, libraries=libraries)


def ninja_file(output: Path, toolkit: cuda.Toolkit | None) -> NinjaFile:
    """What to build, for binaries under ``output`` (the folder that holds the package)."""
    import pybind11

    torch, flags = find_torch(), cxx_flags()
    about = {
        "FAE_VERSION": package_version(),
        "FAE_CXX_FLAGS": " ".join(flags),
        "FAE_ISAS": ",".join(ISA_BY_MACHINE[machine()]),
        "FAE_CUDA_ARCHS": ",".join(map(str, toolkit.archs)) if toolkit else "",
        "FAE_CUDA_HEAD_DIMS": ",".join(map(str, toolkit.head_dims)) if toolkit else "",
    }
    file = begin_ninja_file(flags, torch)
    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    file.variable("python_flags", [*python, *(f'-D{name}="{value}"' for name, value in about.items())])
    objects = Objects(file)
    if toolkit:
        add_cuda(objects, output, torch, toolkit)  # first: it takes longest
    shared = [*objects.room("core"), *objects.room("cpu")]
    # Python's own symbols come from the interpreter.
    module = [*shared, *objects.room("python")]
    file.build(output / EXTENSION_MODULE, "link", module, libraries="-Wl,-z,undefs")
    # Found by name among the libraries that `import torch` has loaded: no run path is needed.
    libraries = shlex.join([f"-L{torch.lib}", "-ltorch_cpu"])
    file.build(output / OPERATOR_LIBRARY, "link", [*shared, *objects.operators("cpu")], libraries=libraries)
    return file


def build(output: Path = ROOT, work: Path | None = None) -> list[Path]:
    """Build all binaries into the package under ``output``; returns their paths.

    ``work`` keeps objects between calls (default ``build/native-<python>``). Raises :class:`BuildError`.
    """
    check_python()
    compiler, torch, found = find_compiler(), find_torch(), cuda.find_toolkit()
    toolkit = found if isinstance(found, cuda.Toolkit) else None
    work = work or ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
    names = (*BINARIES, CUDA_LIBRARY) if toolkit else BINARIES
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
    if not toolkit:
        (output / CUDA_LIBRARY).unlink(missing_ok=True)  # of an earlier build: it would not fit this one
    isas = ", ".join(ISA_BY_MACHINE[machine()])
    kind = f"CPU-only build ({isas}; {found})"
    if toolkit:
        kind = f"build for CPU ({isas}) and CUDA ({_cuda_text(toolkit)})"
    print(f"flash_attn_ext: {kind} with {compiler}, torch {torch.version}", flush=True)
    ninja.run(work, ninja_file(output.resolve(), toolkit))
    return [output / name for name in names]


def _cuda_text(toolkit: cuda.Toolkit) -> str:
    archs = ", ".join(f"sm_{arch}" for arch in toolkit.archs)
    return f"{archs} and PTX; head dims {', '.join(map(str, toolkit.head_dims))}"


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"error: {error}")
