"""Everything about the CUDA kernels that needs a card, in one command of at most ten minutes.

python -m benchmarks.cuda                  tests, sanitizers, conformance, timings: benchmarks/results
python -m benchmarks.cuda --dry-run        the same steps on the emulator, nothing timed: build/
python -m benchmarks.cuda --only timings

The package must have been built (`make setup`, or `python -m build_tools.native` where torch is
installed already). The report is written after every step: what was done before time ran out is kept.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shutil
import sys
import time
from pathlib import Path

from .conformance import HOME
from .report import write_report
from .session import ROOT, run_step, steps

SECONDS = 570
HARDWARE_RECORD = HOME / "hardware.txt"
TIMINGS = "timings"


def environment(dry_run: bool) -> dict:
    import torch

    import flash_attn_ext as fae

    card = {"name": "host emulator"}
    if not dry_run:
        properties = torch.cuda.get_device_properties(0)
        card = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
        }
    return {
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "flash_attn_ext": fae.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on the emulator, nothing timed")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="(repeatable)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    parser.add_argument("--out", type=Path, metavar="DIR")
    options = parser.parse_args()
    out = options.out or (
        ROOT / "build" / "cuda_dry_run" if options.dry_run else ROOT / "benchmarks" / "results"
    )
    out.mkdir(parents=True, exist_ok=True)
    logs = ROOT / "build" / "cuda_logs"
    logs.mkdir(parents=True, exist_ok=True)

    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device: use --dry-run, which runs the same steps on the emulator")
            return 2
    results = {
        "environment": environment(options.dry_run),
        "steps": [],
        "rows": [],
        "void": [],
        "rehearsed": [],
        "limits": {},
    }

    def save() -> None:
        write_report(results, out)

    deadline = time.monotonic() + options.seconds
    wanted = [step for step in steps(options.dry_run) if not options.only or step.name in options.only]
    # Timings get what the steps before leave, and at least two minutes.
    reserve = 120 if not options.only or TIMINGS in options.only else 0
    for step in wanted:
        left = deadline - time.monotonic() - reserve
        if left < 5:
            results["steps"].append({"name": step.name, "status": "skipped", "reason": "no time left"})
            continue
        step.seconds = min(step.seconds, left)
        results["steps"].append(run_step(step, logs))
        if step.name == "conformance" and HARDWARE_RECORD.exists():
            shutil.copy(HARDWARE_RECORD, out)
        print(step.name, results["steps"][-1]["status"], results["steps"][-1].get("summary", ""), flush=True)
        save()
    if not options.only or TIMINGS in options.only:
        from . import bench

        if options.dry_run:
            import flash_attn_ext as fae

            fae.testing.load_emulator()
            bench.rehearse(results, "cuda_emulated")
        else:
            bench.run_all(results, save, deadline - time.monotonic())
        save()
    for line in results["void"]:
        print("void:", line)
    print(f"wrote {out}")
    failed = [s for s in results["steps"] if s["status"] in ("failed", "out of time")]
    return 1 if failed or results["void"] else 0


if __name__ == "__main__":
    sys.exit(main())
