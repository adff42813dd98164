"""`head_parallel_attention`: every rank has everything and computes its own heads."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _errors, _extended, autograd, functional
from .._problem import LAYOUTS, heads_first, lse_dtype
from ..config import AttentionConfig
from ..masks import Mask
from ._group import Ranks, check_first_order
from ._heads import HeadShare, check_arguments, draw_for, facts_of, head_axis, own_mask, own_scores


def head_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    mask: Tensor | Mask | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
    config: AttentionConfig | None = None,
    check_ranks: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of replicated tensors, its heads shared out among the processes of a group.

    Each rank computes its share of the heads, and all get all of the output. What comes before and after is
    taken to be replicated: all ranks hold the same q, k, v and options, and do the same with the output. Then
    every rank ends up with the gradients of a single process, whole and counted once: the output's gradient
    is the same everywhere, a rank takes that of its heads and leaves the others' to the others, and what they
    find for q, k, v, bias, alibi_slopes and sinks is gathered (summed, where heads share a tensor). So
    nothing is to be reduced over the ranks afterwards, and a loss that differs between ranks gives gradients
    that are wrong.

    Args:
        q, k, v: as for `flash_attention`, whole and the same on every rank. The group's size P divides
            heads_q, and divides heads_kv or is a multiple of it.
        group: the processes; None is the default group. With one process this is `flash_attention`.
        dropout_p: as for `flash_attention`, drawn by each rank for its own heads from its own generator;
            ranks with the same seed draw differently.
        check_ranks: as for `ring_attention`. It compares shapes and options, not what the tensors hold.
        Others: as for `flash_attention`.

    Returns:
        out of all heads as `flash_attention` returns it, on every rank; with `return_lse` also the LSE.

    Raises:
        RuntimeError: torch.distributed is not there, or not initialised; or a peer did not answer in time.
        TypeError, ValueError, NotImplementedError: a wrong call, before anything is sent where one rank can
            see it; on all ranks where it takes two to see it.

    Example:
        >>> out = head_parallel_attention(q, k, v, causal=True)  # as flash_attention, in 1 / P of the time

    Source: the split of attention by heads of Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053, section 3.
    """
    a = _extended.Arguments(
        causal, scale, layout, mask, bias, window, softcap, alibi_slopes, sinks, kv_lengths, dropout_p,
        return_lse, deterministic, batch_invariant, backend, config,
    )  # fmt: skip
    check_arguments(q, k, v, a)
    ranks = Ranks.of(group)
    if ranks.size == 1:
        return functional.flash_attention(q, k, v, **a._asdict())
    if torch._C._is_any_autocast_enabled():
        q, k, v = autograd.autocast(q, k, v)
    options = _extended.options_of(q, k, a._replace(dropout_p=0.0), config or AttentionConfig())
    _errors.check_call(q, k, v, options)
    heads_q, heads_kv = (heads_first(t, LAYOUTS[layout]).shape[1] for t in (q, k))
    share = HeadShare(ranks.rank, ranks.size, heads_q, heads_kv)
    optional = {"bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    shapes = {"q": q, "k": k, "v": v, "mask": mask, "kv_lengths": kv_lengths, **optional}
    facts = {"q's dtype": q.dtype, **facts_of(a)}
    for name, t in shapes.items():
        facts[f"{name}'s shape"] = tuple(t.shape) if isinstance(t, Tensor) else None
    for name, t in {"q": q, "k": k, "v": v, **optional}.items():
        wanted = torch.is_grad_enabled() and t is not None and t.requires_grad
        facts[f"whether {name}'s gradient is asked for"] = wanted
    ranks.agree(facts, (), q.device, check_ranks)

    axis = _head_axis(q, layout)
    own = _OwnHeads.apply(ranks, share, axis, q, k, v, bias, alibi_slopes, sinks)
    a = a._replace(mask=own_mask(mask, share), bias=own[3], alibi_slopes=own[4], sinks=own[5])
    found = _extended.attention(*own[:3], a, draw=draw_for(ranks.rank))
    if not return_lse:
        return _AllHeads.apply(ranks, share, (axis,), found)[0]
    return _AllHeads.apply(ranks, share, (axis, found[1].dim() - 2), *found)


def _head_axis(t: Tensor, layout: str) -> int:
    """Of q, k or v; rank 2 has one head and no axis for it, which no group of more than one can share."""
    return t.dim() - (2 if layout == "bshd" else 3)


class _OwnHeads(torch.autograd.Function):
    """From replicated tensors to views of this rank's heads. One function: collectives come in one order."""

    @staticmethod
    def forward(ctx, ranks, share, axis, q, k, v, bias, alibi_slopes, sinks):
        ctx.set_materialize_grads(True)
        of_bias = None if bias is None else head_axis(bias)
        slopes = None if alibi_slopes is None else alibi_slopes.dim() - 1
        ctx.places = (axis, axis, axis, of_bias, slopes, 0)  # of the heads
        ctx.sharers = (1, share.sharers, share.sharers, 1, 1, 1)
        ctx.ranks = ranks
        return (
            share.own(q, axis),
            share.own_kv(k, axis),
            share.own_kv(v, axis),
            None if bias is None else own_scores(bias, share),
            None if alibi_slopes is None else share.own(alibi_slopes, slopes),
            None if sinks is None else share.own(sinks, 0),
        )

    @staticmethod
    def backward(ctx, *grads):
        check_first_order("head_parallel_attention")
        needed = ctx.needs_input_grad[3:]
        result = [None, None, None]
        for need, grad, axis, sharers in zip(needed, grads, ctx.places, ctx.sharers, strict=True):
            if not need:
                result.append(None)
            elif axis is None:  # all heads have one entry in common
                result.append(ctx.ranks.sum(grad.to(lse_dtype(grad), copy=True).contiguous()).to(grad.dtype))
            else:
                result.append(_gathered(ctx.ranks, grad, axis, sharers))
        return tuple(result)


class _AllHeads(torch.autograd.Function):
    """From each rank's heads to all of them, on every rank; gradients of the own ones come back."""

    @staticmethod
    def forward(ctx, ranks, share, axes, *tensors):
        ctx.share, ctx.axes = share, axes
        return tuple(_gathered(ranks, t, axis) for t, axis in zip(tensors, axes, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        check_first_order("head_parallel_attention")
        own = (ctx.share.own(g, axis).contiguous() for g, axis in zip(grads, ctx.axes, strict=True))
        return None, None, None, *own


def _gathered(ranks: Ranks, t: Tensor, axis: int, sharers: int = 1) -> Tensor:
    """The heads of all ranks, contiguous; those that `sharers` neighbours have in common are added up."""
    parts = ranks.gather(t.movedim(axis, 0).contiguous())  # (size, heads, ...)
    heads = parts.flatten(0, 1)
    if sharers > 1:
        heads = heads.unflatten(0, (-1, sharers)).sum(1, dtype=lse_dtype(t)).to(t.dtype)
    return heads.movedim(0, axis).contiguous()
