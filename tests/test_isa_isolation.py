"""No object built for a newer instruction set may offer code that the linker could share with older paths.

A weak symbol (an inline function, a template instance) exists once in a linked binary, taken from whichever
object comes first. If an AVX-512 object offered, say, an instance of ``std::vector``, the scalar path could
call it and crash on an older processor. So all that such an object exports must carry its own namespace.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from build_tools import native

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}" / "obj" / "cpu" / "isa"
# The baseline of the architecture may share whatever it likes.
BASELINE = {"scalar", "neon"}
NEWER = [path.stem.removeprefix("isa_") for path in sorted((ROOT / "csrc/cpu/isa").glob("isa_*.cpp"))]
NEWER = [isa for isa in NEWER if isa not in BASELINE]
# Pointers to the C++ runtime, the same in every object: data, no code.
HARMLESS = re.compile(r"DW\.ref\.__g")

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no newer instruction set here"),
    pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not installed"),
]


def shared_symbols(obj: Path, isa: str) -> list[str]:
    """Symbols that ``obj`` defines for others to link to, without the mark of ``isa`` in their names."""
    nm = ["nm", "-C", "--defined-only", obj]
    listing = subprocess.run(nm, check=True, capture_output=True, text=True).stdout
    own = re.compile(rf"\bfae::cpu::{isa}(?:::|_kernels\(\))")
    faults = []
    for line in listing.splitlines():
        match = re.match(r"[0-9a-fA-F]* *([A-Za-z]) (.*)", line)
        assert match, line
        kind, name = match.groups()
        # Upper case is visible outside the object; v, w and u are weak or unique.
        visible = kind.isupper() or kind in "vwu"
        if visible and not own.search(name) and not HARMLESS.match(name):
            faults.append(f"{kind} {name}")
    return faults


def object_of(isa: str) -> Path:
    obj = OBJECTS / f"isa_{isa}.o"
    if not obj.exists():
        pytest.skip(f"no {obj.relative_to(ROOT)}: the package was not built from this tree")
    return obj


@pytest.mark.parametrize("isa", NEWER)
def test_object_shares_nothing(isa: str) -> None:
    assert shared_symbols(object_of(isa), isa) == []


def run_time_initialisers(obj: Path) -> list[str]:
    """Symbols of ``obj`` that say that something static is built when the program runs."""
    nm = subprocess.run(["nm", "-C", obj], check=True, capture_output=True, text=True).stdout
    return [line for line in nm.splitlines() if re.search(r"guard variable|_GLOBAL__sub_I|cxa_guard", line)]


@pytest.mark.parametrize("isa", NEWER)
def test_object_is_harmless_until_a_kernel_runs(isa: str) -> None:
    """Tables are read on every processor, so code of the newer instruction set must not build them."""
    assert run_time_initialisers(object_of(isa)) == []


def test_a_standard_template_is_noticed(tmp_path: Path) -> None:
    """The same check finds a template instance and an inline function that were built for AVX2."""
    source = tmp_path / "leak.cpp"
    source.write_text(
        "#include <vector>\n"
        "inline __attribute__((noinline)) int shared(int x) { return x * 3; }\n"
        '#pragma GCC target("avx2")\n'
        "namespace fae::cpu::avx2 {\n"
        "void grow(std::vector<double>* v, int n) { for (int i = 0; i < n; ++i) v->push_back(shared(i)); }\n"
        "}\n"
    )
    obj = tmp_path / "leak.o"
    compiler = native.find_compiler().split()
    subprocess.run([*compiler, "-O1", "-std=c++17", "-fPIC", "-c", source, "-o", obj], check=True)
    faults = shared_symbols(obj, "avx2")
    assert any("std::vector" in fault for fault in faults)
    assert any("shared(int)" in fault for fault in faults)
    assert not any("grow" in fault for fault in faults)


def test_a_table_built_at_run_time_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "table.cpp"
    source.write_text("int f(); int once() { static const int x = f(); return x; }\nconst int early = f();\n")
    obj = tmp_path / "table.o"
    subprocess.run([*native.find_compiler().split(), "-fPIC", "-c", source, "-o", obj], check=True)
    faults = "\n".join(run_time_initialisers(obj))
    assert "guard variable" in faults and "_GLOBAL__sub_I" in faults


def test_compile_flags_name_no_processor() -> None:
    """``-march`` for all files would make every object a newer one."""
    assert not [flag for flag in native.CXX_FLAGS if flag.startswith(("-march", "-mcpu", "-mavx", "-mtune"))]
