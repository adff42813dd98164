"""The C++ tests of core and kernels (tests/cpp, GoogleTest): one pytest test per GoogleTest suite."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import emulated
from build_tools.ninja import BuildError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "cpp"
BUILD = ROOT / "build" / "cpp_tests"
PACKAGES = ("libgtest-dev", "cmake")
SUITE = re.compile(r"^(?:TEST|TEST_F|TEST_P|TYPED_TEST)\((\w+), *\w+\)", re.MULTILINE)
# Tools that pip installed lie beside the interpreter, on PATH or not.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def suites() -> dict[str, str]:
    """The suites that the sources define, in a stable order, and the program of each."""
    found = {
        name: "fae_cuda_tests" if file.name.startswith("cuda_") else "fae_tests"
        for file in SOURCES.glob("*_test.cpp")
        for name in SUITE.findall(file.read_text())
    }
    return dict(sorted(found.items()))


def run(*command: str | Path, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        env={**os.environ, "PATH": SEARCH},
    )


def configure() -> str:
    """Configure the build; returns what is missing here for it, or an empty string."""
    if not shutil.which("cmake", path=SEARCH):
        return "cmake is not installed"
    if (BUILD / "CMakeCache.txt").exists():
        return ""
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=SEARCH) else []
    objects = emulated.WORK / "obj" / "cuda" / "inst"
    result = run("cmake", *generator, "-S", SOURCES, "-B", BUILD, f"-DFAE_KERNEL_OBJECTS={objects}")
    if result.returncode == 0:
        return ""
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
    if "GoogleTest was not found" in result.stdout:
        return "GoogleTest is not installed"
    pytest.fail(f"cmake did not configure the C++ tests:\n{result.stdout}", pytrace=False)


def install_prerequisites() -> None:
    """From Debian's archive, in CI or as root only: a test run does not change a user's machine."""
    apt = shutil.which("apt-get")
    if not apt or not (os.environ.get("CI") == "true" or os.geteuid() == 0):
        return
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    install = [*prefix, apt, "install", "-y", "--no-install-recommends", *PACKAGES]
    if run(*install).returncode:
        run(*prefix, apt, "update")
        run(*install)


@functools.cache
def build(target: str) -> Path:
    """A program or library of the tests, built incrementally; parallel pytest workers take turns."""
    if target == "fae_cuda_tests":  # linked from the objects of the emulated backend
        try:
            emulated.build()
        except BuildError as error:
            pytest.fail(str(error), pytrace=False)
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if configure():
            install_prerequisites()
        if reason := configure():
            pytest.skip(f"{reason} (Debian, Ubuntu: apt install {' '.join(PACKAGES)})")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        result = run("cmake", "--build", BUILD, "--parallel", jobs, "--target", target)
        if result.returncode:
            pytest.fail(f"the C++ tests did not build:\n{result.stdout[-8000:]}", pytrace=False)
    return BUILD / target


@pytest.mark.parametrize(("suite", "program"), suites().items(), ids=list(suites()))
def test_cpp(suite: str, program: str) -> None:
    # Plain suites, suites instantiated per ISA (Isa/Suite), typed suites (Suite/float).
    result = run(build(program), f"--gtest_filter={suite}.*:*/{suite}.*:{suite}/*.*", "--gtest_brief=1")
    assert result.returncode == 0, f"\n{result.stdout[-8000:]}"
    count = re.search(r"(\d+) tests? from", result.stdout)
    assert count is not None, result.stdout
    assert int(count.group(1)) > 0, f"no test matches {suite}"


def test_every_suite_is_found() -> None:
    found = suites()
    assert {"Band", "Dtype", "Vec", "Micro", "Forward", "Backward", "Validate"} <= set(found)
    macros = {
        name
        for file in SOURCES.glob("*.cpp")
        for name in re.findall(
            r"\b(?:FAE_ISA_SUITE|FAE_KERNEL_SUITE|FAE_CUDA_SUITE)\((\w+)\)", file.read_text()
        )
    }
    assert macros <= set(found)
