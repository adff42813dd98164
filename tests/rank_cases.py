"""Calls over process groups as tests describe them: what is held where, and what must come out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import rank_jobs
import torch
from reference import Result, attend, complaint, relative_error, unfused
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PLACEMENTS = ("contiguous", "zigzag", "striped")


def held(placement: str, size: int, lengths: list[int]) -> list[Tensor]:
    """The places that each rank holds, by the words of `shard_sequence`."""
    total = sum(lengths)
    everything = torch.arange(total)
    if placement == "striped":
        return [everything[rank::size] for rank in range(size)]
    if placement == "zigzag":
        chunks = everything.chunk(2 * size)
        return [torch.cat([chunks[rank], chunks[2 * size - 1 - rank]]) for rank in range(size)]
    return list(everything.split(lengths))


@dataclass(frozen=True)
class Case:
    """A call over `size` ranks, of which each holds `part` = (queries, keys), or as many as `lengths` says."""

    size: int
    part: tuple[int, int] = (12, 12)
    heads: tuple[int, int] = (4, 2)
    dim: tuple[int, int] = (8, 8)
    dtype: torch.dtype = F64
    placement: str = "contiguous"
    layout: str = "bshd"
    batch: int = 2
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    scores: dict = field(default_factory=dict)  # causal, window, softcap, scale, ...
    sinks: bool = False
    dlse: bool = True
    backend: str = "auto"

    @property
    def parts(self) -> tuple[list[int], list[int]]:
        if self.lengths is not None:
            return list(self.lengths[0]), list(self.lengths[1])
        return [self.part[0]] * self.size, [self.part[1]] * self.size

    def build(self) -> dict[str, Tensor]:
        """Whole tensors in the case's layout."""
        generator = torch.Generator().manual_seed(7)
        (seq_q, seq_kv), (dim, dim_v), (heads_q, heads_kv) = map(sum, self.parts), self.dim, self.heads
        shapes = {"q": (seq_q, heads_q, dim), "k": (seq_kv, heads_kv, dim), "v": (seq_kv, heads_kv, dim_v)}
        shapes["dout"] = (seq_q, heads_q, dim_v)
        found = {
            n: torch.randn(self.batch, *s, generator=generator, dtype=F64).to(self.dtype)
            for n, s in shapes.items()
        }
        if self.layout == "bhsd":
            found = {n: t.transpose(1, 2).contiguous() for n, t in found.items()}
        wide = F64 if self.dtype == F64 else F32
        if self.dlse:
            found["dlse"] = torch.randn(self.batch, heads_q, seq_q, generator=generator, dtype=wide)
        if self.sinks:
            found["sinks"] = torch.randn(heads_q, generator=generator, dtype=F64).to(self.dtype)
        return found

    def axis(self, name: str) -> int:
        """That of the sequence in a tensor or a gradient of it."""
        return 2 if self.layout == "bhsd" or name in ("lse", "dlse") else 1

    def split(self, whole: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What each rank holds."""
        places = [held(self.placement, self.size, lengths) for lengths in self.parts]
        found: list[dict[str, Tensor]] = [{} for _ in range(self.size)]
        for name, t in whole.items():
            which = places[1] if name in ("k", "v") else places[0]
            for rank in range(self.size):
                is_shared = name not in ("q", "k", "v", "dout", "dlse")
                found[rank][name] = t if is_shared else t.index_select(self.axis(name), which[rank])
        return found

    def join(self, results: list[dict[str, Tensor]], options_of: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The results of all ranks as those of one; gradients of what all hold are summed."""
        places = [held(self.placement, self.size, lengths) for lengths in self.parts]
        found = {}
        for name in results[0]:
            if name in ("dsinks", "dbias", "dalibi_slopes"):
                found[name] = sum(r[name] for r in results)
                continue
            which = torch.cat(places[1] if name in ("dk", "dv") else places[0])
            whole = torch.cat([r[name] for r in results], self.axis(name))
            found[name] = whole.index_select(self.axis(name), which.argsort())
        return found

    @property
    def options(self) -> dict:
        return {**self.scores, "layout": self.layout}


def name_of(case: Case) -> str:
    scores = "-".join(f"{n}={v}" for n, v in case.scores.items() if not isinstance(v, Tensor)) or "plain"
    extra = (
        "-sinks" * case.sinks + f"-{case.layout}" * (case.layout != "bshd") + "-lengths" * bool(case.lengths)
    )
    return f"{case.size}-{case.placement}-{scores}-{str(case.dtype)[6:]}-{case.heads}-{case.part}{extra}".replace(
        " ", ""
    )


def check(case: Case, got: dict[str, Tensor], whole: dict[str, Tensor], **more) -> None:
    """Holds results to the rule of tests/reference.py."""
    given = {n: whole[n] for n in ("sinks", "bias", "alibi_slopes") if n in whole}
    grads = {"dout": whole.get("dout"), "dlse": whole.get("dlse")}
    arguments = (whole["q"], whole["k"], whole["v"])
    exact = attend(*arguments, **case.options, **given, **grads, **more)
    plain = [
        unfused(*arguments, **case.options, **given, **grads, **more, other=other) for other in (False, True)
    ]
    found = []
    for name, value in got.items():
        want = getattr(exact, name)
        error = max(relative_error(getattr(p, name), want) for p in plain)
        rule = {"term": exact.terms.get(name, 0.0), "input_dtype": case.dtype}
        found.append(complaint(name, value, want, error, **rule))
        owner = "lse" if name == "lse" else "out"
        wide = F64 if case.dtype == F64 else F32
        assert value.dtype == (wide if owner == "lse" else case.dtype), name
    assert not [line for line in found if line], "\n".join(line for line in found if line)
    _check_zeros(case, got, exact)


def _check_zeros(case: Case, got: dict[str, Tensor], exact: Result) -> None:
    """Rows and keys without a partner get exact zeros."""

    def rows(name: str) -> Tensor:
        return got[name].transpose(1, 2) if case.layout == "bshd" else got[name]

    unseen = ~exact.visible.any(-1)
    for name in ("out", "dq"):
        assert not rows(name)[unseen].any(), name
    seen = exact.visible.any(-2).unflatten(1, (case.heads[1], -1)).any(2)
    for name in ("dk", "dv"):
        assert not rows(name)[~seen].any(), name


def check_any(case: Case, got: dict[str, Tensor], whole: dict[str, Tensor], extra: dict) -> None:
    """As `check`, where gradients of options may have dtypes of their own."""
    plain = {n: t for n, t in got.items() if n not in ("dbias", "dalibi_slopes")}
    check(case, plain, whole, **extra)
    given = {n: whole[n] for n in ("sinks", "bias", "alibi_slopes") if n in whole}
    exact = attend(
        whole["q"],
        whole["k"],
        whole["v"],
        dout=whole["dout"],
        dlse=whole["dlse"],
        **case.options,
        **given,
        **extra,
    )
    for name in set(got) - set(plain):
        torch.testing.assert_close(got[name].double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


def run(pool, kind: str, case: Case, **more) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    whole = case.build()
    options = {**case.options, **more, "backend": case.backend, "placement": case.placement}
    results = pool(case.size).run_each(
        rank_jobs.attend, [(kind, part, options) for part in case.split(whole)]
    )
    return case.join(results), whole


def ring_cases() -> list[Case]:
    """All of causal, window, placement and group size; the rest takes turns."""
    causal = (False, True, "top_left")
    windows = (None, (5, 0), (3, 20), (0, 0))
    dtypes = itertools.cycle((F64, F32, F64, BF16, F64, F16, F32))
    heads = itertools.cycle(((4, 2), (3, 3), (4, 1), (2, 2), (6, 2)))
    parts = itertools.cycle(((12, 12), (10, 10), (2, 2), (14, 14), (8, 12)))
    layouts, sinks = itertools.cycle(("bshd", "bshd", "bhsd")), itertools.cycle((False, True))
    changes = itertools.cycle(({}, {"softcap": 2.0}, {}, {"scale": 0.6}))
    found = []
    for size, placement, rule, window in itertools.product((2, 3, 4), PLACEMENTS, causal, windows):
        scores = {"causal": rule, "window": window, **next(changes)}
        found.append(
            Case(
                size, next(parts), next(heads), dtype=next(dtypes), placement=placement, layout=next(layouts),
                scores=scores, sinks=next(sinks),
            )
        )  # fmt: skip
    found += [
        # Lengths that no tile divides, that differ between ranks, and that are 0.
        Case(3, (7, 7), dim=(5, 9), scores={"causal": True}, placement="striped"),
        Case(2, lengths=((5, 9), (5, 9)), scores={"causal": True}, sinks=True),
        Case(3, lengths=((1, 17, 4), (6, 0, 11)), scores={"causal": True, "window": (8, None)}),
        Case(4, lengths=((0, 3, 0, 9), (4, 4, 0, 4)), scores={"window": (4, 2)}, dtype=F32),
        Case(2, (4, 0), scores={"causal": True}, sinks=True),
        Case(2, (0, 4)),
        Case(2, (6, 20), scores={"causal": "top_left"}, placement="zigzag", sinks=True),
        Case(2, (20, 6), scores={"causal": True}, placement="zigzag", sinks=True),
        Case(3, (20, 6), scores={"causal": True, "window": (2, 0)}, placement="striped", sinks=True),
        # Longer than a tile of the kernels.
        Case(2, (150, 150), dtype=F32, scores={"causal": True}, placement="zigzag", batch=1),
        Case(2, (150, 150), dtype=BF16, scores={"causal": True}, placement="zigzag", batch=1, heads=(2, 1)),
        Case(2, (101, 101), dtype=F32, scores={"causal": True}, placement="striped", dlse=False),
        Case(4, (60, 60), dtype=F16, scores={"causal": True}, placement="contiguous", batch=1),
        *[
            Case(3, (12, 12), placement=p, scores={"causal": True}, backend="portable", sinks=True)
            for p in PLACEMENTS
        ],
        Case(2, dtype=BF16, placement="zigzag", scores={"causal": True}, backend="portable"),
    ]
    return found


def all_heads_cases() -> list[tuple[Case, dict]]:
    """Calls with what `ulysses_attention` and `head_parallel_attention` pass on, as whole tensors."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    return [
        (Case(2, scores={"causal": True}), {}),
        (Case(2, heads=(4, 1), scores={"causal": True, "window": (9, 0)}, sinks=True), {}),
        (Case(3, heads=(6, 3), layout="bhsd", scores={"softcap": 3.0}), {"bias": normal(6, 36, 36)}),
        (Case(3, heads=(3, 1), dtype=F32, sinks=True), {"bias": normal(2, 1, 1, 36).float()}),
        (
            Case(3, heads=(6, 6), dim=(5, 9)),
            {"alibi_slopes": normal(2, 6).abs(), "mask": normal(2, 6, 36, 36) > 0},
        ),
        (
            Case(4, heads=(4, 2), scores={"causal": True}),
            {"alibi_slopes": normal(4).abs(), "mask": normal(48, 48) > 0},
        ),
        (Case(4, heads=(8, 2), dtype=BF16, scores={"causal": True}), {}),
        (Case(4, heads=(4, 4), dtype=F16), {"kv_lengths": torch.tensor([31, 0])}),
        (Case(4, heads=(8, 1), dtype=F32, scores={"scale": 0.2}), {"bias": normal(1, 8, 1, 48).float()}),
        (Case(2, heads=(2, 2), backend="portable", scores={"causal": "top_left"}, sinks=True), {}),
    ]
