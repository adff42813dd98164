"""The limits of this machine, measured with torch in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .timing import best_of

GEMM_SIZES = (512, 1024, 2048)
READ_BYTES = 256 << 20  # far beyond any cache


def gemm_rate(dtype: torch.dtype, budget_s: float) -> float:
    """FLOP/s of torch's matrix product of `dtype`, the best over a few square sizes. Large ones are left out
    where they would take longer than the budget, as half types do on processors without instructions."""
    rates: list[float] = []
    for n in GEMM_SIZES:
        if rates and 2.0 * n**3 / max(rates) > budget_s:
            break
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype)
        seconds = best_of([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)], budget_s / len(GEMM_SIZES))[0]
        rates.append(2.0 * n**3 / seconds)
    return max(rates)


def reading() -> Callable[[], object]:
    """Reads READ_BYTES: the sum over a large fp32 tensor."""
    return torch.ones(READ_BYTES // 4).sum


def read_bandwidth(budget_s: float) -> float:
    """Bytes/s of reading."""
    return READ_BYTES / best_of([reading()], budget_s)[0]


@dataclass
class Limits:
    """The best rates seen so far; `refresh` measures again and keeps the better.

    A limit measured once at a bad moment would flatter everything compared with it, so the suite
    refreshes the limits between classes.
    """

    gemm: dict[str, float] = field(default_factory=dict)  # dtype name -> FLOP/s
    read: float = 0.0  # bytes/s

    def refresh(self, budget_s: float) -> None:
        for name in ("float32", "bfloat16"):
            self.gemm[name] = max(self.gemm.get(name, 0.0), gemm_rate(getattr(torch, name), budget_s))
        self.read = max(self.read, read_bandwidth(budget_s / 2))
