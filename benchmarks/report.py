"""Results as tables (terminal and Markdown), as JSON and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .shapes import BF16_ISAS, FLOOR_RATIO, geometric_mean

README_BEGIN = "<!-- benchmarks: begin (written by `python -m benchmarks --readme`) -->"
README_END = "<!-- benchmarks: end -->"


def save_json(results: dict, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def load_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well as plain text too; first column is text."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(table[0]), rule, *map(line, table[1:])])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _goal(ratio: float | None, share: float | None) -> str:
    parts = [f">= {ratio:g}"] if ratio else []
    parts += [_percent(share)] if share else []
    return ", ".join(parts)


def _range(values: Sequence[float], digits: int = 0) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}-{high}"


def meets_goals(row: dict) -> bool:
    """Whether a case reaches its goals, and in any case the floor.

    The floor holds against torch's best formulation, the goal against a plain SDPA call.
    """
    return (
        row["ratio"] >= FLOOR_RATIO
        and row["plain_ratio"] >= (row["goal_ratio"] or 0)
        and row["share"] >= (row["goal_share"] or 0)
    )


def _formulation(row: dict) -> str:
    tricked = row["plain_ratio"] != row["ratio"]
    return row["torch_formulation"] + (f" (plain call: {row['plain_ratio']:.2f})" if tricked else "")


def by_class(rows: Sequence[dict]) -> dict[str, list[dict]]:
    classes: dict[str, list[dict]] = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
    return classes


def case_table(results: dict) -> str:
    """One row per case."""
    rows = [
        [
            f"{row['name']}{'' if meets_goals(row) else ' (!)'}",
            f"{row['ours_s'] * 1e3:.3f}",
            f"{row['torch_s'] * 1e3:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['ours_gflops']:.0f}",
            f"{row['torch_gflops']:.0f}",
            _percent(row["share"]),
            _goal(row["goal_ratio"], row["goal_share"]),
            _formulation(row),
        ]
        for row in results["rows"]
    ]
    head = ["case ((!): below its goal)", "ours ms", "torch ms", "ratio", "ours GF/s", "torch GF/s",
            "of limit", "goal", "torch's best"]  # fmt: skip
    return markdown_table(head, rows)


def class_table(results: dict) -> str:
    """One row per class: geometric means, the range inside it, and how many cases reach their goal."""
    rows = []
    for name, members in by_class(results["rows"]).items():
        ratios = [row["ratio"] for row in members]
        goals = sorted({row["goal_ratio"] for row in members if row["goal_ratio"]}, reverse=True)
        shares = sorted({row["goal_share"] for row in members if row["goal_share"]})
        goal = " / ".join(f"{g:g}" for g in goals)
        rows.append(
            [
                name,
                f"**{geometric_mean(ratios):.2f}**",
                _range(ratios, 2),
                _range([row["ours_gflops"] for row in members]),
                _range([row["torch_gflops"] for row in members]),
                _range([100 * row["share"] for row in members]) + " %",
                ", ".join(filter(None, [f">= {goal}" if goal else "", " / ".join(map(_percent, shares))])),
                f"{sum(map(meets_goals, members))} of {len(members)}",
            ]
        )
    ratios = [row["ratio"] for row in results["rows"]]
    shares = [row["share"] for row in results["rows"]]
    rows.append(
        ["all cases", f"**{geometric_mean(ratios):.2f}**", _range(ratios, 2), "", "",
         f"mean {100 * geometric_mean(shares):.0f} %", "",
         f"{sum(map(meets_goals, results['rows']))} of {len(ratios)}"]
    )  # fmt: skip
    head = ["class", "x torch (mean)", "range", "ours GF/s", "torch GF/s", "of limit", "goal", "reached"]
    return markdown_table(head, rows)


def extra_tables(results: dict) -> list[str]:
    """Call overhead, memory, threads and growth: whichever was measured."""
    tables = []
    if results["tiny"]:
        head = ["tiny call", "ours us", "torch us", "goal us"]
        tables.append(markdown_table(head, (
            [r["name"], f"{r['ours_us']:.1f}", f"{r['torch_us']:.1f}", f"<= {r['goal_us']:g}"]
            for r in results["tiny"])))  # fmt: skip
    if results["memory"]:
        title = f"peak extra memory, S={results['memory'][0]['seq']}, H=8, D=64, fp32"
        head = [title, "ours MiB", "torch MiB", "goal MiB"]
        tables.append(markdown_table(head, (
            [r["name"], f"{r['ours_mib']:.1f}", f"{r['torch_mib']:.1f}", f"<= {r['goal_mib']}"]
            for r in results["memory"])))  # fmt: skip
    if results["threads"]:
        head = [f"speed-up from 1 to {results['threads'][0]['threads']} threads", "ours", "torch", "goal"]
        tables.append(markdown_table(head, (
            [r["name"], f"{r['ours_speedup']:.2f}", f"{r['torch_speedup']:.2f}", f">= {r['goal_speedup']:g}"]
            for r in results["threads"])))  # fmt: skip
    if results["growth"]:
        head = ["cost growth, H=4, D=64, fp32", "ours ms", "ours, window 256 ms", "torch ms"]
        columns = ("dense_ms", "window_ms", "torch_dense_ms")
        rows = [[f"S={r['seq']}", *(f"{r[c]:.2f}" for c in columns)] for r in results["growth"]]
        if len(rows) > 1:
            last, first = results["growth"][-1], results["growth"][-2]
            rows.append(["factor for the last doubling", *(f"x{last[c] / first[c]:.2f}" for c in columns)])
        tables.append(markdown_table(head, rows))
    return tables


def headline(results: dict) -> str:
    """The machine and the limits, in a few words."""
    env, limits = results["environment"], results["limits"]
    family = f" ({env['cpu_family']})" if env["cpu_family"] else ""
    others = "fp16's" if env["isa"] in BF16_ISAS else "the 16-bit types'"
    return (
        f"Measured on {env['cpu']}{family}, {env['threads']} threads, kernels for {env['isa']}, "
        f"torch {env['torch']}, {env['date']}. Limits in the same run: "
        f"{limits['gemm_gflops']['float32']:.0f} GFLOP/s fp32 GEMM ({others} limit too), "
        f"{limits['gemm_gflops']['bfloat16']:.0f} GFLOP/s bf16 GEMM, {limits['read_gbytes']:.0f} GB/s read "
        "(timed anew beside each case of decoding, whose limit is the longer of reading and the products)."
    )


def markdown_report(results: dict, plot: str | None = None) -> str:
    """Everything, as one Markdown page; `plot` is the path of the picture as the page sees it."""
    parts = ["# Benchmark results", headline(results)]
    parts += [f"![speed and cost growth]({plot})"] if plot else []
    parts += ["## Classes", class_table(results)] if results["rows"] else []
    parts += extra_tables(results)
    for name, members in by_class(results["rows"]).items():
        parts += [f"## {name}", case_table({**results, "rows": members})]
    return "\n\n".join(parts) + "\n"


def update_readme(results: dict, readme: Path) -> None:
    """Replaces the text between the README's benchmark marks; raises ValueError without them."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    if not begin or not end:
        raise ValueError(f"{readme}: the marks around the benchmark section are missing")
    body = "\n\n".join([headline(results), class_table(results), *extra_tables(results)])
    readme.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")


def compare_table(a: dict, b: dict) -> str:
    """Cases of both runs: ratio over torch before and after, and the change of the ratio.

    Ratios, not times: torch in the same run takes out most of what differed between the machines'
    moods.
    """
    before = {row["name"] + row["class"]: row for row in a["rows"]}
    rows, changes = [], []
    for row in b["rows"]:
        old = before.get(row["name"] + row["class"])
        if old is None:
            continue
        change = row["ratio"] / old["ratio"]
        changes.append(change)
        rows.append(
            [f"{row['class']}: {row['name']}", f"{old['ours_s'] * 1e3:.3f}", f"{row['ours_s'] * 1e3:.3f}",
             f"{old['ratio']:.2f}", f"{row['ratio']:.2f}", f"{100 * (change - 1):+.0f} %"]
        )  # fmt: skip
    mean = geometric_mean(changes)
    summary = "no case in common" if math.isnan(mean) else f"{100 * (mean - 1):+.1f} %"
    rows.append([f"geometric mean of {len(changes)} cases", "", "", "", "", summary])
    return markdown_table(["case", "a ms", "b ms", "a ratio", "b ratio", "change"], rows)
