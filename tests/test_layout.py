"""The house rules that a reader relies on: which room may include which, and how long a file may be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# A room of csrc/, and the rooms whose headers it may include.
ALLOWED = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "torch": {"core", "cpu", "cuda", "torch"},
    "python": {"core", "cpu", "cuda", "python"},
}
STABLE_TORCH = ("torch/csrc/stable/", "torch/headeronly/")
TORCH_LIKE = ("torch/", "ATen/", "c10/", "caffe2/")
PYTHON_LIKE = ("pybind11/", "Python.h")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
ASSEMBLY = re.compile(r"\b(?:asm|__asm|__asm__)\b\s*(?:volatile|__volatile__)?\s*[({]")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
CPP = {".h", ".cpp", ".cu", ".cuh"}
CODE = CPP | {".py", ".sh"}
HOMES = ("csrc", "flash_attn_ext", "tests", "benchmarks", "examples", "build_tools")


def files(root: Path, suffixes: set[str], homes: tuple[str, ...] = HOMES) -> list[Path]:
    return sorted(file for home in homes for file in (root / home).rglob("*") if file.suffix in suffixes)


def may_include(root: Path, room: str, bracket: str, path: str) -> bool:
    if bracket == '"':
        return path.split("/")[0] in ALLOWED.get(room, {room}) and (root / "csrc" / path).is_file()
    if path.startswith(TORCH_LIKE):
        return room == "torch" and path.startswith(STABLE_TORCH)
    return room == "python" or not path.startswith(PYTHON_LIKE)


def include_faults(root: Path) -> list[str]:
    """Every include that points the wrong way, or at a torch header outside the stable set."""
    faults = []
    for file in files(root, CPP, ("csrc",)):
        name = file.relative_to(root / "csrc")
        for bracket, path in INCLUDE.findall(COMMENT.sub("", file.read_text())):
            if not may_include(root, name.parts[0], bracket, path):
                faults.append(f"{name} includes {path}")
    return faults


def assembly_faults(root: Path) -> list[str]:
    """Every file with inline assembly outside csrc/cuda/prim, which has PTX, and the emulator's switch of fibers."""
    homes = {root / "csrc" / "cuda" / "prim", root / "csrc" / "cuda" / "emu" / "fiber.cpp"}
    return [
        str(file.relative_to(root))
        for file in files(root, CPP, ("csrc",))
        if not homes & {file, *file.parents} and ASSEMBLY.search(COMMENT.sub("", file.read_text()))
    ]


def length_faults(root: Path) -> list[str]:
    counted = ((file, len(file.read_text().splitlines())) for file in files(root, CODE))
    return [f"{file.relative_to(root)}: {lines} lines" for file, lines in counted if lines > MAX_LINES]


def guard_faults(root: Path) -> list[str]:
    """Every header that may be included only once but does not say so."""
    return [
        str(file.relative_to(root))
        for file in files(root, {".h", ".cuh"}, ("csrc",))
        if "#pragma once" not in file.read_text()
    ]


def test_there_is_something_to_check():
    rooms = {file.relative_to(ROOT / "csrc").parts[0] for file in files(ROOT, CPP, ("csrc",))}
    assert {"core", "cpu", "torch", "python"} <= rooms <= ALLOWED.keys()


def test_includes_point_one_way():
    assert include_faults(ROOT) == []


def test_assembly_stays_in_its_room():
    assert assembly_faults(ROOT) == []


def test_files_are_short():
    assert length_faults(ROOT) == []


def test_headers_are_guarded():
    assert guard_faults(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/a.h", '#include "cpu/api.h"'),
        ("cpu/a.h", '#include "torch/view.h"'),
        ("cpu/kernel/a.h", "# include <torch/csrc/stable/tensor.h>"),
        ("core/a.h", "#include <ATen/ATen.h>"),
        ("torch/a.cpp", "#include <torch/extension.h>"),
        ("torch/a.cpp", '#include "python/array_argument.h"'),
        ("torch/a.cpp", "#include <pybind11/pybind11.h>"),
        ("python/a.cpp", "#include <c10/util/Half.h>"),
        ("python/a.cpp", '#include "cpu/gone.h"'),
    ],
)
def test_a_wrong_include_is_found(tmp_path, path, line):
    file = tmp_path / "csrc" / path
    file.parent.mkdir(parents=True)
    file.write_text(f"#pragma once\n{line}\n")
    for name in ("cpu/api.h", "torch/view.h", "python/array_argument.h"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text("#pragma once\n")
    assert len(include_faults(tmp_path)) == 1


def test_assembly_and_length_and_guards_are_found(tmp_path):
    room = tmp_path / "csrc" / "cpu"
    room.mkdir(parents=True)
    (room / "a.h").write_text('asm volatile("nop");\n' + "\n" * MAX_LINES)
    (room / "b.h").write_text("#pragma once\n// asm (in words)\n")
    assert assembly_faults(tmp_path) == ["csrc/cpu/a.h"]
    assert guard_faults(tmp_path) == ["csrc/cpu/a.h"]
    assert length_faults(tmp_path) == [f"csrc/cpu/a.h: {MAX_LINES + 1} lines"]
