"""One attention layer of the shape of Llama's, at growing contexts, as transformers calls it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import memory
from benchmarks.timing import best_of

from .scaling import TOLERANCE, Point, mebibytes_text, ratio_text, time_text

HEAD_DIM = 128
HEADS = {"7B": 32, "13B": 40}
# A call shorter than this is timed again.
SHORT_S, BUDGET_S = 2.0, 1.0


def measure(
    call: Callable[[], torch.Tensor], expected_s: float, limit_s: float
) -> tuple[Point, torch.Tensor | None]:
    """Time and peak memory beyond the result of a call that is expected to take so long, and its result."""
    if expected_s > limit_s:
        return Point(why=f"about {expected_s:.{0 if expected_s > 10 else 1}f} s"), None
    start = time.perf_counter()
    growth, out = memory.peak_growth(call)
    seconds = time.perf_counter() - start
    if seconds < SHORT_S:
        seconds = min(seconds, *best_of([call], BUDGET_S, min_rounds=2))
    return Point(seconds, max(0, growth - out.numel() * out.element_size())), out


def run(console: Console, options: argparse.Namespace, implementations: dict[str, str]) -> None:
    """One attention layer, without its projections, at growing contexts."""
    from transformers import AttentionInterface

    functions = AttentionInterface()
    dtype = getattr(torch, options.dtype)
    layer = torch.nn.Module()
    table = Table(title=f"one attention layer, causal, {options.dtype}, heads of {HEAD_DIM}",
                  title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)  # fmt: skip
    for name in ("shape of", "heads", "context", *(f"{title}\ntime" for title in implementations), "speed-up",
                 *(f"{title}\nMiB" for title in implementations)):  # fmt: skip
        table.add_column(name, justify="right")
    for model in options.shapes:
        heads = HEADS[model]
        known: dict[str, tuple[int, float]] = {}  # (context, seconds) of the last length that was run
        for context in sorted(options.context):
            generator = torch.Generator().manual_seed(context)
            q, k, v = (
                torch.randn(1, heads, context, HEAD_DIM, generator=generator, dtype=dtype) for _ in range(3)
            )
            points, outs = [], []
            for title, name in implementations.items():

                def call(attend=functions[name], q=q, k=k, v=v) -> torch.Tensor:
                    return attend(layer, q, k, v, None, is_causal=True)[0]

                before, seconds = known.get(title, (context, 0.0))
                with console.status(f"{model}, context {context}: {title} ..."), torch.inference_mode():
                    point, out = measure(call, seconds * (context / before) ** 2, options.limit)
                points.append(point)
                if out is not None:
                    known[title] = (context, point.seconds)
                    outs.append(out.float())
            for out in outs[1:]:
                error = ((out - outs[0]).abs().max() / outs[0].abs().max()).item()
                assert error <= TOLERANCE[options.dtype], f"{model} at {context}: results differ by {error}"
            table.add_row(
                model, str(heads), str(context), *map(time_text, points),
                ratio_text(points[0].seconds, points[-1].seconds), *map(mebibytes_text, points),
            )  # fmt: skip
    console.print(table)
    console.print("Memory is the peak beyond inputs and outputs; 'about' marks what --limit left out.")
