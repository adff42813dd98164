"""One attention call in canonical axes, for the backends made of plain torch operations."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = {"bshd": 0, "bhsd": 1}


# Devices whose operators autocast knows; asking torch cannot be traced before torch 2.12.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations keep the dtypes that they are given."""
    if device.type in AUTOCAST_DEVICES:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def heads_first(t: Tensor, layout: int) -> Tensor:
    """A rank 4, 3 or 2 tensor in `layout` as a (batch, heads, seq, dim) view."""
    if t.dim() == 2:
        return t[None, None]
    if layout == LAYOUTS["bshd"]:
        t = t.transpose(-3, -2)
    return t if t.dim() == 4 else t[None]


def lse_shape(q: Tensor, layout: int) -> tuple[int, ...]:
    """(batch, heads, seq) without the axes that q does not have."""
    if q.dim() == 2 or layout == LAYOUTS["bhsd"]:
        return tuple(q.shape[:-1])
    *batch, seq, heads, _ = q.shape
    return (*batch, heads, seq)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def kernel_lse_dtype(q: Tensor) -> torch.dtype:
    """What the operators keep for backward; see lse_dtype in csrc/core/problem.h. MPS has no float64."""
    wide = q.dtype == torch.float64 or (q.dtype == torch.float32 and q.device.type != "mps")
    return torch.float64 if wide else torch.float32


def _scores_view(t: Tensor | None, heads: tuple[int, int]) -> Tensor | None:
    """A tensor that broadcasts to (batch, heads_q, seq_q, seq_kv), with heads_q split into `heads`."""
    if t is None:
        return None
    t = t[(None,) * (4 - t.dim())]
    return t[:, None] if t.shape[1] == 1 else t.unflatten(1, heads)


@dataclass
class Problem:
    """All tensors are views; sizes of 1 broadcast. `group` query heads share one K/V head."""

    q: Tensor  # (batch, heads_kv, group, seq_q, dim)
    k: Tensor  # (batch, heads_kv, seq_kv, dim)
    v: Tensor  # (batch, heads_kv, seq_kv, dim_v)
    mask: Tensor | None  # (batch, heads_kv, group, seq_q, seq_kv), bool, True = visible
    bias: Tensor | None  # same axes, floating
    kv_lengths: Tensor | None  # (batch, 1, 1, 1, 1)
    lowest: int | None  # query i sees keys in [i + lowest, i + highest]; None is unbounded
    highest: int | None
    scale: float
    softcap: float

    @classmethod
    def make(
        cls, q, k, v, mask, bias, kv_lengths, layout, causal, window_left, window_right, scale, softcap
    ) -> Problem:
        q, k, v = (heads_first(t, layout) for t in (q, k, v))
        heads_kv = k.shape[1]
        heads = (heads_kv, q.shape[1] // heads_kv if heads_kv else 0)
        shift = k.shape[2] - q.shape[2]
        highest = shift + window_right if window_right >= 0 else None
        if causal:
            diagonal = shift if causal == 1 else 0
            highest = diagonal if highest is None else min(highest, diagonal)
        return cls(
            q=q.unflatten(1, heads) if heads_kv else q[:, :, None],
            k=k,
            v=v,
            mask=_scores_view(mask, heads),
            bias=_scores_view(bias, heads),
            kv_lengths=None if kv_lengths is None else kv_lengths[:, None, None, None, None],
            lowest=shift - window_left if window_left >= 0 else None,
            highest=highest,
            scale=1 / math.sqrt(q.shape[3]) if scale is None else scale,
            softcap=softcap,
        )

    def has_work(self) -> bool:
        """False when the output is empty, or 0 for want of keys."""
        return self.q.shape[:4].numel() > 0 and self.k.shape[2] > 0

    def rows(self, t: Tensor) -> Tensor:
        """A (batch, heads_q, seq_q, ...) tensor with its heads split like q's."""
        return t.unflatten(1, tuple(self.q.shape[1:3]))

    def visible_keys(self, q_begin: int, q_end: int) -> tuple[int, int]:
        """Keys that at least one of these queries may see, by the band alone."""
        seq_kv = self.k.shape[2]
        begin = 0 if self.lowest is None else max(0, q_begin + self.lowest)
        end = seq_kv if self.highest is None else min(seq_kv, q_end + self.highest)
        return begin, max(begin, end)

    def visible(self, q_begin: int, q_end: int, k_begin: int, k_end: int) -> Tensor | None:
        """Bool tile that broadcasts to (batch, heads_kv, group, queries, keys); None: all True."""
        device = self.q.device
        tile = None

        def also(more: Tensor) -> Tensor:
            return more if tile is None else tile & more

        key = torch.arange(k_begin, k_end, device=device)
        query = torch.arange(q_begin, q_end, device=device)[:, None]
        if self.lowest is not None and k_begin < q_end - 1 + self.lowest:
            tile = also(key >= query + self.lowest)
        if self.highest is not None and k_end - 1 > q_begin + self.highest:
            tile = also(key <= query + self.highest)
        if self.kv_lengths is not None:
            tile = also(key < self.kv_lengths)
        if self.mask is not None:
            tile = also(tile_of(self.mask, q_begin, q_end, k_begin, k_end))
        if self.bias is not None:
            tile = also(tile_of(self.bias, q_begin, q_end, k_begin, k_end) != -math.inf)
        return tile


def tile_of(t: Tensor, q_begin: int, q_end: int, k_begin: int, k_end: int) -> Tensor:
    """The queries and keys of a tensor whose last two axes may be of size 1."""
    if t.shape[-2] != 1:
        t = t[..., q_begin:q_end, :]
    return t if t.shape[-1] == 1 else t[..., k_begin:k_end]


def is_finite(t: Tensor) -> bool:
    """False also where there is no asking: in a trace, under vmap, or where it would wait for a device."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return t.device.type == "cpu" and bool(t.isfinite().all())


def contract(weights: Tensor, seen: Tensor | None, values: Tensor) -> Tensor:
    """weights @ values, in which `values[k]` does not reach rows r with `seen[r, k]` False.

    Such weights are 0 already; this matters when the value is infinite or NaN, for then
    0 * value is NaN. What is seen follows IEEE arithmetic. `seen` None: no care needed.
    weights, seen: (..., rows, keys); values: (..., keys, columns).
    """
    if seen is None or is_finite(values):
        return weights @ values
    product = weights @ values.masked_fill(~values.isfinite(), 0)
    # Infinities count +1 or -1: a row whose products are all of one sign keeps it.
    dtype = product.dtype
    signs = weights.sign().nan_to_num(0)
    infinite = values.isinf().to(dtype)
    total = signs.abs() @ infinite
    net = signs @ (infinite * values.sign().nan_to_num(0))
    undefined = seen.to(dtype) @ values.isnan().to(dtype) + (seen & (signs == 0)).to(dtype) @ infinite
    product = product.where(total == 0, product + (net / total) * math.inf)
    # net / total is 1 or -1 for one sign; in between, infinities of both signs met.
    return product.masked_fill((undefined > 0) | (net.abs() != total), math.nan)
