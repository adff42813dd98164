"""The examples run as a newcomer would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["quickstart.py"], "largest difference from torch"),
        (["swap_sdpa.py"], "gradients agree"),
        (["demo.py", "worked"], "largest difference between the three"),
        (["train_gpt.py", "--steps", "8"], "tokens/s"),
    ],
    ids=["quickstart", "swap_sdpa", "demo", "train_gpt"],
)
def test_example(command, expected, tmp_path):
    script, *arguments = command
    if script in ("demo.py", "train_gpt.py"):
        arguments += ["--out", str(tmp_path)]
    for needed in {"demo.py": ["rich"], "train_gpt.py": ["matplotlib"]}.get(script, []):
        pytest.importorskip(needed)
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}  # installed or not
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
