"""Standard attention against this package over the sequence length, and what the package chose for each.

python examples/benchmark_flash_attention.py                 # lengths 64 ... 32768, fp32
python examples/benchmark_flash_attention.py --max 4096 --dtypes float32 bfloat16
"""

import argparse
import sys
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `benchmarks`

from demo_parts import scaling

from flash_attn_ext import explain


def choices(lengths: list[int], dtype: str) -> Table:
    """What `explain` says of each length: the plan depends on the problem, the CPU and the threads."""
    table = Table(
        title=f"{dtype}: what is chosen", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in ("length", "backend", "kernel", "rows x keys at a time", "threads", "workspace KiB", "GFLOP"):
        table.add_column(name, justify="right")
    for seq in lengths:
        shape = (scaling.BATCH, seq, scaling.HEADS, scaling.DIM)
        q = torch.empty(shape, dtype=getattr(torch, dtype))
        plan = explain(q, q, q, causal=True)
        table.add_row(
            str(seq), plan.backend, str(plan.kernel), f"{plan.block_q} x {plan.block_kv}", str(plan.threads),
            f"{plan.workspace_bytes / 1024:.0f}", f"{plan.flops / 1e9:.2f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--min", type=int, default=64, help="shortest sequence")
    parser.add_argument("--max", type=int, default=32768, help="longest sequence; lengths double in between")
    parser.add_argument("--dtypes", nargs="+", choices=scaling.DTYPES, default=["float32"])
    parser.add_argument("--out", type=Path, default=Path(), help="where the plot goes")
    arguments = parser.parse_args()
    lengths = [arguments.min]
    while lengths[-1] * 2 <= arguments.max:
        lengths.append(lengths[-1] * 2)
    console = Console()
    for dtype in arguments.dtypes:
        console.print(choices(lengths, dtype))
    scaling.run(console, arguments.out, tuple(lengths), tuple(arguments.dtypes))
    console.print(f"plot: {arguments.out / 'scaling.png'}")


if __name__ == "__main__":
    main()
