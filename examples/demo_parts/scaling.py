"""Time and memory over the sequence length: unfused attention, torch's SDPA, this package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import memory
from benchmarks.timing import best_of
from flash_attn_ext import flash_attention

BATCH, HEADS, DIM = 1, 4, 64
LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
OURS_ALONE = 16384  # from here on
DTYPES = ("float32", "bfloat16")
METHODS = ("standard", "torch", "ours")
TITLES = {"standard": "standard", "torch": "torch SDPA", "ours": "flash_attn_ext"}
BUDGET_S = 0.6
# Unfused attention holds the scores, the masked scores and the probabilities at once.
STANDARD_COPIES = 3
# A call that would take longer, going by the length before, is not run: on some processors torch has no fast
# bfloat16 products.
PATIENCE_S = 5.0
# Largest error allowed between the methods, relative to the largest value.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass
class Point:
    """One method at one length; None where it was not run, and `why` then says so."""

    seconds: float | None = None
    extra_bytes: int | None = None
    why: str = ""
    expected_s: float = 0.0  # by the length before


def _attention(method: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    return {
        "standard": lambda q, k, v: memory.standard_attention(q, k, v, causal=True),
        "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "ours": lambda q, k, v: flash_attention(q, k, v, causal=True, layout="bhsd"),
    }[method]


def _expected_s(seq: int, before: tuple[int, Point] | None) -> float:
    """Seconds of a call, whose cost grows as the square of the length; `before`: a shorter one."""
    if before is None:
        return 0.0
    length, point = before
    return (point.seconds or point.expected_s) * (seq / length) ** 2


def _obstacle(method: str, seq: int, dtype: str, expected_s: float) -> str:
    """Why a method cannot run at a length here; empty when it can."""
    if seq >= OURS_ALONE and method != "ours":
        return "not run"
    if method != "ours" and expected_s > PATIENCE_S:
        return f"some {expected_s:.0f} s"
    available = memory.available_bytes()
    needed = STANDARD_COPIES * BATCH * HEADS * seq * seq * getattr(torch, dtype).itemsize
    if method == "standard" and available is not None and needed > 0.8 * available:
        return f"needs {needed / 2**30:.1f} GiB"
    return ""


def measure(seq: int, dtype: str, before: tuple[int, dict[str, Point]] | None = None) -> dict[str, Point]:
    """Time and peak extra memory of each method on the same inputs, after checking that they agree.

    before: a shorter length and what came out there.
    """
    generator = torch.Generator().manual_seed(seq)
    shape = (BATCH, HEADS, seq, DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(3))
    points = {}
    for method in METHODS:
        expected_s = _expected_s(seq, before and (before[0], before[1][method]))
        points[method] = Point(why=_obstacle(method, seq, dtype, expected_s), expected_s=expected_s)
    runnable = [method for method in METHODS if not points[method].why]
    with torch.no_grad():
        calls = [functools.partial(_attention(method), q, k, v) for method in runnable]
        results = [call().float() for call in calls]
        for method, result in zip(runnable, results, strict=True):
            error = ((result - results[0]).abs().max() / results[0].abs().max()).item()
            assert error <= TOLERANCE[dtype], f"{method} at {seq} ({dtype}) differs by {error}"
        for method, seconds in zip(runnable, best_of(calls, BUDGET_S, min_rounds=3), strict=True):
            points[method].seconds = seconds
    for method in runnable:
        if memory.can_measure():
            spec = memory.Measurement(method, BATCH, HEADS, seq, DIM, dtype, causal=True)
            points[method].extra_bytes = memory.peak_extra_bytes(spec)
    return points


def time_text(point: Point) -> str:
    if point.seconds is None:
        return point.why
    milliseconds = point.seconds * 1e3
    return f"{milliseconds:.2f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"


def mebibytes_text(point: Point) -> str:
    if point.extra_bytes is None:
        return "-"
    return f"{point.extra_bytes / 2**20:.1f}"


def ratio_text(slow: float | None, fast: float | None) -> str:
    """How many times larger the first is; nothing where the second is too small to divide by."""
    if slow is None or not fast:
        return "-"
    ratio = slow / fast
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def scaling_table(dtype: str, rows: dict[int, dict[str, Point]]) -> Table:
    """Lengths down, times, speed-ups, memory and memory ratios across."""
    setting = f"batch {BATCH}, {HEADS} heads, head dim {DIM}, {torch.get_num_threads()} threads"
    table = Table(
        title=f"{dtype}, causal, {setting}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("length", justify="right")
    for name in TITLES.values():
        table.add_column(name + "\ntime", justify="right")
    for name in ("speed-up\nvs standard", "speed-up\nvs torch",
                 "standard\nMiB", "torch\nMiB", "ours\nMiB", "standard\nvs ours"):  # fmt: skip
        table.add_column(name, justify="right")
    for seq, points in rows.items():
        standard, theirs, ours = (points[method] for method in METHODS)
        table.add_row(
            str(seq), *map(time_text, (standard, theirs, ours)),
            ratio_text(standard.seconds, ours.seconds), ratio_text(theirs.seconds, ours.seconds),
            *map(mebibytes_text, (standard, theirs, ours)),
            ratio_text(standard.extra_bytes, ours.extra_bytes),
        )  # fmt: skip
    return table


def save_plot(measured: dict[str, dict[int, dict[str, Point]]], path: Path) -> None:
    """Time (above) and peak extra memory (below) over the length, a column per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {"standard": ("#b03a2e", "s"), "torch": ("#c9a66b", "D"), "ours": ("#1f6f8b", "o")}
    figure, axes = plt.subplots(
        2, len(measured), figsize=(5.2 * len(measured), 7.4), squeeze=False, sharey="row"
    )
    for column, (dtype, rows) in enumerate(measured.items()):
        for line, (attribute, unit, label) in enumerate(
            (("seconds", 1e-3, "ms"), ("extra_bytes", 2**20, "peak extra memory, MiB"))
        ):
            axis = axes[line][column]
            for method, (color, marker) in styles.items():
                values = [(seq, getattr(points[method], attribute)) for seq, points in rows.items()]
                values = [(seq, value / unit) for seq, value in values if value]
                if values:
                    axis.plot(*zip(*values, strict=True), color=color, marker=marker, label=TITLES[method])
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(list(rows), [str(seq) for seq in rows], rotation=45)
            axis.set_xlabel("sequence length")
            axis.set_ylabel(label)
            axis.set_title(f"{dtype}, causal")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(
    console: Console,
    directory: Path,
    lengths: tuple[int, ...] = (*LENGTHS, OURS_ALONE),
    dtypes: tuple[str, ...] = DTYPES,
) -> None:
    """Measures, prints and draws."""
    measured: dict[str, dict[int, dict[str, Point]]] = {dtype: {} for dtype in dtypes}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        # The cost is about that of the scores, so the bar advances by them.
        task = progress.add_task("", total=sum(seq**2 for seq in lengths) * len(dtypes))
        for dtype in dtypes:
            before = None
            for seq in lengths:
                progress.update(task, description=f"{dtype}, length {seq}")
                measured[dtype][seq] = measure(seq, dtype, before)
                before = (seq, measured[dtype][seq])
                progress.advance(task, seq**2)
            progress.console.print(scaling_table(dtype, measured[dtype]))
    console.print("Memory is the peak beyond inputs and outputs, measured in a process of its own per call.")
    save_plot(measured, directory / "scaling.png")
