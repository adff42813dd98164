"""What is measured: one `Case` per row of the table, grouped in classes with goals.

A class is what a user would recognise as one kind of work ("forward fp32", "padded batch"). Its
goals are a ratio over torch's time and, where a hardware limit is known, a share of that limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# No single case may be slower than this ratio over torch; the rest of the way to 1 is timer noise.
FLOOR_RATIO = 0.97
# Matrix products in the backward pass (5 of them) over those in the forward pass (2).
BACKWARD_FLOPS_FACTOR = 2.5

SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Kernels with products of bf16 itself; all others compute in fp32.
BF16_ISAS = ("avx512bf16", "amx")


@dataclass(frozen=True)
class Case:
    """One attention problem in (batch, heads, seq, dim) terms, and what is expected of it."""

    group: str
    batch: int
    heads: int
    seq: int
    dim: int
    dtype: str = "float32"
    heads_kv: int = 0  # 0: as many as heads
    dim_v: int = 0  # 0: dim
    causal: bool = False
    window: tuple[int, int] | None = None
    mask: bool = False  # random bool mask (batch, 1, seq, seq)
    bias: tuple[int, int] | None = None  # (batch, heads) extent of a (.., .., seq, seq) bias
    padded: bool = False  # kv_lengths, half of the keys on average
    packed: bool = False  # the same lengths for queries too, as packed sequences
    seq_q: int = 0  # 0: seq
    dropout: float = 0.0
    sinks: bool = False
    alibi: bool = False
    page: int = 0  # tokens of a page where keys and values lie in pages; 0: they do not
    backward: bool = False
    goal_ratio: float | None = None
    goal_share: float | None = None

    @property
    def kv_heads(self) -> int:
        return self.heads_kv or self.heads

    @property
    def value_dim(self) -> int:
        return self.dim_v or self.dim

    @property
    def queries(self) -> int:
        return self.seq_q or self.seq

    @property
    def name(self) -> str:
        """Unique within the suite; the key by which two runs are compared."""
        heads = f"H{self.heads}" if not self.heads_kv else f"H{self.heads}/{self.heads_kv}"
        dim = f"D{self.dim}" if not self.dim_v else f"D{self.dim}/{self.dim_v}"
        seq = f"S{self.seq}" if not self.seq_q else f"S{self.seq_q}x{self.seq}"
        parts = [f"B{self.batch}", heads, seq, dim, SHORT_DTYPE[self.dtype]]
        parts += ["causal"] * self.causal
        parts += [f"window{self.window[0]},{self.window[1]}"] if self.window else []
        parts += ["mask"] * self.mask
        parts += [f"bias({self.bias[0]},{self.bias[1]},S,S)"] if self.bias else []
        parts += ["half-padded"] * self.padded
        parts += ["varlen"] * self.packed
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += ["sinks"] * self.sinks
        parts += ["alibi"] * self.alibi
        parts += [f"pages of {self.page}"] * bool(self.page)
        parts += ["fwd+bwd" if self.dropout else "bwd"] * self.backward
        return " ".join(parts)

    def kv_lengths(self) -> list[int] | None:
        """Evenly spread over (0, seq], half of seq on average."""
        if not self.padded and not self.packed:
            return None
        step = self.seq / self.batch
        return [max(1, round(step * (i + 0.5))) for i in range(self.batch)]

    def visible_pairs(self) -> int:
        """(query, key) pairs of one head, summed over the batch, that band and lengths leave visible.

        A bool mask counts as dense: its holes are too scattered to skip.
        """
        total = 0
        for length in self.kv_lengths() or [self.seq] * self.batch:
            left, right = self.window or (-1, -1)
            if self.window is None and not self.causal:
                total += length * (length if self.packed else self.queries)
                continue
            for i in range(self.seq):
                first = max(0, i - left) if left >= 0 else 0
                last = min(length - 1, i + right) if right >= 0 else length - 1
                last = min(last, i) if self.causal else last
                total += max(0, last - first + 1)
        return total

    def flops(self) -> float:
        """Matrix-product FLOPs of the visible pairs."""
        forward = 2.0 * self.heads * self.visible_pairs() * (self.dim + self.value_dim)
        if self.dropout and self.backward:  # both are timed, as what one costs the other may save
            return forward * (1.0 + BACKWARD_FLOPS_FACTOR)
        return forward * (BACKWARD_FLOPS_FACTOR if self.backward else 1.0)

    def key_bytes(self) -> float:
        """Of keys and values, which decoding reads once."""
        return float(self.batch * self.kv_heads * self.seq * (self.dim + self.value_dim) * BYTES[self.dtype])

    def limit(self, isa: str) -> str:
        """The matrix product of what kernels for `isa` compute in."""
        return self.dtype if self.dtype == "bfloat16" and isa in BF16_ISAS else "float32"


def _forward() -> list[Case]:
    cases = []
    # (batch, heads, seq): the same work from many short to few long sequences.
    extents = [(4, 8, 1024), (2, 8, 2048), (1, 4, 4096)]
    for dtype, ratio, shares in (
        ("float32", 1.08, {64: 0.88, 128: 0.88}),
        ("bfloat16", 2.1, {64: 0.82, 128: 0.85}),
        ("float16", 1.7, {64: 0.80, 128: 0.80}),
    ):
        short = SHORT_DTYPE[dtype]
        cases += [
            Case(f"forward {short}", b, h, s, d, dtype, goal_ratio=ratio, goal_share=shares[d])
            for d in (64, 128)
            for b, h, s in extents
        ]
    for d in (64, 128):
        cases += [
            Case("forward fp32 causal", b, 8, s, d, causal=True, goal_ratio=ratio, goal_share=share)
            for b, s, ratio, share in ((8, 512, 1.7, 0.6), (2, 2048, 1.25, 0.85))
        ]
    for dtype in ("bfloat16", "float16"):
        group = f"forward {SHORT_DTYPE[dtype]} causal"
        cases += [Case(group, b, 8, s, 64, dtype, causal=True) for b, s in ((8, 512), (2, 2048))]
    return cases


def _backward() -> list[Case]:
    cases = []
    # (batch, seq, dim); torch's fp16 backward is so slow that it gets small ones.
    extents = ((2, 1024, 64), (1, 2048, 64), (1, 1024, 128))
    small = ((1, 512, 64), (1, 1024, 64), (1, 512, 128))
    for dtype, ratio, share in (("float32", 1.05, 0.82), ("bfloat16", 1.4, 0.70), ("float16", None, None)):
        group = f"backward {SHORT_DTYPE[dtype]}"
        cases += [
            Case(group, b, 8, s, d, dtype, causal=causal, backward=True, goal_ratio=ratio, goal_share=share)
            for causal in (False, True)
            for b, s, d in (small if dtype == "float16" else extents)
        ]
    return cases


def _masks() -> list[Case]:
    window = [
        Case("window 256 of 2048", 1, 8, 2048, 64, dtype, causal=causal, window=sides, goal_ratio=6)
        for dtype in ("float32", "bfloat16")
        for causal, sides in ((True, (255, 0)), (False, (128, 127)))
    ]
    mask = [Case("bool mask", 2, 8, 1024, d, dtype, mask=True, goal_ratio=1.1)
            for dtype in ("float32", "bfloat16") for d in (64, 128)]  # fmt: skip
    bias = [Case("bias", 2, 8, 1024, 64, dtype, bias=extent, goal_ratio=1.1)
            for dtype in ("float32", "bfloat16") for extent in ((1, 1), (1, 8), (2, 8))]  # fmt: skip
    padded = [Case("padded batch", 8, 8, s, d, dtype, padded=True, goal_ratio=1.8)
              for dtype in ("float32", "bfloat16")
              for s, d in ((512, 64), (1024, 64), (512, 128))]  # fmt: skip
    return window + mask + bias + padded


def _shapes() -> list[Case]:
    dim_v = [
        Case("Dv != D", 1, 8, s, d, dim_v=dv, causal=causal, goal_ratio=1.8, goal_share=0.85)
        for s, d, dv, causal in ((2048, 64, 128, False), (2048, 128, 64, False), (1024, 192, 128, False),
                                 (1024, 192, 128, True))
    ]  # fmt: skip
    dim_v.append(Case("Dv != D", 1, 8, 1024, 192, "bfloat16", dim_v=128, goal_ratio=1.8))
    gqa = [Case("GQA", 1, 16, 1024, d, dtype, heads_kv=kv, causal=causal)
           for dtype in ("float32", "bfloat16")
           for d, kv, causal in ((64, 4, False), (128, 2, False), (64, 4, True))]  # fmt: skip
    small = [
        Case("small", b, h, s, d, dtype, causal=causal, goal_ratio=1.05)
        for b, h, s, d, dtype, causal in (
            (1, 8, 64, 64, "float32", False),
            (1, 12, 128, 64, "float32", False),
            (1, 8, 256, 64, "float32", False),
            (1, 8, 256, 128, "float32", True),
            (8, 12, 64, 32, "float32", False),
            (8, 8, 128, 64, "float32", True),
            (16, 12, 128, 32, "float32", False),
            (32, 4, 32, 64, "float32", False),
            (64, 8, 64, 64, "float32", False),
            (8, 8, 256, 64, "float32", False),
            (8, 8, 128, 64, "bfloat16", False),
            (8, 8, 256, 64, "bfloat16", True),
        )
    ]
    return dim_v + gqa + small


def _decode() -> list[Case]:
    cases = []
    for dtype, ratio in (("float32", 1.6), ("bfloat16", 15), ("float16", 15)):
        group = f"decode {SHORT_DTYPE[dtype]}"
        cases += [
            Case(group, batch, 32, seq, dim, dtype, heads_kv=kv, seq_q=1, goal_ratio=ratio, goal_share=share)
            for batch, seq, dim, kv, share in (
                (1, 4096, 128, 0, 0.85),
                (4, 4096, 64, 8, 0.85),
                (1, 16384, 128, 8, 0.85),
                (8, 4096, 128, 4, 0.65),
                (1, 16384, 64, 4, 0.65),
            )
        ]
    return cases


def _features() -> list[Case]:
    dropout = [
        Case(f"dropout {'with backward' if backward else 'forward'}", 2, 8, s, 64, dtype, causal=causal,
             dropout=0.1, backward=backward, goal_ratio=2 if backward else 5)
        for backward in (False, True)
        for dtype in ("float32", "bfloat16")
        for s, causal in ((512, False), (1024, True))
    ]  # fmt: skip
    packed = [Case("varlen", 8, 8, s, d, dtype, packed=True, goal_ratio=1.8)
              for dtype in ("float32", "bfloat16")
              for s, d in ((512, 64), (1024, 64), (512, 128))]  # fmt: skip
    sinks = [Case("sinks", 1, 16, 1024, 64, dtype, heads_kv=kv, causal=causal, sinks=True)
             for dtype in ("float32", "bfloat16")
             for kv, causal in ((0, False), (4, True))]  # fmt: skip
    return dropout + packed + sinks


def all_cases() -> list[Case]:
    """Every throughput case, in the order of the table."""
    return _forward() + _backward() + _masks() + _shapes() + _decode() + _features()


def quick_cases() -> list[Case]:
    """One case of each class: the one with the least work."""
    first: dict[str, Case] = {}
    for case in all_cases():
        held = first.get(case.group)
        if held is None or case.flops() < held.flops():
            first[case.group] = case
    return list(first.values())


@dataclass(frozen=True)
class TinyCase:
    """Call overhead: an input so small that only the way to the kernel costs time."""

    name: str
    shape: tuple[int, int, int, int]  # (batch, heads, seq, dim)
    grad: bool
    goal_us: float


TINY_CASES = (
    TinyCase("(1,1,8,64) no grad", (1, 1, 8, 64), False, 8.0),
    TinyCase("(1,1,8,64) forward with grad", (1, 1, 8, 64), True, 16.0),
)


@dataclass(frozen=True)
class ThreadCase:
    """Speed-up from 1 to n threads."""

    case: Case
    goal_speedup: float = 1.9


THREAD_CASES = (
    ThreadCase(Case("threads", 1, 8, 2048, 64)),
    ThreadCase(Case("threads", 1, 8, 2048, 64, causal=True)),
    ThreadCase(Case("threads", 1, 8, 2048, 64, "bfloat16")),
    ThreadCase(Case("threads", 1, 1, 4096, 64)),
    ThreadCase(Case("threads", 1, 1, 4096, 64, causal=True)),
    ThreadCase(Case("threads", 1, 8, 1024, 64, backward=True)),
    ThreadCase(Case("threads", 1, 1, 2048, 64, backward=True)),
    ThreadCase(Case("threads", 1, 1, 2048, 64, causal=True, backward=True)),
)

MEMORY_SHAPE = {"batch": 1, "heads": 8, "seq": 16384, "dim": 64, "dtype": "float32"}
MEMORY_GOAL_MIB = {"forward": 64, "backward": 128}

GROWTH_SEQS = (512, 1024, 2048, 4096, 8192)
GROWTH_WINDOW = 256


def growth_case(seq: int, windowed: bool) -> Case:
    """One head group of the cost-growth plot: dense, or a causal window."""
    if windowed:
        return Case("growth", 1, 4, seq, 64, causal=True, window=(GROWTH_WINDOW - 1, 0))
    return Case("growth", 1, 4, seq, 64)


def geometric_mean(values: list[float]) -> float:
    """Geometric mean of positive values; NaN when there are none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
