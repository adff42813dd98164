"""Runs the cases and gathers what they gave, as plain dicts that go to JSON unchanged."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Callable

import torch

from . import memory, shapes
from .backends import TOLERANCE, TORCH_TOLERANCE, Formulation, Problem
from .roofline import READ_BYTES, Limits, reading
from .shapes import Case, TinyCase
from .timing import best_of, fastest

# Classes that are no throughput cases; each fills the list of its name in the results.
EXTRA_CLASSES = ("tiny", "memory", "threads", "growth")
Say = Callable[[str], None]


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            fields = dict(line.split(":", 1) for line in f if ":" in line)
        return " ".join(fields["model name\t"].split())
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def cpu_family() -> str:
    """Family and model numbers, which tell the generation where the name does not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in f)}
        return f"family {fields['cpu family']} model {fields['model']}"
    except (OSError, KeyError):
        return ""


def environment() -> dict:
    """Where and with what the numbers were taken."""
    from flash_attn_ext import _C

    info = _C.build_info()
    return {
        "cpu": cpu_model(),
        "cpu_family": cpu_family(),
        "isa": _C.active_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flash_attn_ext": info.get("version", ""),
        "compiler": info.get("compiler", ""),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def verified(case: Case) -> tuple[Problem, Formulation, list[Formulation]]:
    """The problem and both its sides; raises ValueError when a result is wrong."""
    problem = Problem(case)
    ours, theirs = problem.ours(), problem.theirs()
    problem.verify(ours, TOLERANCE)
    for formulation in theirs:
        problem.verify(formulation, TORCH_TOLERANCE)
    return problem, ours, theirs


def _timed(case: Case, side: Formulation, problem: Problem) -> Callable[[], object]:
    if not case.backward:
        return side.run_forward
    return side.forward_and_backward(problem.dout) if case.dropout else side.backward_only(problem.dout)


def run_case(case: Case, budget_s: float) -> dict:
    """Verifies, then times one case; raises ValueError when a result is wrong."""
    from flash_attn_ext import _C

    problem, ours, theirs = verified(case)
    sides = (ours, *theirs)
    timed = [_timed(case, side, problem) for side in sides]
    with torch.set_grad_enabled(case.backward):
        best = 1 + fastest(timed[1:], budget_s / 4)
        duel = [0, best]
        if sides[best].trick:  # goals were set against the plain call: time that as well
            plain = [i for i, side in enumerate(sides) if i and not side.trick]
            duel.append(plain[fastest([timed[i] for i in plain], budget_s / 4)])
        functions = [timed[i] for i in duel]
        if case.seq_q:  # few queries: reading memory is the limit, whose speed changes with the neighbours
            functions.append(reading())
        seconds = best_of(functions, budget_s)
    read_s = case.key_bytes() / READ_BYTES * seconds[len(duel)] if case.seq_q else 0.0
    flops = case.flops()
    return {
        "class": case.group,
        "name": case.name,
        "ours_s": seconds[0],
        "torch_s": seconds[1],
        "torch_formulation": sides[best].name,
        "ratio": seconds[1] / seconds[0],
        "plain_ratio": seconds[len(duel) - 1] / seconds[0],
        "ours_gflops": flops / seconds[0] / 1e9,
        "torch_gflops": flops / seconds[1] / 1e9,
        "read_s": read_s,
        "limit": case.limit(_C.active_isa()),
        "goal_ratio": case.goal_ratio,
        "goal_share": case.goal_share,
    }


def run_tiny(case: TinyCase, budget_s: float) -> dict:
    """Microseconds of one call of the public function, and of torch's, on the same values."""
    import torch.nn.functional as F

    from flash_attn_ext import flash_attention

    batch, heads, seq, dim = case.shape
    q, k, v = (torch.randn(batch, heads, seq, dim).requires_grad_(case.grad) for _ in range(3))
    # The package's default layout has heads after the sequence; both calls use their defaults.
    ours = [t.detach().transpose(1, 2).contiguous().requires_grad_(case.grad) for t in (q, k, v)]
    with torch.set_grad_enabled(case.grad):
        torch.testing.assert_close(
            flash_attention(*ours).transpose(1, 2), F.scaled_dot_product_attention(q, k, v)
        )
        mine, torchs = best_of(
            [lambda: flash_attention(*ours), lambda: F.scaled_dot_product_attention(q, k, v)], budget_s
        )
    return {
        "name": case.name,
        "ours_us": mine * 1e6,
        "torch_us": torchs * 1e6,
        "ratio": torchs / mine,
        "goal_us": case.goal_us,
    }


def run_memory(direction: str, seq: int) -> dict:
    """Peak extra MiB of ours and torch's at `seq`."""
    row = {"name": direction, "seq": seq, "goal_mib": shapes.MEMORY_GOAL_MIB[direction]}
    extent = {**shapes.MEMORY_SHAPE, "seq": seq}
    for method in ("ours", "torch"):
        spec = memory.Measurement(
            method, **extent, backward=direction == "backward", threads=torch.get_num_threads()
        )
        row[f"{method}_mib"] = memory.peak_extra_bytes(spec) / 2**20
    return row


def run_threads(case: Case, goal: float, threads: int, budget_s: float) -> dict:
    """Speed-up from one thread to `threads`, ours and torch's, sampled in turn."""
    problem = Problem(case)
    sides = [problem.ours(), problem.theirs()[0]]
    if case.backward:
        work = [side.backward_only(problem.dout) for side in sides]
    else:
        work = [side.run_forward for side in sides]

    def on(count: int, fn: Callable[[], object]) -> float:
        torch.set_num_threads(count)
        return best_of([fn], 0.0, min_rounds=1)[0]

    best = {}
    with torch.set_grad_enabled(case.backward):
        seconds, rounds = 0.0, 0
        while rounds < 3 or seconds < budget_s:
            for side, fn in zip(("ours", "torch"), work, strict=True):
                for count in (1, threads):
                    taken = on(count, fn)
                    seconds += taken
                    best[side, count] = min(best.get((side, count), math.inf), taken)
            rounds += 1
    torch.set_num_threads(threads)
    return {
        "name": case.name,
        "threads": threads,
        "ours_speedup": best["ours", 1] / best["ours", threads],
        "torch_speedup": best["torch", 1] / best["torch", threads],
        "goal_speedup": goal,
    }


def run_growth(seq: int, budget_s: float) -> dict:
    """Milliseconds of dense and windowed attention at `seq`, ours and torch's (dense)."""
    row: dict = {"seq": seq}
    dense, windowed = (Problem(shapes.growth_case(seq, w)) for w in (False, True))
    work = [dense.ours().run_forward, windowed.ours().run_forward, dense.theirs()[0].run_forward]
    with torch.no_grad():
        times = best_of(work, budget_s, min_rounds=3)
    for name, seconds in zip(("dense_ms", "window_ms", "torch_dense_ms"), times, strict=True):
        row[name] = seconds * 1e3
    return row


def finish(results: dict) -> dict:
    """Adds to every row its share of the limit, now that the limits are final.

    The limit is the time of the products alone, or, with few queries, of reading keys and values if longer.
    """
    limits = results["limits"]
    for row in results["rows"]:
        product_s = row["ours_gflops"] * row["ours_s"] / limits["gemm_gflops"][row["limit"]]
        fastest_s = max(product_s, row["read_s"])
        row["share"], row["torch_share"] = fastest_s / row["ours_s"], fastest_s / row["torch_s"]
    return results


def check_cases(wanted: list[str], say: Say) -> int:
    """Verifies every case without timing any; returns how many are wrong."""
    wrong = 0
    for case in shapes.all_cases():
        if not wanted or case.group in wanted:
            try:
                verified(case)
                say(f"{case.group:22} {case.name:42} agrees")
            except ValueError as error:
                wrong += 1
                say(f"{case.group:22} WRONG: {error}")
    return wrong


def run_suite(wanted: list[str], quick: bool, budget_s: float, say: Say) -> dict:
    """Everything in `wanted` classes (all when empty), one line said per case."""
    threads = torch.get_num_threads()
    limits = Limits()
    limits.refresh(budget_s)
    results: dict = {"environment": environment(), "quick": quick, "rows": [], "void": []}
    results.update({name: [] for name in EXTRA_CLASSES})

    def asked(name: str) -> bool:
        return not wanted or name in wanted

    group = None
    for case in shapes.quick_cases() if quick else shapes.all_cases():
        if not asked(case.group):
            continue
        if case.group != group:
            group = case.group
            limits.refresh(budget_s / 4)
        try:
            row = run_case(case, budget_s)
        except ValueError as error:  # a wrong result voids its case, not the run
            results["void"].append(str(error))
            say(f"{case.group:22} VOID: {error}")
            continue
        results["rows"].append(row)
        say(
            f"{case.group:22} {case.name:42} {row['ours_s'] * 1e3:9.3f} ms {row['torch_s'] * 1e3:9.3f} ms"
            f"  x{row['ratio']:6.2f}  ({row['torch_formulation']})"
        )
    if asked("tiny"):
        for tiny in shapes.TINY_CASES:
            row = run_tiny(tiny, budget_s)
            results["tiny"].append(row)
            say(f"{'tiny':22} {tiny.name:42} {row['ours_us']:9.2f} us {row['torch_us']:9.2f} us")
    if asked("memory") and memory.can_measure():
        for direction in ("forward", "backward"):
            row = run_memory(direction, 4096 if quick else shapes.MEMORY_SHAPE["seq"])
            results["memory"].append(row)
            say(f"{'memory':22} {direction:42} {row['ours_mib']:9.1f} MiB {row['torch_mib']:8.1f} MiB")
    if asked("threads") and threads > 1:
        for thread_case in shapes.THREAD_CASES[: 4 if quick else None : 3 if quick else 1]:
            row = run_threads(thread_case.case, thread_case.goal_speedup, threads, budget_s)
            results["threads"].append(row)
            speedups = f"x{row['ours_speedup']:.2f}  torch x{row['torch_speedup']:.2f}"
            say(f"{'threads':22} {row['name']:42} {speedups}")
    if asked("growth"):
        for seq in shapes.GROWTH_SEQS[: 3 if quick else None]:
            row = run_growth(seq, budget_s / 2)
            results["growth"].append(row)
            say(f"{'growth':22} S={seq:<40} {row['dense_ms']:9.2f} ms {row['window_ms']:9.2f} ms windowed")
    limits.refresh(budget_s / 4)
    results["limits"] = {
        "gemm_gflops": {name: rate / 1e9 for name, rate in limits.gemm.items()},
        "read_gbytes": limits.read / 1e9,
    }
    return finish(results)
