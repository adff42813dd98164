"""Command line of the benchmarks: measure, report, compare.

python -m benchmarks                          everything (about 5 minutes), results in build/benchmarks
python -m benchmarks --quick                  one case of each class
python -m benchmarks --class "forward fp32" --class tiny
python -m benchmarks --compare before.json after.json
python -m benchmarks --readme                 also rewrites the README's section and docs/benchmarks.*
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import report, shapes, suite

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "benchmarks"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Attention of this package against torch's SDPA on this CPU."
    )
    parser.add_argument("--class", dest="classes", action="append", default=[], metavar="NAME",
                        help="measure this class only (repeatable); see --list")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the classes and cases, measure nothing")
    parser.add_argument("--check", action="store_true", help="verify every case against torch, time nothing")
    parser.add_argument("--quick", action="store_true", help="one case of each class, little time for each")
    parser.add_argument("--threads", type=int, help="threads for both sides (default: torch's own choice)")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing per case")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR",
                        help="where results.json, results.md and results.png go")  # fmt: skip
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results.json files")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON",
                        help="report an earlier run, measure nothing")  # fmt: skip
    parser.add_argument(
        "--readme", action="store_true", help="rewrite the README's tables, docs/benchmarks.*"
    )
    return parser


def _list_classes() -> None:
    for name in suite.EXTRA_CLASSES:
        print(name)
    group = None
    for case in shapes.all_cases():
        if case.group != group:
            group = case.group
            print(group)
        print("    " + case.name)


def _check_classes(classes: list[str]) -> str | None:
    known = {case.group for case in shapes.all_cases()} | set(suite.EXTRA_CLASSES)
    unknown = [name for name in classes if name not in known]
    return f"no such class: {', '.join(unknown)} (known: {', '.join(sorted(known))})" if unknown else None


def _say(line: str) -> None:
    print(line, flush=True)


def _write(results: dict, directory: Path, stem: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    report.save_json(results, directory / f"{stem}.json")
    picture = directory / f"{stem}.png"
    try:
        from .plot import save_plot

        save_plot(results, picture)
    except ImportError:
        print("no plot: matplotlib is not installed")
    page = report.markdown_report(results, picture.name if picture.exists() else None)
    (directory / f"{stem}.md").write_text(page, encoding="utf-8")
    print(f"wrote {directory}/{stem}.json, .md and .png")


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        _list_classes()
        return 0
    if options.compare:
        print(report.compare_table(*map(report.load_json, options.compare)))
        return 0
    if options.readme and (options.quick or options.classes):
        parser.error("--readme wants a full run: leave out --quick and --class")
    complaint = _check_classes(options.classes)
    if complaint:
        parser.error(complaint)

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.check:
        return 1 if suite.check_cases(options.classes, _say) else 0
    if options.source:
        results = report.load_json(options.source)
    else:
        budget = options.budget or (0.3 if options.quick else 1.5)
        results = suite.run_suite(options.classes, options.quick, budget, _say)
    print(report.headline(results), end="\n\n")
    tables = [report.case_table(results), report.class_table(results)] if results["rows"] else []
    print("\n\n".join(tables + report.extra_tables(results)))
    _write(results, options.out, "results")
    if results["void"]:
        print("\n".join(["wrong results, so not timed:", *results["void"]]))
        return 1
    if options.readme:
        _write(results, ROOT / "docs", "benchmarks")
        report.update_readme(results, ROOT / "README.md")
        print("rewrote the benchmark section of README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
