"""Proves that one binary serves every supported torch: ``make test-abi``.

A copy of the tree is built in an environment with the oldest supported torch. Then the test suite runs in
that copy twice, under that torch and under the one of the Python that runs this, on the very same binaries
(their digests are printed). Left out is what runs other binaries than these: the C++ tests, which know no
torch, and the emulator, which is built anew for each torch. Arguments are passed on to pytest in place of
that choice.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_tools.native import BINARIES, MIN_TORCH, ROOT, find_torch

WORK = ROOT / "build" / "abi"
TREE = WORK / "tree"
OLDEST = f"{MIN_TORCH[0]}.{MIN_TORCH[1]}"
REBUILDS = "tests/test_build.py::test_wheel_and_second_build"
OTHER_BINARIES = ("--deselect", "tests/test_cpp.py", "--deselect", "tests/test_cuda_mutations.py")
CHOICE = (*OTHER_BINARIES, "-m", "not emulated")
NOT_COPIED = (".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".pytest_cache")


def run(*command: str | Path, cwd: Path = ROOT) -> int:
    """Run a command, echoed, with the copied tree first on the import path; returns its status."""
    print("$", *command, flush=True)
    environment = dict(os.environ, PYTHONPATH=str(TREE))
    environment.pop("VIRTUAL_ENV", None)
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment).returncode


def oldest_environment() -> Path:
    """The Python of a virtual environment with the oldest torch and everything that the tests need."""
    home = WORK / f"torch-{OLDEST}"
    python, stamp = home / "bin" / "python", home / "complete"
    requirements = "\n".join((ROOT / f"requirements-{part}.txt").read_text() for part in ("build", "dev"))
    if not stamp.exists() or stamp.read_text() != requirements:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        files = ("-r", "requirements-build.txt", "-r", "requirements-dev.txt")
        if run(python, "-m", "pip", "install", f"torch=={OLDEST}.*", *files):
            sys.exit(f"error: an environment with torch {OLDEST} could not be made")
        stamp.write_text(requirements)
    return python


def copy_tree() -> None:
    """Bring the copy up to date, without anything built here; what was built there stays. A file that changes
    is new by its time, too: ninja goes by that."""

    def copy(source: str, target: str) -> None:
        if not (os.path.exists(target) and filecmp.cmp(source, target, shallow=False)):
            shutil.copyfile(source, target)

    ignore = shutil.ignore_patterns(*NOT_COPIED)
    shutil.copytree(ROOT, TREE, ignore=ignore, copy_function=copy, dirs_exist_ok=True)
    for folder, folders, files in os.walk(TREE):
        built = ignore(folder, [*folders, *files])
        folders[:] = [name for name in folders if name not in built]
        for name in set(files) - built:
            path = Path(folder, name)
            if not (ROOT / path.relative_to(TREE)).exists():
                path.unlink()


def digests() -> list[str]:
    """The binaries under test and the starts of their SHA-256."""
    return [f"{hashlib.sha256((TREE / name).read_bytes()).hexdigest()[:16]}  {name}" for name in BINARIES]


def main(arguments: list[str]) -> int:
    """Build against the oldest torch, test under both; the exit status."""
    newest = find_torch().version
    if newest.startswith(OLDEST + "."):
        sys.exit(f"error: this environment has torch {newest}; it must have a newer one than {OLDEST}")
    oldest = oldest_environment()
    copy_tree()
    if run(oldest, "-m", "build_tools.native", cwd=TREE):
        return 1
    built = digests()
    print(*built, sep="\n")
    status = 0
    for python in (oldest, Path(sys.executable)):
        run(python, "-c", "import torch; print('torch', torch.__version__)", cwd=TREE)
        pytest = arguments or ["-n", str(os.cpu_count() or 1), *CHOICE]
        status |= run(python, "-m", "pytest", "--deselect", REBUILDS, *pytest, cwd=TREE)
        if digests() != built:
            sys.exit("error: the tests have changed the binaries under test")
    print(*built, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
