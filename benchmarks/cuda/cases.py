"""The CUDA classes: what is timed on a card, and what is expected of it.

Goals are ratios over the best of torch's backends in the same run and shares of the matrix rate of
the dtype (fp32: of TF32's third, since three products make one).
"""

from __future__ import annotations

from dataclasses import replace

from ..shapes import Case

HEADS_OF_DIM = {64: 32, 96: 24, 128: 16, 256: 8}
TOKENS = 16384  # per batch: long sequences come alone


def _case(group: str, seq: int, dim: int, **options) -> Case:
    batch = max(1, TOKENS // seq)
    heads = HEADS_OF_DIM.get(dim, 16)
    return Case(**{"group": group, "batch": batch, "heads": heads, "seq": seq, "dim": dim,
                   "dtype": "bfloat16", **options})  # fmt: skip


def all_cases() -> list[Case]:
    """One row of the report each, most telling first: a run that is cut short has those."""
    cases = [
        _case("forward D=128", seq, 128, causal=causal, goal_ratio=1.0,
              goal_share=0.8 if seq == 16384 and not causal else None)
        for seq in (16384, 4096, 1024)
        for causal in (False, True)
    ]  # fmt: skip
    cases += [
        _case("forward D=64", seq, 64, causal=c, goal_ratio=1.0)
        for seq in (8192, 2048)
        for c in (False, True)
    ]
    cases += _decode()
    cases += [_case("backward", seq, dim, causal=causal, backward=True, goal_ratio=1.0)
              for dim in (128, 64) for seq in (8192, 2048) for causal in (False, True)]  # fmt: skip
    cases += [_case("forward D=96, 256", 4096, dim, causal=True, goal_ratio=1.0) for dim in (96, 256)]
    cases += [replace(_case("forward fp16", 4096, 128, dtype="float16"), goal_ratio=1.0)]
    gqa = {"heads": 32, "heads_kv": 4}
    cases += [_case("GQA", 4096, 128, causal=True, goal_ratio=1.0, backward=b, **gqa) for b in (False, True)]
    cases += [
        _case("where torch falls back", 4096, 128, window=(256, 0), goal_ratio=3.0),
        _case("where torch falls back", 4096, 128, bias=(1, 16), goal_ratio=3.0),
        _case("where torch falls back", 4096, 128, bias=(1, 16), backward=True, goal_ratio=3.0),
        _case("where torch falls back", 4096, 128, sinks=True, goal_ratio=3.0),
        _case("where torch falls back", 4096, 128, alibi=True, causal=True, goal_ratio=3.0),
        _case("where torch falls back", 4096, 192, dim_v=128, goal_ratio=3.0),
        _case("where torch falls back", 2048, 512, heads=4, goal_ratio=3.0),
        _case("mask and lengths", 2048, 128, mask=True, goal_ratio=1.0),
        _case("mask and lengths", 2048, 128, padded=True, goal_ratio=1.5),
    ]
    cases += [_case("fp32", 4096, dim, dtype="float32", backward=b, goal_ratio=1.5)
              for dim in (64, 128) for b in (False, True)]  # fmt: skip
    return cases


def _decode() -> list[Case]:
    """One query row for each of 32 heads that share 4 K/V heads; torch reads contiguous keys in any case."""
    return [
        Case("decode", batch, 32, seq, 128, "bfloat16", heads_kv=4, seq_q=1, page=page, goal_share=0.88)
        for batch, seq in ((16, 8192), (4, 32768), (1, 131072))
        for page in (0, 64)
    ]


def small_cases() -> list[Case]:
    """The same kinds at sizes for the emulator: what a dry run goes through."""
    shrunk = {}
    for case in all_cases():
        heads_kv = 1 if case.heads_kv else 0
        bias = (1, 2) if case.bias else None
        window = (16, 0) if case.window else None
        small = replace(case, batch=2 if case.padded else 1, heads=2, heads_kv=heads_kv, seq=48, bias=bias,
                        window=window, page=min(case.page, 16))  # fmt: skip
        shrunk.setdefault(small.name, small)
    return list(shrunk.values())
