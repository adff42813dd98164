"""Proves that one binary serves every supported torch: ``make test-abi``.

A copy of the tree is built in an environment with the oldest supported torch; then the test suite runs in
that copy twice, under that torch and under the newest one, on the very same files (their digests are
printed). Arguments are passed on to pytest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_tools.native import EXTENSION_MODULE, MIN_TORCH, OPERATOR_LIBRARY, ROOT

WORK = ROOT / "build" / "abi"
OLDEST = f"torch=={MIN_TORCH[0]}.{MIN_TORCH[1]}.*"
NOT_COPIED = (".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".pytest_cache")


def run(*command: str | Path, cwd: Path = ROOT) -> int:
    """Run a command, echoed, with only the copied tree on the import path; returns its status."""
    print("$", *command, flush=True)
    environment = dict(os.environ, PYTHONPATH=str(WORK / "tree"))
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment).returncode


def environment(name: str, torch: str) -> Path:
    """The Python of a virtual environment with one torch and everything that the tests need."""
    home = WORK / name
    python = home / "bin" / "python"
    stamp = home / "complete"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        requirements = ["-r", "requirements-build.txt", "-r", "requirements-dev.txt"]
        if run(python, "-m", "pip", "install", "--quiet", torch, *requirements):
            sys.exit(f"error: {torch} could not be installed")
        stamp.touch()
    return python


def copy_tree() -> Path:
    """A fresh copy of the sources, without anything built."""
    tree = WORK / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return tree


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def main(pytest_arguments: list[str]) -> int:
    oldest, newest = environment("oldest", OLDEST), environment("newest", "torch")
    tree = copy_tree()
    if run(oldest, "-m", "build_tools.native", cwd=tree):
        return 1
    status = 0
    for python in (oldest, newest):
        for binary in (EXTENSION_MODULE, OPERATOR_LIBRARY):
            print(f"{digest(tree / binary)}  {binary}", flush=True)
        run(python, "-c", "import torch; print('torch', torch.__version__)", cwd=tree)
        status |= run(python, "-m", "pytest", *(pytest_arguments or ["-n", str(os.cpu_count() or 1)]), cwd=tree)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
