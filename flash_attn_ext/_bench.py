"""A small table that needs nothing but the installed package: unfused, torch's SDPA, this package."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .functional import flash_attention
from .introspect import estimate_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STANDARD_LIMIT = 1 << 30  # bytes of scores beyond which the unfused computation is left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on each row")
    parser.add_argument("--plot", metavar="FILE", help="also draw the times (needs matplotlib)")


def interleaved_times(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """The best time of each, in seconds, taken in turns so that a disturbance hits all alike."""
    best = [float("inf")] * len(functions)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < deadline:  # the first round warms up
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best


def _row(seq: int, options: argparse.Namespace) -> dict[str, float]:
    dtype = _DTYPES[options.dtype]
    q, k, v = (torch.randn(1, seq, options.heads, options.dim).to(dtype) for _ in range(3))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    functions: dict[str, Callable[[], object]] = {
        "torch SDPA": lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True),
        "this package": lambda: flash_attention(q, k, v, causal=True),
    }
    memory = estimate_memory(1, options.heads, seq, seq, options.dim, dtype)
    if memory.standard_bytes < _STANDARD_LIMIT:
        functions["unfused"] = lambda: flash_attention(q, k, v, causal=True, backend="standard")
    times = interleaved_times(list(functions.values()), options.seconds)
    return {**dict(zip(functions, times, strict=True)), "memory ratio": memory.ratio}


def run(options: argparse.Namespace) -> int:
    names = ("unfused", "torch SDPA", "this package")
    shape = f"batch 1, {options.heads} heads, dim {options.dim}, {options.dtype}"
    print(f"causal forward, {shape}, {torch.get_num_threads()} threads; milliseconds")
    print("".join(f"{name:>14}" for name in ("length", *names, "x torch", "x unfused", "x memory")))
    rows = {}
    for seq in options.lengths:
        with torch.no_grad():
            row = rows[seq] = _row(seq, options)
        cells = [f"{row[name] * 1e3:.3f}" if name in row else "-" for name in names]
        ours = row["this package"]
        ratios = [f"{row[name] / ours:.2f}" if name in row else "-" for name in ("torch SDPA", "unfused")]
        line = (str(seq), *cells, *ratios, f"{row['memory ratio']:.1f}")
        print("".join(f"{cell:>14}" for cell in line), flush=True)
    if options.plot:
        _plot(rows, names, options)
    return 0


def _plot(rows: dict[int, dict[str, float]], names: tuple[str, ...], options: argparse.Namespace) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).add_subplot()
    for name in names:
        points = [(seq, row[name] * 1e3) for seq, row in rows.items() if name in row]
        axes.loglog(*zip(*points, strict=True), marker="o", base=2, label=name)
    axes.set(xlabel="sequence length", ylabel="milliseconds", title=f"causal attention, {options.dtype}")
    axes.legend()
    figure.savefig(options.plot, dpi=150)
    print(f"plot: {options.plot}")
