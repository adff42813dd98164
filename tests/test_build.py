"""The build and what it leaves behind: binaries, wheel, and the sentences it fails with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import flash_attn_ext as fae  # noqa: E402
from build_tools import native  # noqa: E402
from flash_attn_ext import _C, _load  # noqa: E402


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def requirement_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_build_info_describes_this_build():
    info = _C.build_info()
    assert info["version"] == native.package_version() == fae.__version__
    assert info["isas"] == list(native.ISA_BY_MACHINE[native.machine()])
    assert "-O3" in info["flags"] and "-ffast-math" not in info["flags"] and "-march" not in info["flags"]
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["cuda"] is _load.CUDA_LIBRARY.exists()


def test_isas_and_variants_agree():
    compiled = set(_C.build_info()["isas"])
    assert set(_C.cpu_isas()) <= compiled
    assert _C.cpu_isas()[-1] == "scalar"
    rows = {(row["isa"], row["dtype"]) for row in _C.variants()}
    assert rows == {(i, d) for i in compiled for d in ("float16", "bfloat16", "float32", "float64")}
    assert all(row["kernel"] for row in _C.variants())


def test_requirements_are_stated_once():
    pyproject = (ROOT / "pyproject.toml").read_text()
    stated = re.search(r"^requires = \[(.*)\]$", pyproject, re.MULTILINE).group(1)
    listed = requirement_lines((ROOT / "requirements-build.txt").read_text())
    assert re.findall(r'"([^"]+)"', stated) == listed
    assert f"torch>={native.MIN_TORCH[0]}.{native.MIN_TORCH[1]}" in listed
    assert _load.MIN_TORCH == native.MIN_TORCH


def test_module_works_without_torch():
    code = (
        "import importlib.util as u, sys, array; sys.modules['torch'] = None\n"
        f"spec = u.spec_from_file_location('_C', {_C.__file__!r}); C = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(C)\n"
        "q = memoryview(array.array('f', [1, 2, 3, 4])).cast('B').cast('f', (2, 2))\n"
        "out = memoryview(array.array('f', [0] * 4)).cast('B').cast('f', (2, 2))\n"
        "C.flash_attention(q, q, q, out, causal=True); print(out.tolist()[0])"
    )
    result = python("-I", "-c", code)
    assert result.stdout.strip() == "[1.0, 2.0]", result.stderr


@pytest.mark.skipif(not shutil.which("nm"), reason="binutils are needed to list symbols")
def test_operator_library_exports_nothing_of_ours():
    command = ["nm", "-D", "--defined-only", str(_load.OPERATOR_LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line for line in listing.splitlines() if "3fae" in line] == []


def test_operator_library_needs_only_stable_torch_symbols():
    text = _load.OPERATOR_LIBRARY.read_bytes()
    assert b"aoti_torch_" in text
    assert b"_ZN3c10" not in text and b"_ZN2at" not in text and b"libc10" not in text


def test_wheel_and_second_build(tmp_path):
    wheel = python("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path))
    assert wheel.returncode == 0, wheel.stdout + wheel.stderr
    (file,) = tmp_path.glob("*.whl")
    assert "-none-any" not in file.name
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        archive.extractall(tmp_path / "site")
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / native.PACKAGE).rglob("*.py")}
    assert modules | {*native.BINARIES, "flash_attn_ext/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"flash_attn_ext"}
    assert "License-Expression: BSD-3-Clause" in metadata and "Requires-Dist: torch>=2.11" in metadata

    code = (
        "import torch, flash_attn_ext as f; q = torch.ones(1, 3, 1, 2)\n"
        "print(f.__file__, f.flash_attention(q, q, q).sum().item())"
    )
    used = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert used.stdout.split() == [str(tmp_path / "site" / "flash_attn_ext" / "__init__.py"), "6.0"], (
        used.stderr
    )

    again = python("-m", "build_tools.native")
    assert again.returncode == 0, again.stdout + again.stderr
    assert ("CPU-only build" in again.stdout) != (_C.build_info()["cuda"])
    assert "compile csrc" not in again.stdout


def one_sentence(result: subprocess.CompletedProcess) -> str:
    """The error line of a failed build, which must not be a traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_missing_compiler_is_one_sentence():
    line = one_sentence(python("-m", "build_tools.native", CXX="no-such-compiler"))
    assert "no-such-compiler" in line and "install g++" in line


def test_setup_reports_the_same_way():
    assert "no-such-compiler" in one_sentence(python("setup.py", "-q", "build_ext", CXX="no-such-compiler"))


def test_old_torch_is_one_sentence(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.1+cpu'\n")
    line = one_sentence(python("-m", "build_tools.native", PYTHONPATH=str(tmp_path)))
    assert "torch 2.11 or newer" in line and "torch 2.10.1+cpu is installed" in line


def test_missing_torch_is_one_sentence(monkeypatch):
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(native.BuildError, match="torch is not installed"):
        native.find_torch()


def test_old_python_is_one_sentence(monkeypatch):
    monkeypatch.setattr(native.sys, "version_info", (3, 9, 18))
    with pytest.raises(native.BuildError, match=r"needs Python 3\.10 or newer"):
        native.check_python()


def test_unknown_machine_is_one_sentence(monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    with pytest.raises(native.BuildError, match="this machine is riscv64"):
        native.machine()


def test_loader_says_what_to_do(tmp_path):
    with pytest.raises(ImportError, match="is not built"):
        _load.load_operators(tmp_path / "missing.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ImportError, match="do not load"):
        _load.load_operators(broken)
    with pytest.raises(ImportError, match="not built for this Python"):
        _load.load_module("flash_attn_ext._C_of_another_python")
    with pytest.raises(ImportError, match=r"needs torch 2\.11 or newer; this is torch 2\.4\.0"):
        _load.check_torch("2.4.0")
    _load.check_torch("3.0.0a0+git1234")
