"""The one list of attention problems that every backend runs, forward and backward."""

from __future__ import annotations

import random
from dataclasses import replace

from case import DTYPES as DTYPES
from case import Case
from case import Inputs as Inputs
from case import build as build
from extended_cases import EXTENDED


def _family(prefix: str, cases: list[Case]) -> list[Case]:
    return [replace(c, name=f"{prefix}-{c.name}") for c in cases]


# fmt: off
def _sizes() -> list[Case]:
    """Lengths around every tile boundary, square and not, both layouts in turn."""
    seqs = [(1, 1), (3, 3), (17, 17), (63, 63), (64, 64), (65, 65), (127, 127), (128, 128), (129, 129), (191, 191),
            (192, 192), (193, 193), (257, 257), (385, 385), (513, 513), (1, 65), (1, 257), (1, 513), (2, 385), (3, 129),
            (17, 193), (64, 257), (129, 17), (193, 3), (257, 1), (513, 1), (65, 128), (128, 65)]
    cases = []
    for n, seq in enumerate(seqs):
        layout = ("bshd", "bhsd")[n % 2]
        cases.append(Case(f"{seq[0]}x{seq[1]}", heads=(2, 1), seq=seq, dim=(32, 32), layout=layout))
        causal = (True, "top_left", "bottom_right")[n % 3]
        cases.append(
            Case(f"{seq[0]}x{seq[1]}-causal-{causal}", heads=(2, 2), seq=seq, dim=(40, 24), layout=layout, causal=causal)
        )
    return _family("seq", cases)


def _dims() -> list[Case]:
    """Head dims from 1 to 1024, equal and not."""
    dims = [1, 3, 8, 16, 31, 40, 64, 72, 80, 96, 128, 160, 192, 256, 320, 512, 576, 1024]
    cases = [Case(f"{d}", seq=(37, 41), dim=(d, d), heads=(2, 1) if d < 512 else (1, 1)) for d in dims]
    unequal = [(1, 64), (64, 1), (3, 8), (31, 40), (72, 80), (96, 64), (64, 128), (128, 256), (192, 128), (160, 96),
               (576, 512), (320, 16), (16, 1024), (1024, 3)]
    cases += [
        Case(f"{d}-{dv}", heads=(2, 2), seq=(35, 66), dim=(d, dv), layout="bhsd", causal=bool(n % 2))
        for n, (d, dv) in enumerate(unequal)
    ]
    return _family("dim", cases)


def _heads() -> list[Case]:
    """Groups 1, 2, 3, 7, 8; batches; ranks 2 and 3."""
    cases = []
    for n, (hq, hkv) in enumerate([(1, 1), (3, 3), (4, 2), (2, 1), (6, 2), (3, 1), (7, 1), (14, 2), (8, 1), (16, 2)]):
        cases.append(Case(f"{hq}of{hkv}", batch=2, heads=(hq, hkv), seq=(19, 67), dim=(24, 16), causal=n % 2 == 1))
        cases.append(Case(f"{hq}of{hkv}-decode", batch=3, heads=(hq, hkv), seq=(1, 130), dim=(64, 64), layout="bhsd"))
    for layout in ("bshd", "bhsd"):
        cases.append(Case(f"rank3-{layout}", heads=(4, 2), seq=(21, 34), rank=3, layout=layout, causal=True))
        cases.append(Case(f"rank2-{layout}", heads=(1, 1), seq=(21, 34), rank=2, layout=layout, window=(3, 9)))
    cases.append(Case("rank3-mask", heads=(4, 2), seq=(21, 34), rank=3, mask="hqk", bias="hqk"))
    cases.append(Case("rank3-mask4", heads=(4, 2), seq=(21, 34), rank=3, mask="1hqk", bias="b1qk", layout="bhsd"))
    cases.append(Case("rank2-mask", heads=(1, 1), seq=(21, 34), rank=2, mask="qk", bias="qk"))
    cases.append(Case("rank2-mask4", heads=(1, 1), seq=(21, 34), rank=2, mask="bhqk", bias="11qk"))
    cases.append(Case("rank3-lengths", heads=(2, 2), seq=(21, 34), rank=3, lengths=(20,)))
    cases.append(Case("many-batches", batch=9, heads=(3, 3), seq=(5, 7), dim=(8, 8)))
    return _family("heads", cases)


