"""Cases of what the extended operators take: ALiBi, sinks, dropout and typed masks, alone and in products."""

from __future__ import annotations

import random
from dataclasses import replace

from case import Case

# fmt: off
BASE = dict(batch=2, heads=(4, 2), seq=(39, 70), dim=(16, 24))


def _family(prefix: str, cases: list[Case]) -> list[Case]:
    return [replace(c, name=f"{prefix}-{c.name}") for c in cases]


def _alibi() -> list[Case]:
    cases = [Case(f"{seq[0]}x{seq[1]}", heads=(4, 2), seq=seq, alibi="h", causal=causal, layout=layout)
             for seq, causal, layout in [((1, 130), True, "bshd"), ((65, 65), True, "bhsd"), ((33, 101), False, "bshd"),
                                         ((101, 33), "top_left", "bhsd"), ((3, 900), False, "bhsd"), ((900, 7), False, "bshd")]]
    cases += [
        Case("batch", **BASE, alibi="bh"),
        Case("batch-half", **BASE, alibi="bh", alibi_dtype="bfloat16", causal=True),
        Case("half", **BASE, alibi="h", alibi_dtype="float16"),
        Case("double", **BASE, alibi="h", alibi_dtype="float64", mask="b1qk"),
        Case("bias", **BASE, alibi="bh", bias="1hqk", bias_neg_inf=True, layout="bhsd"),
        Case("softcap", **BASE, alibi="h", softcap=3.0, scale=-0.5),
        Case("window-lengths", **BASE, alibi="h", window=(20, 4), lengths=(50, 0)),
        Case("rank3", heads=(4, 2), seq=(21, 34), rank=3, alibi="h", causal=True),
        Case("rank2", heads=(1, 1), seq=(21, 34), rank=2, alibi="h"),
        Case("strides", **BASE, alibi="h", strides=("d_slow", "step2", "padded"), out_grad_strides="transposed"),
        Case("mqa", heads=(8, 1), seq=(66, 70), dim=(64, 64), alibi="h", causal=True),
        Case("no-lse-grad", **BASE, alibi="bh", use_lse=False),
    ]
    return _family("alibi", cases)


def _sinks() -> list[Case]:
    cases = [Case(f"{seq[0]}x{seq[1]}", heads=(4, 2), seq=seq, sinks="float32", causal=causal, layout=layout)
             for seq, causal, layout in [((1, 130), True, "bshd"), ((65, 65), True, "bhsd"), ((33, 101), False, "bshd"),
                                         ((101, 33), True, "bhsd"), ((3, 900), False, "bhsd"), ((900, 7), False, "bshd")]]
    cases += [
        Case("same", **BASE, sinks="same"),
        Case("double", **BASE, sinks="float64", softcap=2.0),
        Case("half", **BASE, sinks="bfloat16", causal=True),
        Case("blind-rows", **BASE, sinks="float32", mask="b1qk", layout="bhsd"),
        Case("blind-batch", **BASE, sinks="float32", lengths=(0, 33), bias="b11k"),
        Case("neg-inf", **BASE, sinks="float32", bias="bhqk", bias_neg_inf=True),
        Case("window", **BASE, sinks="float32", window=(4, 0), scale=2.0),
        Case("rank3", heads=(4, 2), seq=(21, 34), rank=3, sinks="float32", causal=True),
        Case("rank2", heads=(1, 1), seq=(21, 34), rank=2, sinks="same"),
        Case("gqa", heads=(14, 2), seq=(19, 67), sinks="float32", dim=(64, 64)),
        Case("no-lse-grad", **BASE, sinks="float32", use_lse=False),
    ]
    return _family("sink", cases)


def _dropout() -> list[Case]:
    cases = [Case(f"{p}-{seq[0]}x{seq[1]}", heads=(4, 2), seq=seq, dropout_p=p, layout=layout, causal=causal)
             for p, seq, layout, causal in [(0.1, (65, 65), "bshd", True), (0.5, (33, 101), "bhsd", False), (0.9, (70, 40), "bshd", False),
                                            (0.3, (1, 130), "bhsd", True), (0.2, (5, 803), "bshd", False), (0.2, (803, 6), "bhsd", False)]]
    cases += [
        Case("tiny-p", **BASE, dropout_p=1e-12),
        Case("mask-bias", **BASE, dropout_p=0.4, mask="b1qk", bias="1hqk"),
        Case("lengths", **BASE, dropout_p=0.4, lengths=(50, 0), window=(30, 3), layout="bhsd"),
        Case("softcap", **BASE, dropout_p=0.25, softcap=3.0, bias="bhqk", bias_neg_inf=True),
        Case("rank3", heads=(4, 2), seq=(21, 34), rank=3, dropout_p=0.2),
        Case("rank2", heads=(1, 1), seq=(21, 34), rank=2, dropout_p=0.2, causal=True),
        Case("odd", batch=3, heads=(6, 2), seq=(7, 9), dim=(8, 5), dropout_p=0.6, use_lse=False),
    ]
    return _family("dropout", cases)


