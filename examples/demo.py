"""The demo: a worked example, a real encoder, and time and memory over the sequence length.

    python examples/demo.py            everything (about two minutes on two cores)
    python examples/demo.py worked     one part: worked, embeddings or scaling

Plots go to build/demo.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `benchmarks`, which is not an installed package

PARTS = {
    "worked": "How it works: two queries, four keys, by hand",
    "embeddings": "Real input: sentence embeddings by MiniLM",
    "scaling": "Time and memory over the sequence length",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Show flash_attn_ext at work on this machine.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo", help="where the plots go")
    options = parser.parse_args()

    from demo_parts import embeddings, scaling, worked
    from rich.console import Console

    # Tables need this much room; a narrower terminal wraps, a file gets them whole.
    console = Console(width=None if sys.stdout.isatty() else 120)
    options.out.mkdir(parents=True, exist_ok=True)
    actions = {
        "worked": lambda: worked.run(console),
        "embeddings": lambda: embeddings.run(console, options.out),
        "scaling": lambda: scaling.run(console, options.out),
    }
    start = time.perf_counter()
    for part in options.parts or PARTS:
        console.rule(f"[bold]{PARTS[part]}")
        actions[part]()
    seconds = time.perf_counter() - start
    console.print(f"done in {seconds:.0f} s; plots in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
