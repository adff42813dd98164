"""Which places of a sequence a rank holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PLACEMENTS = {"contiguous": 0, "zigzag": 1, "striped": 2}


class Segment(NamedTuple):
    """`length` places from `start` on, every `step`-th."""

    start: int
    length: int
    step: int = 1


def segments(placement: str, rank: int, lengths: tuple[int, ...]) -> list[Segment]:
    """What a rank holds, in the order in which it holds it: places increase. `lengths`: of all ranks' parts.

    With P ranks, "contiguous" gives each a piece, "striped" rank r the places r, r + P, r + 2 P, ..., and
    "zigzag" the chunks r and 2 P - 1 - r of 2 P: of a triangle's rows each rank then has as much.
    """
    length, size = lengths[rank], len(lengths)
    if placement == "striped":
        return [Segment(rank, length, size)]
    if placement == "zigzag":
        half = length // 2
        return [Segment(rank * half, half), Segment((2 * size - 1 - rank) * half, half)]
    return [Segment(sum(lengths[:rank]), length)]


def check_lengths(name: str, placement: str, lengths: tuple[int, ...]) -> None:
    """Raises where the parts of a sequence, which the argument `name` holds, do not suit the placement."""
    if placement == "contiguous":
        return
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{name} must have parts of one length with placement={placement!r}, got {lengths} on the ranks"
        )
    if placement == "zigzag" and lengths[0] % 2:
        raise ValueError(
            f"{name} must have parts of an even length with placement='zigzag', got {lengths[0]}"
        )


def split_lengths(name: str, placement: str, total: int, size: int) -> tuple[int, ...]:
    """Lengths of the parts of a sequence: equal, but for "contiguous", whose first ones may have one more."""
    multiple = {"contiguous": 1, "striped": size, "zigzag": 2 * size}[placement]
    if total % multiple:
        raise ValueError(
            f"{name} must have a length that {multiple} divides, with placement={placement!r} on {size} "
            f"ranks, got {total}"
        )
    return tuple(total // size + (rank < total % size) for rank in range(size))


def places(placement: str, rank: int, lengths: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Of a rank's part: int64 (length,)."""
    found = segments(placement, rank, lengths)
    return torch.cat([s.start + s.step * torch.arange(s.length, device=device) for s in found])


def in_order(t: Tensor, axis: int, placement: str, lengths: tuple[int, ...]) -> Tensor:
    """The parts of all ranks, one behind the other, as the sequence that they are; differentiable."""
    if placement == "contiguous":
        return t
    return t.index_select(axis, _held(placement, lengths, t.device).argsort())


def in_parts(t: Tensor, axis: int, placement: str, lengths: tuple[int, ...]) -> Tensor:
    """`in_order` undone."""
    if placement == "contiguous":
        return t
    return t.index_select(axis, _held(placement, lengths, t.device))


def _held(placement: str, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.cat([places(placement, rank, lengths, device) for rank in range(len(lengths))])
