"""Whole sequences into parts, one for each rank, and back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _errors
from . import _placement
from ._group import Ranks


def shard_sequence(
    x: Tensor, dim: int = 1, *, group: dist.ProcessGroup | None = None, placement: str = "contiguous"
) -> Tensor:
    """This rank's part of a sequence that all ranks hold.

    Args:
        x: any shape and dtype, the same on every rank.
        dim: the axis of the sequence; 1 is that of layout "bshd".
        group: the processes; None is the default group.
        placement: with P ranks, "contiguous" gives rank r the r-th piece (of lengths that differ by one at
            most); "zigzag" the chunks r and 2 P - 1 - r of 2 P; "striped" the places r, r + P, r + 2 P, ...

    Returns:
        A contiguous copy, differentiable: the parts' gradients are gathered, so that each rank has the whole
        gradient of x, as if it had computed everything by itself.

    Raises:
        RuntimeError: torch.distributed is not there, or not initialised.
        TypeError, ValueError: a wrong argument, or a length that the placement cannot divide.

    Example:
        >>> tokens = shard_sequence(tokens, placement="zigzag")  # (batch, seq) to (batch, seq / P)
        >>> places = shard_sequence(torch.arange(seq), 0, placement="zigzag")  # for a rotary embedding
    """
    dim = _checked(x, dim, placement)
    ranks = Ranks.of(group)
    lengths = _placement.split_lengths(f"x's axis {dim}", placement, x.shape[dim], ranks.size)
    return _Shard.apply(x, dim, ranks, placement, lengths)


def gather_sequence(
    x: Tensor,
    dim: int = 1,
    *,
    group: dist.ProcessGroup | None = None,
    placement: str = "contiguous",
    check_ranks: bool | None = None,
) -> Tensor:
    """The sequence of which every rank holds a part: `shard_sequence` undone.

    Args:
        x: this rank's part; with "contiguous" its length may be its own.
        dim, group, placement: as for `shard_sequence`.
        check_ranks: as for `ring_attention`.

    Returns:
        The whole sequence on every rank, contiguous and differentiable. What is done with it is taken to be
        done by all ranks alike: the gradient of a part is its part of this rank's gradient, and is not summed
        over the ranks, which would count it P times.

    Raises:
        RuntimeError: torch.distributed is not there, or not initialised.
        TypeError, ValueError: a wrong argument, or parts that do not fit together; the latter on all ranks.

    Example:
        >>> out = gather_sequence(ring_attention(q, k, v, placement="zigzag"), placement="zigzag")
    """
    dim = _checked(x, dim, placement)
    ranks = Ranks.of(group)
    rest = (*x.shape[:dim], *x.shape[dim + 1 :])
    facts = {"x's other axes": rest, "x's dtype": x.dtype, "dim": dim, "placement": placement,
             "whether gradients are asked for": torch.is_grad_enabled() and x.requires_grad}  # fmt: skip
    lengths = tuple(n for (n,) in ranks.agree(facts, (x.shape[dim],), x.device, check_ranks))
    _placement.check_lengths(f"x's axis {dim}", placement, lengths)
    return _Gather.apply(x, dim, ranks, placement, lengths)


def _checked(x: object, dim: object, placement: object) -> int:
    """`dim`, counted from 0."""
    _errors.check_tensor("x", x)
    _errors.choice("placement", placement, _placement.PLACEMENTS)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be an axis of x of shape {tuple(x.shape)}, got {dim}")
    return dim % x.dim()


def _part(x: Tensor, dim: int, ranks: Ranks, placement: str, lengths: tuple[int, ...]) -> Tensor:
    if placement == "contiguous":
        return x.narrow(dim, sum(lengths[: ranks.rank]), lengths[ranks.rank]).contiguous()
    return x.index_select(dim, _placement.places(placement, ranks.rank, lengths, x.device))


def _whole(x: Tensor, dim: int, ranks: Ranks, placement: str, lengths: tuple[int, ...]) -> Tensor:
    # A collective has tensors of one shape: shorter parts go with rows behind them that nobody looks at.
    rows = x.movedim(dim, 0)
    padded = rows.new_empty(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = ranks.gather(padded)
    whole = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
    return _placement.in_order(whole, 0, placement, lengths).movedim(0, dim).contiguous()


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *how):
        ctx.how = how
        return _part(x, *how)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, *ctx.how), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *how):
        ctx.how = how
        return _whole(x, *how)

    @staticmethod
    def backward(ctx, grad):
        return _Shard.apply(grad, *ctx.how), None, None, None, None
