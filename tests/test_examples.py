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
        (
            [
                "decode_paged.py",
                "--requests",
                "9",
                "--pages",
                "8",
                "--width",
                "32",
                "--most-tokens",
                "12",
                "--longest-prompt",
                "70",
            ],
            "the tokens are the same",
        ),
        (["benchmark_flash_attention.py", "--max", "128"], "plot:"),
    ],
    ids=["quickstart", "swap_sdpa", "demo", "train_gpt", "decode_paged", "benchmark"],
)
def test_example(command, expected, tmp_path):
    script, *arguments = command
    if script in ("demo.py", "train_gpt.py", "benchmark_flash_attention.py"):
        arguments += ["--out", str(tmp_path)]
    for needed in () if script in ("quickstart.py", "swap_sdpa.py") else ("rich", "matplotlib"):
        pytest.importorskip(needed)
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}  # installed or not
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
