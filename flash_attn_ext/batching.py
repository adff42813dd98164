"""The operators under torch.func.vmap: samples of which each has its own q, k and v are one larger batch, and
others one call each."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from ._options import Options
from ._problem import LAYOUTS

# An option with one entry for every batch: the axis of batches, where it has so many axes.
_BATCH_AXIS = {
    "mask": (0, 4),
    "bias": (0, 4),
    "alibi_slopes": (0, 2),
    "row_labels": (1, 3),
    "key_bounds": (1, 4),
}


def _is_one_batch(options: Options, dims: dict[str, int | None]) -> bool:
    """Whether the options stay what they are when samples become batches."""
    if any(dim is not None for dim in dims.values()):
        return False
    if any(t is not None for t in (options.kv_lengths, options.rng_state, options.cu_seqlens_q)):
        return False  # each has something to say of a place in the batch
    given = ((getattr(options, name), *place) for name, place in _BATCH_AXIS.items())
    return not any(t is not None and t.dim() == rank and t.shape[axis] != 1 for t, axis, rank in given)


class _Merged:
    """Samples as batches, and back."""

    def __init__(self, q: Tensor, options: Options):
        """q: of all samples, the first axis."""
        self.samples, self.rank, self.batch = q.shape[0], q.dim() - 1, q.shape[1]
        self.heads_axis = 2 if options.layout == LAYOUTS["bshd"] else 1

    def merge(self, t: Tensor) -> Tensor:
        """(samples, ...) of a tensor with heads as one batch of rank 4."""
        if self.rank == 4:
            return t.flatten(0, 1)
        return t if self.rank == 3 else t.unsqueeze(self.heads_axis)

    def merge_lse(self, t: Tensor) -> Tensor:
        if self.rank == 4:
            return t.flatten(0, 1)
        return t if self.rank == 3 else t.unsqueeze(1)

    def split(self, t: Tensor) -> Tensor:
        """`merge` undone, for a result that has this many batches."""
        if self.rank == 4:
            return t.unflatten(0, (self.samples, self.batch))
        return t if self.rank == 3 else t.squeeze(self.heads_axis)

    def split_lse(self, t: Tensor) -> Tensor:
        if self.rank == 4:
            return t.unflatten(0, (self.samples, self.batch))
        return t if self.rank == 3 else t.squeeze(1)


def _first(t: Tensor, dim: int | None, samples: int) -> Tensor:
    """Its samples as the first axis."""
    return t.expand(samples, *t.shape) if dim is None else t.movedim(dim, 0)


def _each(operator: Callable, samples: int, in_dims: tuple, arguments: tuple) -> tuple[tuple, tuple]:
    """A call for each sample."""

    def of(n: int) -> list:
        return [a if dim is None else a.movedim(dim, 0)[n] for a, dim in zip(arguments, in_dims, strict=True)]

    if samples == 0:  # one of zeros tells the shapes
        zeros = [
            a if dim is None else a.new_zeros(a.movedim(dim, 0).shape[1:])
            for a, dim in zip(arguments, in_dims, strict=True)
        ]
        found = [t.new_empty(0, *t.shape) for t in operator(*zeros)]
    else:
        found = [torch.stack(ts) for ts in zip(*(operator(*of(n)) for n in range(samples)), strict=True)]
    return tuple(found), (0,) * len(found)


def register(operators: ops.Operators) -> None:
    family = operators.family

    def read(arguments: tuple, dims: tuple) -> tuple[Options, dict[str, int | None]]:
        options, _ = family.read(arguments)
        return options, dict(zip(family.tensors, dims, strict=False))

    def forward(operator, info, in_dims, q, k, v, *rest):
        options, dims = read(rest, in_dims[3:])
        samples = info.batch_size
        if samples == 0 or None in in_dims[:3] or not _is_one_batch(options, dims):
            return _each(operator, samples, in_dims, (q, k, v, *rest))
        q, k, v = (_first(t, dim, samples) for t, dim in zip((q, k, v), in_dims, strict=False))
        merged = _Merged(q, options)
        out, lse = operator(*map(merged.merge, (q, k, v)), *rest)
        if lse.dim() == 1:  # not asked for
            return (merged.split(out), lse), (0, None)
        return (merged.split(out), merged.split_lse(lse)), (0, 0)

    def backward(info, in_dims, dout, dlse, q, k, v, out, lse, *rest):
        options, dims = read(rest, in_dims[7:])
        samples = info.batch_size
        needs = rest[len(family.options) : len(family.options) + len(family.differentiable)]
        if samples == 0 or None in in_dims[2:7] or any(needs) or not _is_one_batch(options, dims):
            return _each(operators.backward, samples, in_dims, (dout, dlse, q, k, v, out, lse, *rest))
        dout, q, k, v, out, lse = (
            _first(t, dim, samples)
            for t, dim in zip((dout, q, k, v, out, lse), (in_dims[0], *in_dims[2:7]), strict=True)
        )
        merged = _Merged(q, options)
        if dlse is not None:
            dlse = merged.merge_lse(_first(dlse, in_dims[1], samples))
        dout, q, k, v, out = map(merged.merge, (dout, q, k, v, out))
        dq, dk, dv, *others = operators.backward(dout, dlse, q, k, v, out, merged.merge_lse(lse), *rest)
        return (*map(merged.split, (dq, dk, dv)), *others), (0, 0, 0, *(None for _ in others))

    for operator in (operators.attention, operators.forward):
        torch.library.register_vmap(operator, functools.partial(forward, operator))
    torch.library.register_vmap(operators.backward, backward)
