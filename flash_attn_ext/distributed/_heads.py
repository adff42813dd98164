"""Which heads a rank computes, and the options of a call for these."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .. import masks
from .._extended import Arguments, check_dropout
from .._philox import draw_state, state_of
from .._run import check_constants, check_types
from .._windows import window_bounds


@dataclass(frozen=True)
class HeadShare:
    """The share of `rank` in a group of `size`: as many query heads as others, and their K/V heads."""

    rank: int
    size: int
    heads_q: int
    heads_kv: int

    def __post_init__(self) -> None:
        if self.heads_q % self.size:
            raise ValueError(
                f"q must have heads that the group's size, {self.size}, divides, got {self.heads_q}"
            )
        if self.heads_kv % self.size and self.size % self.heads_kv:
            raise ValueError(
                f"k must have heads that are a multiple of the group's size, {self.size}, or divide it, "
                f"got {self.heads_kv}"
            )

    @property
    def sharers(self) -> int:
        """Ranks that need the same K/V head; neighbours."""
        return max(1, self.size // self.heads_kv) if self.heads_kv else 1

    def own(self, t: Tensor, axis: int) -> Tensor:
        """The query heads of this rank, a view."""
        count = t.shape[axis] // self.size
        return t.narrow(axis, self.rank * count, count)

    def own_kv(self, t: Tensor, axis: int) -> Tensor:
        """The K/V heads of this rank, a view."""
        if self.sharers == 1:
            return self.own(t, axis)
        return t.narrow(axis, self.rank // self.sharers, 1)


def head_axis(t: Tensor) -> int | None:
    """That of a tensor which broadcasts to (batch, heads_q, seq_q, seq_kv); None: heads share an entry."""
    axis = t.dim() - 3
    return axis if axis >= 0 and t.shape[axis] != 1 else None


def own_scores(t: Tensor, share: HeadShare) -> Tensor:
    axis = head_axis(t)
    return t if axis is None else share.own(t, axis)


def own_mask(mask: Tensor | masks.Mask | None, share: HeadShare) -> Tensor | masks.Mask | None:
    """A mask for the heads of this rank; of the typed ones two kinds may tell heads apart."""
    if isinstance(mask, Tensor):
        return own_scores(mask, share)
    if isinstance(mask, masks.CombinedMask):
        return masks.CombinedMask(tuple(own_mask(part, share) for part in mask.parts))
    if isinstance(mask, masks.DenseMask):
        return replace(mask, seen=own_scores(mask.seen, share))
    if isinstance(mask, masks.BlockSparseMask):
        return replace(mask, blocks=own_scores(mask.blocks, share))
    return mask


def check_arguments(q: object, k: object, v: object, a: Arguments) -> None:
    """Raises for what `flash_attention` would not take either, as far as it is no matter of shapes."""
    mask = None if isinstance(a.mask, masks.Mask) else a.mask
    tensors = (mask, a.bias, a.kv_lengths, None, a.alibi_slopes, a.sinks)
    check_types(q, k, v, tensors, a.layout, a.causal, a.scale, a.softcap, a.config)
    check_constants(scale=a.scale, softcap=a.softcap)
    for name, t in {"q": q, "k": k, "v": v}.items():
        if t.dim() not in (2, 3, 4):
            raise ValueError(f"{name} must have rank 2, 3 or 4, got shape {tuple(t.shape)}")
    if a.deterministic is not None and not isinstance(a.deterministic, bool):
        raise TypeError(f"deterministic must be a bool or None, got {a.deterministic!r}")
    check_dropout(a.dropout_p)
    if a.window is not None:
        window_bounds(a.window)


def draw_for(rank: int):
    """The state of a dropout, another on each rank even where all have the same seed: the kernels number the
    heads that they are given from 0."""

    def draw(device) -> Tensor:
        return state_of(draw_state(device), rank)

    return draw


def facts_of(a: Arguments) -> dict[str, object]:
    """What all ranks have to be told alike, beyond shapes."""
    given = ("mask", "bias", "kv_lengths", "alibi_slopes", "sinks")
    return {
        **{name: getattr(a, name) for name in ("causal", "layout", "window", "batch_invariant")},
        **{name: float(getattr(a, name)) for name in ("softcap", "dropout_p")},
        "scale": None if a.scale is None else float(a.scale),
        **{f"whether {name} is given": getattr(a, name) is not None for name in given},
    }