def _typed() -> list[Case]:
    cases = []
    for n, name in enumerate(["documents", "scattered", "prefix", "prefixes", "tree", "trees", "blocks", "head-blocks"]):
        cases.append(Case(name, **BASE, typed=(name,), layout=("bshd", "bhsd")[n % 2]))
        cases.append(Case(f"{name}-causal", batch=2, heads=(2, 1), seq=(66, 66), typed=(name,), causal=True))
        cases.append(Case(f"{name}-long", heads=(2, 2), seq=(20, 800), dim=(64, 64), typed=(name,), bias="1h1k"))
    cases += [
        Case("documents-blocks-mask", **BASE, typed=("documents", "blocks")),
        Case("two-intervals", **BASE, typed=("documents", "prefixes"), mask="b1qk"),
        Case("three-intervals", **BASE, typed=("prefix", "trees", "scattered"), lengths=(66, 30)),
        Case("bands", **BASE, typed=("causal", "top-left", "window", "padding"), causal=True, window=(30, None)),
        Case("dense", **BASE, typed=("dense", "scattered"), mask="1hqk"),
        Case("wide", **{**BASE, "seq": (101, 33)}, typed=("tree", "top-left", "window")),
        Case("rank3", heads=(4, 2), seq=(21, 34), rank=3, typed=("documents", "causal")),
        Case("rank2", heads=(1, 1), seq=(21, 34), rank=2, typed=("tree", "blocks"), layout="bhsd"),
    ]
    return _family("typed", cases)


def _zeros() -> list[Case]:
    base = dict(batch=2, heads=(4, 2), seq=(5, 7), dim=(8, 12))
    everything = dict(alibi="bh", sinks="float32", dropout_p=0.3, typed=("documents",))
    cases = [
        Case("batch", **{**base, "batch": 0}, **everything),
        Case("seq-q", **{**base, "seq": (0, 7)}, **everything),
        Case("seq-kv", **{**base, "seq": (5, 0)}, **everything),
        Case("both", **{**base, "seq": (0, 0)}, **everything, layout="bhsd"),
        Case("heads", **{**base, "heads": (0, 2)}, **everything),
        Case("lengths", **base, **everything, lengths=(0, 0)),
        Case("blocks", **{**base, "seq": (5, 0)}, typed=("blocks",), sinks="same"),
    ]
    return _family("extended-zero", cases)


def _products(count: int) -> list[Case]:
    """Draws from all options at once, with one fixed seed."""
    r = random.Random(20250711)
    typed = [(), (), ("documents",), ("scattered", "causal"), ("prefixes",), ("trees",), ("head-blocks",), ("documents", "prefix"),
             ("window", "padding", "blocks")]
    cases = []
    for n in range(count):
        batch = r.choice([1, 2, 3])
        seq = (r.choice([1, 2, 17, 33, 64, 65, 130]), r.choice([5, 31, 64, 65, 129, 190]))
        masks = r.choice(typed)
        cases.append(Case(
            f"{n:03d}", batch=batch, heads=r.choice([(1, 1), (2, 2), (4, 2), (3, 1), (8, 2)]), seq=seq,
            dim=(r.choice([1, 8, 16, 31, 64]), r.choice([3, 8, 24, 64])), layout=r.choice(["bshd", "bhsd"]),
            causal=r.choice([False, True, "top_left"]), window=r.choice([None, None, (9, 4), (40, None)]),
            scale=r.choice([None, 0.25, -0.5]), softcap=r.choice([0.0, 0.0, 3.0]),
            mask=None if masks else r.choice([None, "b1qk", "k"]), bias=r.choice([None, None, "1hqk", "b11k", "q1"]),
            bias_neg_inf=r.random() < 0.3,
            lengths=tuple(r.randint(0, seq[1] + 3) for _ in range(batch)) if r.random() < 0.3 else None,
            strides=tuple(r.choice(["dense", "dense", "d_slow", "step2", "padded", "expand3"]) for _ in range(3)),
            use_lse=r.random() < 0.7, alibi=r.choice([None, "h", "bh"]), sinks=r.choice([None, "float32", "same"]),
            dropout_p=r.choice([0.0, 0.1, 0.5]), typed=masks,
        ))
    return _family("mixed", [c for c in cases if c.is_extended])


# fmt: on
EXTENDED = _alibi() + _sinks() + _dropout() + _typed() + _zeros() + _products(50)
