"""Writes and runs build.ninja files: the one place that knows ninja's syntax."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class BuildError(RuntimeError):
    """A build that cannot start or did not end well; the message is one sentence for the user."""


def _path(path: Path | str) -> str:
    """A path as ninja wants it in a build statement."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """The text of a build.ninja, line by line."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def rule(self, name: str, command: str, description: str, *, depfile: bool = False) -> None:
        """`command` may use $in, $out and the variables of a build statement. With `depfile` it writes the
        headers that it has read to $out.d."""
        self._lines += [f"rule {name}", f"  command = {command}", f"  description = {description}"]
        if depfile:
            self._lines += ["  depfile = $out.d", "  deps = gcc"]

    def variable(self, name: str, arguments: Sequence[str]) -> None:
        """Arguments of a command line, quoted for the shell."""
        self._lines.append(f"{name} = {shlex.join(arguments).replace('$', '$$')}")

    def build(self, output: Path | str, rule: str, inputs: Sequence[Path | str], **variables: str) -> None:
        """One file to make. `variables` are texts, in which $name stands for a variable of the file."""
        self._lines.append(f"build {_path(output)}: {rule} {' '.join(map(_path, inputs))}")
        self._lines += [f"  {name} = {value}" for name, value in variables.items()]

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def run(work: Path, ninja_file: NinjaFile) -> None:
    """Make everything that the file describes, in `work`, with MAX_JOBS processes. Raises BuildError."""
    work.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
        (work / "build.ninja").write_text(str(ninja_file))
        status = subprocess.run([sys.executable, "-m", "ninja", "-C", str(work), "-j", jobs]).returncode
    if status:
        raise BuildError(
            f"flash_attn_ext did not compile: the compiler's messages are above (ninja returned {status})."
        )
