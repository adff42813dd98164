"""Interleaved best-of timing of functions that do the same work.

Times on a shared machine are noisy in one direction only: something else ran. The best of many
samples is therefore the estimate, and taking the samples in turn (a, b, a, b, ...) gives every
function the same share of quiet moments.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

# A sample shorter than this would measure the clock; faster functions are called several times.
SAMPLE_SECONDS = 0.5e-3
# A slow moment rarely lasts this many rounds.
MIN_ROUNDS = 5
# Functions so slow that even MIN_ROUNDS would take this many budgets get fewer rounds.
PATIENCE = 4.0


def _seconds(fn: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def calls_per_sample(fn: Callable[[], object]) -> int:
    """How often to call `fn` in one sample; the calls made here are its warm-up."""
    once = _seconds(fn, 1)
    if once < 20 * SAMPLE_SECONDS:
        once = min(_seconds(fn, 1) for _ in range(3))
    return max(1, int(SAMPLE_SECONDS / max(once, 1e-9)))


def best_of(
    functions: Sequence[Callable[[], object]], budget_s: float, min_rounds: int = MIN_ROUNDS
) -> list[float]:
    """Best time of one call of each function, in seconds, sampled in turn for about `budget_s`.

    At least `min_rounds` rounds, or 2 where these would take several budgets. Reference cycles are
    not collected meanwhile.
    """
    calls = [calls_per_sample(fn) for fn in functions]
    best = [float("inf")] * len(functions)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while True:
            for i, fn in enumerate(functions):
                best[i] = min(best[i], _seconds(fn, calls[i]))
            rounds += 1
            elapsed = time.perf_counter() - start
            enough = rounds >= min_rounds or (rounds >= 2 and elapsed >= PATIENCE * budget_s)
            if enough and elapsed >= budget_s:
                return best
    finally:
        if collecting:
            gc.enable()


def fastest(functions: Sequence[Callable[[], object]], budget_s: float) -> int:
    """Index of the function that is fastest in a short run-off."""
    if len(functions) == 1:
        return 0
    times = best_of(functions, budget_s, min_rounds=3)
    return min(range(len(functions)), key=times.__getitem__)
