"""A Llama of transformers generates text with three attentions; then attention alone at long contexts.

    python examples/hf_generate.py                       shaped like TinyLlama 1.1B, random weights
    python examples/hf_generate.py --model FOLDER        a model on this disk
    python examples/hf_generate.py --layers 2 --hidden 128 --prompt 64 --context 512     seconds

First a prompt is read (prefill) and tokens are generated greedily, by transformers' eager attention, torch's
SDPA and this package. Then comes one causal attention layer of the shape of Llama 7B and 13B.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `benchmarks`, which is not an installed package


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Text generation and long contexts: eager, SDPA and ours.")
    parser.add_argument("--model", type=Path, help="a folder with a causal model (default: random weights)")
    sizes = {"hidden": 2048, "layers": 22, "heads": 32, "kv-heads": 4, "intermediate": 5632, "vocab": 32000,
             "prompt": 1024, "new-tokens": 64}  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--context", type=int, nargs="*", default=[2048, 8192, 32768],
                        help="lengths for the attention layers; none: leave them out")  # fmt: skip
    parser.add_argument("--shapes", nargs="*", choices=["7B", "13B"], default=["7B", "13B"],
                        help="of the attention layers")  # fmt: skip
    parser.add_argument("--limit", type=float, default=120.0,
                        help="leave out layers that would take more seconds (default: 120)")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    options = arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from demo_parts import generation, layers
    from rich.console import Console
    from transformers.utils import logging

    from flash_attn_ext.integrations.transformers import register

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Tables need this much room; a narrower terminal wraps, a file gets them whole.
    console = Console(width=None if sys.stdout.isatty() else 120)
    fast = {"torch SDPA": "sdpa", "flash_attn_ext": register()}
    if options.prompt > 0:
        console.rule("[bold]Generation")
        generation.run(console, options, {"transformers eager": "eager", **fast})
    if options.context and options.shapes:
        console.rule("[bold]Attention layers")
        layers.run(console, options, fast)
    return 0


if __name__ == "__main__":
    sys.exit(main())