def _zeros() -> list[Case]:
    """Every axis may have length 0."""
    base = dict(batch=2, heads=(4, 2), seq=(5, 7), dim=(8, 12))
    cases = [
        Case("batch", **{**base, "batch": 0}),
        Case("seq-q", **{**base, "seq": (0, 7)}),
        Case("seq-kv", **{**base, "seq": (5, 0)}),
        Case("both-seqs", **{**base, "seq": (0, 0)}, layout="bhsd"),
        Case("heads", **{**base, "heads": (0, 2)}),
        Case("seq-kv-causal", **{**base, "seq": (5, 0)}, causal=True, window=(2, 1)),
        Case("seq-kv-rank3", heads=(4, 2), seq=(5, 0), rank=3),
        Case("seq-kv-rank2", heads=(1, 1), seq=(5, 0), rank=2),
        Case("seq-kv-lengths", **{**base, "seq": (5, 0)}, lengths=(0, 3)),
        Case("seq-kv-bias", **{**base, "seq": (5, 0)}, bias="bhqk", mask="b1qk"),
        Case("seq-q-bias", **{**base, "seq": (0, 7)}, bias="11qk", mask="qk"),
        Case("seq-q-column-bias", **{**base, "seq": (0, 7)}, bias="b11k"),
        Case("batch-bias", **{**base, "batch": 0}, bias="1hqk"),
        Case("lengths", **base, lengths=(0, 0), lengths_dtype="int64"),
    ]
    return _family("zero", cases)


def _bands() -> list[Case]:
    """Causal alignments and windows, alone and together, with Sq below, at and above Sk."""
    cases = []
    windows = [(0, 0), (5, 0), (0, 5), (16, 7), (None, 3), (3, None), (-1, 0), (64, 64), (200, 1), (1, 1000)]
    shapes = [(70, 70), (33, 101), (101, 33)]
    for n, window in enumerate(windows):
        for m, seq in enumerate(shapes):
            causal = (False, True, "top_left")[(n + m) % 3]
            cases.append(Case(f"{window[0]}-{window[1]}-{seq[0]}x{seq[1]}-{causal}", seq=seq, window=window, causal=causal,
                              layout=("bshd", "bhsd")[(n + m) % 2]))
    for seq in [(200, 300), (300, 200)]:
        for causal in (True, "top_left"):
            cases.append(Case(f"far-{seq[0]}x{seq[1]}-{causal}", seq=seq, window=(40, 90), causal=causal, heads=(3, 1)))
            cases.append(Case(f"causal-{seq[0]}x{seq[1]}-{causal}", seq=seq, causal=causal, heads=(4, 2), dim=(64, 64)))
    cases.append(Case("huge", seq=(20, 30), window=(2**62, 2**40), causal=True))
    cases.append(Case("decode", seq=(1, 200), window=(50, 0), heads=(8, 2)))
    return _family("band", cases)


def _scores() -> list[Case]:
    """Scale and softcap."""
    cases = [Case(f"scale-{s}", seq=(29, 75), scale=s, causal=n % 2 == 0) for n, s in enumerate([0.0, 1.0, -0.3, 1e-3, 2.5])]
    cases += [Case(f"softcap-{c}", seq=(66, 75), softcap=c, causal=n % 2 == 0) for n, c in enumerate([0.5, 5.0, 30.0, 1e4])]
    cases += [
        Case("softcap-scale", seq=(40, 40), softcap=2.0, scale=1.5, bias="1h1k"),
        Case("softcap-negative-scale", seq=(40, 70), softcap=3.0, scale=-0.7, window=(9, 9)),
        Case("negative-scale-causal", seq=(140, 140), scale=-1.0, causal=True, dim=(64, 64)),
        Case("softcap-mask", seq=(40, 70), softcap=3.0, mask="b1qk", heads=(4, 1)),
        Case("no-lse-grad", seq=(50, 70), causal=True, use_lse=False),
        Case("no-lse-grad-bias", seq=(50, 70), bias="1hqk", use_lse=False, softcap=4.0),
    ]
    return _family("score", cases)


