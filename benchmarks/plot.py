"""The picture of a run: ratio over torch, share of the limit, growth of the cost."""

from __future__ import annotations

from pathlib import Path

from .report import by_class, headline
from .shapes import GROWTH_WINDOW, geometric_mean

OURS, THEIRS, GOAL = "#1f6f8b", "#c9a66b", "#b03a2e"


def save_plot(results: dict, path: Path) -> None:
    """Writes a PNG; raises ImportError where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    classes = by_class(results["rows"])
    offered = ((_ratios, classes), (_shares, classes), (_growth, results["growth"]))
    panels = [panel for panel, data in offered if data]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 6.2), squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        panel(axis, results)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(headline(results).split(" Limits")[0], fontsize=9, color="0.35")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label_classes(axis, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()


def _ratios(axis, results: dict) -> None:
    classes = by_class(results["rows"])
    means = [geometric_mean([row["ratio"] for row in rows]) for rows in classes.values()]
    axis.barh(range(len(means)), means, color=OURS, height=0.62)
    for y, rows in enumerate(classes.values()):
        ratios = [row["ratio"] for row in rows]
        axis.plot(ratios, [y] * len(ratios), "|", color="black", markersize=7, alpha=0.55)
        goals = [row["goal_ratio"] for row in rows if row["goal_ratio"]]
        axis.plot(goals, [y] * len(goals), "D", color=GOAL, markersize=4)
        right = (max(ratios + goals), y)
        axis.annotate(f"{means[y]:.2f}", right, (7, 0), textcoords="offset points", va="center", fontsize=8)
    axis.axvline(1.0, color="0.3", linewidth=1)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.8), high * 1.25)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_title("speed over torch SDPA\nbar: mean, ticks: cases, diamond: goal", fontsize=10)
    _label_classes(axis, list(classes))


def _shares(axis, results: dict) -> None:
    classes = by_class(results["rows"])
    sides = ((-0.2, "share", OURS, "ours"), (0.2, "torch_share", THEIRS, "torch SDPA"))
    for offset, key, color, label in sides:
        means = [100 * geometric_mean([row[key] for row in rows]) for rows in classes.values()]
        axis.barh([y + offset for y in range(len(means))], means, height=0.38, color=color, label=label)
    for y, rows in enumerate(classes.values()):
        for goal in {row["goal_share"] for row in rows if row["goal_share"]}:
            axis.plot([100 * goal], [y - 0.2], "D", color=GOAL, markersize=4)
    axis.axvline(100, color="0.3", linewidth=1)
    axis.set_title("% of the GEMM rate in that dtype\n(visible scores only; fp16: of fp32's)", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    _label_classes(axis, list(classes))


def _growth(axis, results: dict) -> None:
    rows = results["growth"]
    seqs = [row["seq"] for row in rows]
    for key, color, marker, label in (
        ("torch_dense_ms", THEIRS, "s", "torch SDPA, dense"),
        ("dense_ms", OURS, "o", "ours, dense"),
        ("window_ms", "#5c9e31", "^", f"ours, causal window {GROWTH_WINDOW}"),
    ):
        axis.plot(seqs, [row[key] for row in rows], color=color, marker=marker, label=label)
    for key, power in (("dense_ms", 2), ("window_ms", 1)):
        guide = [rows[-1][key] * (s / seqs[-1]) ** power for s in seqs]
        axis.plot(seqs, guide, ":", color="0.5", linewidth=1, label="S² and S guides" if power == 2 else None)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(seqs, [str(s) for s in seqs])
    axis.set_xlabel("sequence length S")
    axis.set_ylabel("ms (4 heads, D=64, fp32)")
    axis.set_title("cost: S² dense, S · window windowed", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
