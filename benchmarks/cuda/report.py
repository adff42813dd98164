"""The report of a session on a card: JSON, Markdown and a plot."""

from __future__ import annotations

import re
from pathlib import Path

from ..report import case_table, class_table, markdown_table, save_json
from ..shapes import geometric_mean

OURS, BACKEND_COLORS = (
    "#1f6f8b",
    {"cudnn": "#5c9e31", "flash": "#c9a66b", "efficient": "#9b7fb8", "math": "#aaa"},
)


def stem(results: dict) -> str:
    """File name of a report: the card and the day."""
    card = re.sub(r"\W+", "_", results["environment"]["card"]["name"]).strip("_").lower()
    return f"{card}_{results['environment']['date']}"


def headline(results: dict) -> str:
    environment, limits = results["environment"], results["limits"]
    card = environment["card"]
    text = f"{card['name']}, torch {environment['torch']}, CUDA {environment['cuda']}, {environment['date']}."
    if limits:
        rates = limits["matmul_tflops"]
        text += (
            f" Limits in the same run: {rates['bfloat16']:.0f} TFLOP/s bf16, {rates['float16']:.0f} fp16, "
            f"{rates['float32']:.0f} fp32 by three TF32 products; {limits['copy_tbytes']:.2f} TB/s copy."
        )
    return text


def step_table(results: dict) -> str:
    rows = [
        [s["name"], s["status"], f"{s.get('seconds', 0):.0f}", s.get("summary") or s.get("reason", "")]
        for s in results["steps"]
    ]
    return markdown_table(["step", "status", "seconds", "what it said"], rows)


def backend_table(results: dict) -> str:
    """Milliseconds of each of torch's backends."""
    names = list(BACKEND_COLORS)
    rows = []
    for row in results["rows"]:
        times = row["torch_all_s"]
        rows.append([row["name"], f"{row['ours_s'] * 1e3:.3f}",
                     *(f"{times[n] * 1e3:.3f}" if n in times else "" for n in names)])  # fmt: skip
    return markdown_table(["ms", "ours", *names], rows)


def markdown_report(results: dict, plot: str | None) -> str:
    parts = ["# CUDA kernels on a card", headline(results)]
    if results["steps"]:
        parts += ["## Checks", step_table(results)]
    for step in results["steps"]:
        if step.get("tail"):
            parts += [f"### {step['name']}: the end of its output", "```\n" + step["tail"].strip() + "\n```"]
    if results["rehearsed"]:
        count = len(results["rehearsed"])
        parts += ["## Timings", f"None: a dry run. {count} cases were computed and agree with fp32 math."]
    if results["rows"]:
        parts += ["## Timings"] + ([f"![speed over torch]({plot})"] if plot else [])
        parts += [class_table(results), case_table(results), backend_table(results)]
    if results.get("overhead"):
        rows = [[name, f"{us['ours']:.1f}", f"{us['torch']:.1f}"] for name, us in results["overhead"].items()]
        parts += [markdown_table(["(1,1,8,64) bf16, host", "ours us", "torch us"], rows)]
    if results["void"]:
        parts += ["## Not timed", "\n".join(f"- {line}" for line in results["void"])]
    return "\n\n".join(parts) + "\n"


def save_plot(results: dict, path: Path) -> bool:
    """Bars of TFLOP/s, ours and each of torch's backends; False without rows or matplotlib."""
    if not results["rows"]:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.5))
    sides = {"ours": OURS, **BACKEND_COLORS}
    height = 0.8 / len(sides)
    for i, (side, color) in enumerate(sides.items()):
        seconds = [r["ours_s"] if side == "ours" else r["torch_all_s"].get(side) for r in rows]
        rates = [
            r["ours_gflops"] * r["ours_s"] / s / 1e3 if s else 0 for r, s in zip(rows, seconds, strict=True)
        ]
        axis.barh([y + (i - 2) * height for y in range(len(rows))], rates, height, color=color, label=side)
    axis.set_yticks(range(len(rows)), [r["name"] for r in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("TFLOP/s of visible scores")
    mean = geometric_mean([r["ratio"] for r in rows])
    axis.set_title(
        f"{headline(results).split(' Limits')[0]}\nx best of torch: {mean:.2f} (geometric mean)", fontsize=9
    )
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def write_report(results: dict, directory: Path) -> None:
    name = stem(results)
    save_json(results, directory / f"{name}.json")
    picture = directory / f"{name}.png"
    drawn = save_plot(results, picture)
    page = markdown_report(results, picture.name if drawn else None)
    (directory / f"{name}.md").write_text(page, encoding="utf-8")
