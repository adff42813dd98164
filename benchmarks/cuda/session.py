"""The steps of a session on a card, each a process of its own with a time of its own."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TAIL = 4000  # characters of a step's output that are kept


@dataclasses.dataclass
class Step:
    """What to run, and for how long at most."""

    name: str
    command: Sequence[str]
    seconds: float
    needs: str = ""  # a program; without it the step is skipped, and the report says so
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def probe_command(backend: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.cuda.probe", "--backend", backend]


def steps(dry_run: bool) -> list[Step]:
    """Everything but the timings, in order of importance."""
    backend = "cuda_emulated" if dry_run else "cuda"
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-k", backend]
    plan = [
        # On the emulator a ninth of them takes as long.
        Step("probe", [*probe_command(backend), *(["--few"] if dry_run else [])], 120),
        Step("tests", [*tests, "-x", "--maxfail=20"] if not dry_run else [*tests, "--collect-only"], 200),
    ]
    for tool in SANITIZERS:
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            *probe_command(backend),
            "--few",
        ]
        plan.append(Step(f"sanitizer {tool}", command, 60, needs="compute-sanitizer"))
    conformance = [sys.executable, "-m", "benchmarks.cuda.conformance"]
    plan.append(Step("conformance", conformance + (["--emulator"] if dry_run else []), 60))
    return plan


def run_step(step: Step, log_directory: Path) -> dict:
    """Runs one step; its whole output goes to a file, its end into the result."""
    if step.needs and not shutil.which(step.needs):
        return {"name": step.name, "status": "skipped", "reason": f"{step.needs} is not installed"}
    start = time.monotonic()
    log = log_directory / (re.sub(r"\W+", "_", step.name) + ".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            list(step.command), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **step.environment}, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=step.seconds)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code, status = None, "out of time"
    text = log.read_text(errors="replace")
    return {
        "name": step.name,
        "status": status,
        "exit": code,
        "seconds": round(time.monotonic() - start, 1),
        "command": " ".join(step.command),
        "summary": summary_line(text),
        "tail": text[-TAIL:] if status != "passed" else "",
    }


def summary_line(text: str) -> str:
    """The line of a step's output that says how it went."""
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")]
    telling = [line for line in lines if re.search(r"passed|failed|ERROR SUMMARY|collected|agree", line)]
    return (telling or lines or [""])[-1][:200]
