"""The two sides of a benchmark: this package, and torch's SDPA in every formulation a user has.

Tensors are (batch, heads, seq, dim). A `Formulation` owns its inputs, so that each side may have
the memory layout it likes best; torch's fastest formulation is the one compared with.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Case

RESULTS = ("out", "dq", "dk", "dv")
# Largest error allowed relative to the largest value of the result in fp32, out and gradients.
TOLERANCE = {"float32": (2e-5, 1e-4), "float16": (4e-3, 8e-3), "bfloat16": (2e-2, 4e-2)}
# torch accumulates 16-bit gradients in 16 bits: its own results get more room.
TORCH_TOLERANCE = {"float32": (2e-5, 1e-4), "float16": (1e-2, 5e-2), "bfloat16": (4e-2, 2e-1)}


@dataclass
class Formulation:
    """One way to compute a case: `forward(q, k, v)` on tensors laid out as it wants them."""

    name: str
    inputs: tuple[Tensor, Tensor, Tensor]
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    trick: bool = False  # rewrites the problem to reach a fused kernel; plain SDPA would take the call too
    packed: bool = False  # results are packed sequences

    def run_forward(self) -> Tensor:
        return self.forward(*self.inputs)

    def backward_only(self, dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Runs the forward pass once; each call of the result is one backward pass over it."""
        leaves = tuple(t.detach().requires_grad_() for t in self.inputs)
        out = self.forward(*leaves)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def forward_and_backward(self, dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Each call of the result is a forward and a backward pass."""
        leaves = tuple(t.detach().requires_grad_() for t in self.inputs)
        return lambda: torch.autograd.grad(self.forward(*leaves), leaves, dout)


def seeded(case_name: str) -> torch.Generator:
    """A generator that depends on the case alone, not on what ran before it."""
    return torch.Generator().manual_seed(zlib.crc32(case_name.encode()))


def band_mask(case: Case) -> Tensor:
    """The window of `case`, and its causality, as a dense bool mask (seq, seq)."""
    left, right = case.window or (-1, -1)
    delta = torch.arange(case.seq)[None, :] - torch.arange(case.seq)[:, None]  # key - query
    keep = torch.ones(case.seq, case.seq, dtype=torch.bool)
    if left >= 0:
        keep &= delta >= -left
    if right >= 0:
        keep &= delta <= right
    if case.causal:
        keep &= delta <= 0
    return keep


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the bias that torch adds to the scores."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


class Problem:
    """The tensors of a case and every formulation of it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = getattr(torch, case.dtype)
        generator = seeded(case.name)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        self.q = normal(case.batch, case.heads, case.queries, case.dim)
        self.k = normal(case.batch, case.kv_heads, case.seq, case.dim)
        self.v = normal(case.batch, case.kv_heads, case.seq, case.value_dim)
        self.dout = normal(case.batch, case.heads, case.queries, case.value_dim)
        self.bias = normal(*case.bias, case.seq, case.seq) if case.bias else None
        self.mask = None
        if case.mask:
            shape = (case.batch, 1, case.seq, case.seq)
            self.mask = torch.rand(shape, generator=generator) < 0.8
            self.mask[..., 0] = True  # no row without a key: torch's answer there is another
        lengths = case.kv_lengths()
        self.kv_lengths = torch.tensor(lengths, dtype=torch.int32) if lengths else None
        self.sinks = normal(case.heads) if case.sinks else None

    def ours(self) -> Formulation:
        from flash_attn_ext import flash_attention

        case = self.case
        if case.packed:
            return self._packed()
        options = {"layout": "bhsd", "causal": case.causal, "window": case.window, "mask": self.mask,
                   "bias": self.bias, "kv_lengths": self.kv_lengths, "sinks": self.sinks}  # fmt: skip
        options = {name: value for name, value in options.items() if value is not None}
        if case.dropout:
            options["dropout_p"] = case.dropout

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attention(q, k, v, **options)

        return Formulation("ours", (self.q, self.k, self.v), call)

    def _packed(self) -> Formulation:
        from flash_attn_ext import flash_attention_varlen

        starts = F.pad(self.kv_lengths.cumsum(0), (1, 0)).int()

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attention_varlen(q, k, v, starts, starts, self.case.seq, self.case.seq)

        return Formulation(
            "ours", tuple(map(self.without_padding, (self.q, self.k, self.v))), call, packed=True
        )

    def without_padding(self, x: Tensor) -> Tensor:
        """The rows of all sequences of a (batch, heads, seq, dim) tensor: (total, heads, dim)."""
        rows = torch.arange(self.case.seq) < self.kv_lengths[:, None]
        return x.transpose(1, 2)[rows]

    def _torch_mask(self) -> Tensor | None:
        case = self.case
        if self.mask is not None:
            return self.mask
        if case.window:
            return band_mask(case)
        if self.kv_lengths is not None:
            return torch.arange(case.seq)[None, None, None, :] < self.kv_lengths[:, None, None, None]
        return None

    def theirs(self) -> list[Formulation]:
        """Every formulation that a torch user would think of, on both memory layouts."""
        case, mask = self.case, self._torch_mask()
        if case.sinks:
            masks = {"one more key": self._sink_mask()}
        elif mask is not None:
            masks = {"bool mask": mask, "float mask": additive(mask, self.dtype)}
        else:
            masks = {"": self.bias}
        causal = case.causal and case.window is None and not case.sinks  # else the mask has it
        calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
        for name, attn_mask in masks.items():
            options = {"attn_mask": attn_mask, "is_causal": causal, "dropout_p": case.dropout}
            if case.sinks:
                calls[name] = _with_sink_key(case.heads // case.kv_heads, **options)
            elif case.heads_kv:
                calls[f"{name} enable_gqa".strip()] = _direct(enable_gqa=True, **options)
                calls[f"{name} repeated".strip()] = _repeated(case.heads // case.kv_heads, **options)
            else:
                calls[name] = _direct(**options)
            if case.dim_v:
                calls[f"{name} zero-padded".strip()] = _zero_padded(case, **options)
        layouts = {"bhsd": (self.q, self.k, self.v), "bshd": tuple(map(as_bshd, (self.q, self.k, self.v)))}
        return [
            Formulation(f"{name} {layout}".strip(), inputs, call, trick="zero-padded" in name)
            for name, call in calls.items()
            for layout, inputs in layouts.items()
        ]

    def _sink_mask(self) -> Tensor:
        """What to add to the scores of the keys, the last of which stands for the sink."""
        seen = band_mask(self.case) if self.case.causal else torch.ones(self.case.seq, self.case.seq) > 0
        keys = additive(seen, self.dtype).expand(self.case.heads, -1, -1)
        return torch.cat((keys, self.sinks[:, None, None].expand(-1, self.case.seq, 1)), -1)[None]

    def verify(self, formulation: Formulation, tolerances: dict[str, tuple[float, float]]) -> None:
        """Raises ValueError if the formulation's result is not that of torch in fp32."""
        tolerance = tolerances[self.case.dtype][self.case.backward]
        if self.case.dropout:
            if formulation.name == "ours":
                self._verify_dropout(formulation, tolerance)
            return  # which weights torch drops cannot be told
        for name, got, want in zip(RESULTS, self._results(formulation), self._expected(), strict=False):
            if self.case.packed:
                want = self.without_padding(want)
                got = got if formulation.packed else self.without_padding(got)
            error = (got.float() - want).abs().max() / want.abs().max()
            if not error <= tolerance:
                raise ValueError(
                    f"{self.case.name}: {name} of '{formulation.name}' is off by {error:.2e} of its maximum"
                )

    def _verify_dropout(self, ours: Formulation, tolerance: float) -> None:
        """The forward pass against the dense formula with the weights that it drops."""
        from flash_attn_ext.testing import dropout_mask, next_rng_state

        case = self.case
        state = next_rng_state()
        with torch.no_grad():
            got = ours.run_forward().float()
        kept = dropout_mask(state, case.batch, case.heads, case.seq, case.seq, case.dropout)
        scores = self.q.float() @ self.k.float().mT * case.dim**-0.5
        if case.causal:
            scores += additive(band_mask(case), torch.float32)
        want = (scores.softmax(-1) * kept / (1 - case.dropout)) @ self.v.float()
        error = (got - want).abs().max() / want.abs().max()
        if not error <= tolerance:
            raise ValueError(f"{case.name}: out of 'ours' is off by {error:.2e} of its maximum")

    def _results(self, formulation: Formulation) -> tuple[Tensor, ...]:
        if not self.case.backward:
            with torch.no_grad():
                return (formulation.run_forward(),)
        return (formulation.run_forward(), *formulation.backward_only(self.dout)())

    def _expected(self) -> tuple[Tensor, ...]:
        if not hasattr(self, "_reference"):
            exact = Problem.__new__(Problem)
            exact.case, exact.dtype = self.case, torch.float32
            exact.mask, exact.kv_lengths = self.mask, self.kv_lengths
            for name in ("q", "k", "v", "dout", "bias", "sinks"):
                value = getattr(self, name)
                setattr(exact, name, None if value is None else value.float())
            self._reference = exact._results(exact.theirs()[0])
        return self._reference


def as_bshd(x: Tensor) -> Tensor:
    """The same (batch, heads, seq, dim) tensor in the memory order (batch, seq, heads, dim)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _direct(**options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def _repeated(group: int, **options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """GQA with K and V repeated by hand."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def _with_sink_key(group: int, **options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A sink as one more key, of zeros, whose score the mask is; K and V repeated by hand."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.pad(t.repeat_interleave(group, dim=1), (0, 0, 0, 1)) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def _zero_padded(case: Case, **options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dv != D with the smaller of the two padded by zeros, which torch's fused kernel then takes."""
    widest = max(case.dim, case.value_dim)
    scale = case.dim**-0.5

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (F.pad(t, (0, widest - t.shape[-1])) if t.shape[-1] < widest else t for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **options)[..., : case.value_dim]

    return call
