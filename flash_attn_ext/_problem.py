"""One attention call in canonical axes, for the backends made of plain torch operations."""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._options import Options
from ._philox import call_key, keep_tile

LAYOUTS = {"bshd": 0, "bhsd": 1}
# As "bhsd", and the axes of results are ordered in memory as those of the tensors that they belong to.
AS_GIVEN = "bhsd as given"
OPERATOR_LAYOUTS = {**LAYOUTS, AS_GIVEN: 2}


# Devices whose operators autocast knows; asking torch cannot be traced before torch 2.12.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations keep the dtypes that they are given."""
    if device.type in AUTOCAST_DEVICES:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def split(t: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    """`t.unflatten(axis, sizes)`, which batched derivatives in forward mode do not know."""
    return t.view(*t.shape[:axis], *sizes, *t.shape[axis + 1 :])


def heads_first(t: Tensor, layout: int) -> Tensor:
    """A rank 4, 3 or 2 tensor in `layout` as a (batch, heads, seq, dim) view."""
    if t.dim() == 2:
        return t[None, None]
    if layout == LAYOUTS["bshd"]:
        t = t.transpose(-3, -2)
    return t if t.dim() == 4 else t[None]


def stride_order(t: Tensor) -> list[int]:
    """The axes before the last, outermost first; as they come where strides leave it open. Its twin is
    sort_as_strides in csrc/torch/view.cpp."""
    order = list(range(t.dim() - 1))
    if t.stride(-1) != 1 or 0 in t.stride()[:-1]:
        return order
    wide = [axis for axis in order if t.shape[axis] > 1]
    for end in range(len(wide), 1, -1):  # bubble sort: comparing two strides can be traced, sort() cannot
        for i in range(1, end):
            if t.stride(wide[i - 1]) < t.stride(wide[i]):
                wide[i - 1], wide[i] = wide[i], wide[i - 1]
    return [wide.pop(0) if t.shape[axis] > 1 else axis for axis in order]


def new_result(of: Tensor, dim: int, layout: int) -> Tensor:
    """An operator's result that belongs to `of`, its last axis `dim`; not filled."""
    if layout != OPERATOR_LAYOUTS[AS_GIVEN] or dim != of.shape[-1]:
        return of.new_empty(*of.shape[:-1], dim)
    order = (*stride_order(of), of.dim() - 1)
    return torch.empty_permuted(of.shape, order, dtype=of.dtype, device=of.device)


def ordered_as(t: Tensor, of: Tensor, layout: int) -> Tensor:
    """`t`, contiguous, with the strides of such a result; differentiable."""
    if layout != OPERATOR_LAYOUTS[AS_GIVEN] or t.shape[-1] != of.shape[-1]:
        return t
    order = stride_order(of)
    if order == sorted(order):
        return t
    last = len(order)
    return t.permute(*order, last).contiguous().permute(*map(order.index, range(last)), last)


def lse_shape(q: Tensor, layout: int) -> tuple[int, ...]:
    """(batch, heads, seq) without the axes that q does not have."""
    if q.dim() == 2 or layout != LAYOUTS["bshd"]:
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
    return t[:, None] if t.shape[1] == 1 else split(t, 1, heads)


@dataclass
class Problem:
    """All tensors are views; sizes of 1 broadcast. `group` query heads share one K/V head."""

    q: Tensor  # (batch, heads_kv, group, seq_q, dim)
    k: Tensor  # (batch, heads_kv, seq_kv, dim)
    v: Tensor  # (batch, heads_kv, seq_kv, dim_v)
    mask: (
        Tensor | None
    )  # (batch, heads_kv, group, seq_q, seq_kv), bool, True = visible; or blocks of mask_block
    bias: Tensor | None  # same axes, floating
    kv_lengths: Tensor | None  # (batch, 1, 1, 1, 1)
    slopes: Tensor | None  # (batch or 1, heads_kv, group, 1, 1)
    sinks: Tensor | None  # (heads_kv, group, 1, 1)
    labels: Tensor | None  # (n, batch or 1, 1, 1, seq_q, 1)
    bounds: Tensor | None  # (n, batch or 1, 1, 1, 1, seq_kv, 2)
    mask_block: tuple[int, int]
    shift: int  # query i stands at the place of key i + shift
    lowest: int | None  # query i sees keys in [i + lowest, i + highest]; None is unbounded
    highest: int | None
    scale: float
    softcap: float
    dropout_p: float
    dropout_key: list[Tensor] | None
    first_batch: int  # the place of batch 0 in the caller's batch

    @classmethod
    def make(cls, q: Tensor, k: Tensor, v: Tensor, options: Options, first_batch: int = 0) -> Problem:
        """q, k, v: (batch, heads, seq, dim) each; `options` are for these, their layout and packing apart."""
        o = options
        heads_kv = k.shape[1]
        heads = (heads_kv, q.shape[1] // heads_kv if heads_kv else 0)
        shift = k.shape[2] - q.shape[2]
        highest = shift + o.window_right if o.window_right >= 0 else None
        if o.causal:
            diagonal = shift if o.causal == 1 else 0
            highest = diagonal if highest is None else min(highest, diagonal)
        slopes, sinks, labels, bounds = o.alibi_slopes, o.sinks, o.row_labels, o.key_bounds
        if slopes is not None:
            slopes = split(slopes if slopes.dim() == 2 else slopes[None], 1, heads)[..., None, None]
        return cls(
            q=split(q, 1, heads) if heads_kv else q[:, :, None],
            k=k,
            v=v,
            mask=_scores_view(o.mask, heads),
            bias=_scores_view(o.bias, heads),
            kv_lengths=None if o.kv_lengths is None else o.kv_lengths[:, None, None, None, None],
            slopes=slopes,
            sinks=None if sinks is None else split(sinks, 0, heads)[..., None, None],
            labels=None if labels is None else labels[:, :, None, None, :, None],
            bounds=None if bounds is None else bounds[:, :, None, None, None],
            mask_block=(o.mask_block_q, o.mask_block_kv),
            shift=shift,
            lowest=shift - o.window_left if o.window_left >= 0 else None,
            highest=highest,
            scale=1 / math.sqrt(q.shape[3]) if o.scale is None else o.scale,
            softcap=o.softcap,
            dropout_p=o.dropout_p,
            dropout_key=call_key(o.rng_state) if o.dropout_p else None,
            first_batch=first_batch,
        )

    def has_work(self) -> bool:
        """False when the output is empty, or 0 for want of keys."""
        return self.q.shape[:4].numel() > 0 and self.k.shape[2] > 0

    def rows(self, t: Tensor) -> Tensor:
        """A (batch, heads_q, seq_q, ...) tensor with its heads split like q's."""
        return split(t, 1, tuple(self.q.shape[1:3]))

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
            tile = also(self._mask_tile(q_begin, q_end, k_begin, k_end))
        if self.labels is not None:
            label = self.labels[..., q_begin:q_end, :]
            low, high = self.bounds[..., k_begin:k_end, :].unbind(-1)
            tile = also(((low <= label) & (label < high)).all(0))
        if self.bias is not None:
            tile = also(tile_of(self.bias, q_begin, q_end, k_begin, k_end) != -math.inf)
        return tile

    def _mask_tile(self, q_begin: int, q_end: int, k_begin: int, k_end: int) -> Tensor:
        mask = self.mask
        if self.mask_block == (1, 1):
            return tile_of(mask, q_begin, q_end, k_begin, k_end)
        ranges = ((-2, q_begin, q_end), (-1, k_begin, k_end))
        for (axis, begin, end), block in zip(ranges, self.mask_block, strict=True):
            if mask.shape[axis] != 1:
                mask = mask.index_select(axis, torch.arange(begin, end, device=mask.device) // block)
        return mask

    def distance(self, q_begin: int, q_end: int, k_begin: int, k_end: int, dtype: torch.dtype) -> Tensor:
        """|i + shift - j| of a tile, which ALiBi's slopes multiply: (queries, keys)."""
        query = torch.arange(q_begin + self.shift, q_end + self.shift, device=self.q.device)
        return (query[:, None] - torch.arange(k_begin, k_end, device=self.q.device)).abs().to(dtype)

    def kept(self, q_begin: int, q_end: int, k_begin: int, k_end: int) -> Tensor | None:
        """What dropout leaves of a tile: bool (batch, heads_kv, group, queries, keys); None: all."""
        if self.dropout_key is None:
            return None
        batch, heads_kv, group = self.q.shape[:3]
        batches = range(self.first_batch, self.first_batch + batch)
        place = (batches, range(heads_kv * group), range(q_begin, q_end), range(k_begin, k_end))
        return split(keep_tile(self.dropout_key, self.dropout_p, *place), 1, (heads_kv, group))

    @property
    def dropout_scale(self) -> float:
        """What is kept counts this many times."""
        return 1 / (1 - self.dropout_p)


class Part(NamedTuple):
    """One of the problems that a call consists of, and its place in the axes of sequence."""

    problem: Problem
    queries: slice
    keys: slice


def parts(q: Tensor, k: Tensor, v: Tensor, options: Options, only: int | None = None) -> list[Part]:
    """A call as problems: one, or one for each packed sequence (or just sequence `only`). Everything in
    them is a view.

    Raises:
        ValueError: cu_seqlens_q or cu_seqlens_k holds what cannot be. To read them waits for their device.
    """
    q, k, v = (heads_first(t, options.layout) for t in (q, k, v))
    if options.cu_seqlens_q is None:
        return [Part(Problem.make(q, k, v, options), slice(None), slice(None))]
    all_queries = _sequences("cu_seqlens_q", options.cu_seqlens_q, q.shape[2], options.max_seqlen_q)
    all_keys = _sequences("cu_seqlens_k", options.cu_seqlens_k, k.shape[2], options.max_seqlen_k)
    found = []
    for b, (queries, keys) in enumerate(zip(all_queries, all_keys, strict=True)):
        if only not in (None, b):
            continue
        own = _options_of(options, b, queries.stop - queries.start, keys.stop - keys.start)
        tensors = (t[:, :, place] for t, place in ((q, queries), (k, keys), (v, keys)))
        found.append(Part(Problem.make(*tensors, own, b), queries, keys))
    return found


def _sequences(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> list[slice]:
    """The rows of each sequence."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name} must start with 0, got {bounds[0]}")
    if bounds[-1] > total:
        raise ValueError(f"{name} ends with {bounds[-1]}, past the {total} rows that there are")
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end < begin:
            raise ValueError(f"{name} must not decrease, got {begin} and then {end} at index {b + 1}")
        if 0 <= max_seqlen < end - begin:
            raise ValueError(
                f"{name} has a sequence of length {end - begin}, max_seqlen{name[-2:]} is {max_seqlen}"
            )
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _options_of(options: Options, b: int, seq_q: int, seq_kv: int) -> Options:
    """Those of sequence `b`."""

    def own(t: Tensor | None, axis: int) -> Tensor | None:
        """The entry of the batch, which broadcasts where there is but one."""
        return t if t is None or t.shape[axis] == 1 else t.narrow(axis, b, 1)

    def scores(t: Tensor | None, block_q: int = 1, block_kv: int = 1) -> Tensor | None:
        if t is None:
            return None
        return tile_of(own(t[(None,) * (4 - t.dim())], 0), 0, -(-seq_q // block_q), 0, -(-seq_kv // block_kv))

    slopes, labels, bounds = options.alibi_slopes, own(options.row_labels, 1), own(options.key_bounds, 1)
    return options._replace(
        mask=scores(options.mask, options.mask_block_q, options.mask_block_kv),
        bias=scores(options.bias),
        kv_lengths=None if options.kv_lengths is None else options.kv_lengths[b : b + 1],
        alibi_slopes=own(slopes, 0) if slopes is not None and slopes.dim() == 2 else slopes,
        row_labels=None if labels is None else labels[:, :, :seq_q],
        key_bounds=None if bounds is None else bounds[:, :, :seq_kv],
    )


def tile_of(t: Tensor, q_begin: int, q_end: int, k_begin: int, k_end: int) -> Tensor:
    """The queries and keys of a tensor whose last two axes may be of size 1."""
    if t.shape[-2] != 1:
        t = t.narrow(-2, q_begin, q_end - q_begin)
    return t if t.shape[-1] == 1 else t.narrow(-1, k_begin, k_end - k_begin)


def fold(t: Tensor) -> Tensor:
    """(batch, heads_kv, group, rows, n) -> (batch, heads_kv, group * rows, n): a group shares its keys."""
    batch, heads_kv, group, rows, n = t.shape
    return t.reshape(batch, heads_kv, group * rows, n)


def unfold(t: Tensor, group: int) -> Tensor:
    """`fold` undone."""
    return split(t, 2, (group, t.shape[2] // group))


def is_finite(t: Tensor) -> bool:
    """False also where there is no asking: in a trace, under vmap, or where it would wait for a device."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or t.device.type != "cpu":
        return False
    try:
        return bool(t.isfinite().all())
    except RuntimeError:  # a batch of torch.autograd's own vmap, or a trace of make_fx: there are no values
        return False


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