PATTERNS = ["bhqk", "bhq1", "bh1k", "bh11", "b1qk", "b1q1", "b11k", "b111", "1hqk", "1hq1", "1h1k", "1h11", "11qk",
            "11q1", "111k", "1111", "hqk", "1qk", "qk", "1k", "q1", "k", "1"]


def _masks() -> list[Case]:
    """Masks, biases and lengths of every broadcast shape, dtype and stride."""
    bias_dtypes = ["same", "float32", "bfloat16", "float16", "float64"]
    cases = []
    for n, pattern in enumerate(PATTERNS):
        base = dict(batch=2, heads=(4, 2), seq=(39, 70), dim=(16, 24), layout=("bshd", "bhsd")[n % 2])
        cases.append(Case(f"bool-{pattern}", **base, mask=pattern, causal=n % 3 == 0))
        cases.append(Case(f"bias-{pattern}-{bias_dtypes[n % 5]}", **base, bias=pattern, bias_dtype=bias_dtypes[n % 5]))
    base = dict(batch=2, heads=(4, 2), seq=(39, 70), dim=(16, 24))
    for n, recipe in enumerate(["transposed", "d_slow", "step2", "rows2", "offset", "padded", "expand0", "expand3"]):
        cases.append(Case(f"bool-{recipe}", **base, mask="bhqk", mask_strides=recipe))
        cases.append(Case(f"bias-{recipe}", **base, bias="bhqk", bias_strides=recipe, bias_dtype=bias_dtypes[n % 5]))
    for n, pattern in enumerate(["bhqk", "11qk", "b11k", "qk", "1"]):
        cases.append(Case(f"neg-inf-{pattern}", **base, bias=pattern, bias_neg_inf=True, bias_dtype=bias_dtypes[n % 3]))
    for n, lengths in enumerate([(70, 70), (0, 70), (1, 69), (64, 33), (1000, 12), (-3, 5), (2**31 - 1, 0)]):
        cases.append(Case(f"lengths-{n}", **base, lengths=lengths, lengths_dtype=("int32", "int64")[n % 2],
                          causal=n % 2 == 0))
    cases.append(Case("lengths-window", **base, lengths=(50, 11), window=(20, 4)))
    cases.append(Case("lengths-long", batch=3, heads=(2, 1), seq=(3, 400), lengths=(129, 1, 385), dim=(64, 64)))
    cases.append(Case("lengths-top-left", **base, lengths=(31, 64), causal="top_left"))
    cases.append(Case("mask-bias-lengths", **base, mask="b11k", bias="1hqk", lengths=(66, 40), causal=True))
    cases.append(Case("mask-large", heads=(2, 1), seq=(200, 330), mask="1hqk", bias="11qk", bias_neg_inf=True))
    cases.append(Case("bias-gqa", heads=(6, 2), seq=(66, 130), bias="1hqk", causal=True, dim=(64, 64)))
    return _family("mask", cases)


def _strides() -> list[Case]:
    """Every stride recipe on each of q, k, v, in both layouts and in the gradient of the output."""
    recipes = ["transposed", "d_slow", "step2", "rows2", "offset", "padded", "overlap", "expand0", "expand1", "expand2", "expand3"]
    cases = []
    for n, recipe in enumerate(recipes):
        base = dict(batch=2, heads=(4, 2), seq=(35, 70), dim=(20, 12), layout=("bshd", "bhsd")[n % 2])
        cases.append(Case(f"all-{recipe}", **base, strides=(recipe,) * 3, causal=n % 2 == 0))
        cases.append(Case(f"dout-{recipe}", **base, out_grad_strides=recipe))
        other = recipes[(n + 3) % len(recipes)]
        cases.append(Case(f"mix-{recipe}-{other}", **{**base, "dim": (64, 64)}, strides=("dense", recipe, other)))
    cases.append(Case("decode-step2", batch=2, heads=(8, 1), seq=(1, 150), dim=(64, 64), strides=("offset", "step2", "d_slow")))
    cases.append(Case("large-overlap", heads=(2, 1), seq=(129, 200), dim=(40, 40), strides=("overlap",) * 3, causal=True))
    cases.append(Case("rank2-d-slow", heads=(1, 1), seq=(40, 50), rank=2, strides=("d_slow",) * 3))
    return _family("stride", cases)


def _blocks() -> list[Case]:
    """Problems of several key blocks (768 keys forward, 384 backward) or several chunks of rows, in each option."""
    seqs = [(1, 1600), (5, 800), (3, 769), (2, 768), (40, 1100), (7, 1537), (1100, 5), (900, 40), (70, 2000)]
    options = {  # what is given, and which third of the lengths goes without it
        "plain": ({}, 1),
        "causal": (dict(causal=True), 0),
        "window": (dict(window=(300, 20)), 2),
        "mask": (dict(mask="b1qk"), 0),  # it hides two rows, all that some of that third have
        "bias": (dict(bias="1h1k", bias_neg_inf=True), 1),
        "lengths": (dict(lengths=(1000,)), 2),
        "softcap": (dict(softcap=5.0, window=(None, 9)), 0),
        "negative": (dict(scale=-1.0, causal="top_left"), 1),
    }
    cases = []
    for m, (name, (given, skipped)) in enumerate(options.items()):
        for n, seq in enumerate(seqs):
            if n % 3 != skipped:
                cases.append(Case(f"{name}-{seq[0]}x{seq[1]}", seq=seq, heads=((2, 1), (1, 1), (2, 2))[(n + m) % 3],
                                  dim=((16, 24), (64, 64))[(n + m) % 2], layout=("bshd", "bhsd")[m % 2], **given))
    cases.append(Case("wide", heads=(1, 1), seq=(20, 800), dim=(300, 260), causal=True))
    cases.append(Case("narrow", heads=(2, 1), seq=(40, 1100), dim=(256, 256), window=(0, 0)))  # dp - delta is all rounding
    cases.append(Case("loud", heads=(2, 1), seq=(9, 1600), scale=3.0))
    cases.append(Case("square", heads=(1, 1), seq=(800, 820), causal=True, lengths=(810,)))
    return _family("block", cases)


# fmt: on
def _products(count: int) -> list[Case]:
    """Draws from all options at once, with one fixed seed."""
    r = random.Random(20240607)
    recipes = [
        "dense",
        "dense",
        "transposed",
        "d_slow",
        "step2",
        "rows2",
        "offset",
        "padded",
        "overlap",
        "expand0",
        "expand3",
    ]
    cases = []
    # fmt: off
    for n in range(count):
        batch = r.choice([1, 1, 2, 3])
        seq = (r.choice([1, 2, 17, 33, 64, 65, 130]), r.choice([1, 5, 31, 64, 65, 129, 190]))
        lengths = tuple(r.randint(0, seq[1] + 3) for _ in range(batch)) if r.random() < 0.4 else None
        cases.append(
            Case(
                f"{n:03d}", batch=batch, heads=r.choice([(1, 1), (2, 2), (4, 2), (3, 1), (7, 1), (8, 2)]), seq=seq,
                dim=(r.choice([1, 8, 16, 31, 64, 80]), r.choice([3, 8, 24, 64, 96])), layout=r.choice(["bshd", "bhsd"]),
                causal=r.choice([False, False, True, "top_left"]),
                window=r.choice([None, None, (9, 4), (-1, 12), (40, None), (0, 0)]),
                scale=r.choice([None, None, 0.25, -0.5]), softcap=r.choice([0.0, 0.0, 3.0]),
                mask=r.choice([None, None, *PATTERNS]), mask_strides=r.choice(["dense", "step2", "offset"]),
                bias=r.choice([None, None, *PATTERNS]), bias_dtype=r.choice(["same", "float32", "bfloat16"]),
                bias_neg_inf=r.random() < 0.3, lengths=lengths, lengths_dtype=r.choice(["int32", "int64"]),
                strides=(r.choice(recipes), r.choice(recipes), r.choice(recipes)), out_grad_strides=r.choice(recipes),
                use_lse=r.random() < 0.7,
            )
        )
    # fmt: on
    return _family("product", cases)


CASES = _sizes() + _dims() + _heads() + _zeros() + _bands() + _scores() + _masks() + _strides() + _blocks()
CASES += _products(90)
# One of each family's turns, for checks that need variety more than completeness.
FEW = CASES[::9]
CASES += EXTENDED
FEW += [c for c in EXTENDED if not c.dropout_p][::9]
assert len({c.name for c in CASES}) == len(CASES), "case names are not unique"
