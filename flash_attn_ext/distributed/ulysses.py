"""`ulysses_attention`: from parts of the sequence to shares of the heads, and back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _errors, _extended, autograd, functional
from .._problem import LAYOUTS, heads_first, lse_dtype
from ..config import AttentionConfig
from ..masks import Mask
from . import _placement
from ._group import Ranks
from ._heads import HeadShare, check_arguments, draw_for, facts_of, own_mask, own_scores


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    *,
    group: dist.ProcessGroup | None = None,
    placement: str = "contiguous",
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
    """Exact attention over a sequence of which every process of a group holds a part: each computes some of
    the heads, over the whole sequence.

    One exchange brings a rank all places of its heads, `flash_attention` computes them, and another exchange
    brings the results back; the gradients go the same ways. A rank sends and keeps what it was given, no
    more, as long as there are K/V heads for all ranks; else ranks share them, and each gets a copy. All ranks
    must call it alike, forward and backward.

    Args:
        q: this rank's places, (batch, seq_q / P, heads_q, dim) in a group of P, which divides heads_q.
        k, v: (batch, seq_kv / P, heads_kv, dim or dim_v); P divides heads_kv, or is a multiple of it.
        causal, scale, layout, window, softcap, deterministic, batch_invariant, backend, config: as for
            `flash_attention`. Rank 3 too.
        group: the processes; None is the default group. With one process this is `flash_attention`.
        placement: which places a rank holds, see `shard_sequence`. "contiguous" parts may have any lengths.
        mask, bias, kv_lengths, alibi_slopes, sinks: as for `flash_attention`, of the whole sequence and all
            heads, the same on each rank.
        dropout_p: as for `flash_attention`, drawn by each rank for its own heads from its own generator;
            ranks with the same seed draw differently.
        return_lse: also return the log-sum-exp of this rank's rows.
        check_ranks: as for `ring_attention`.

    Returns:
        out like q with v's last axis, contiguous; with `return_lse` also (batch, heads_q, seq_q / P) float32
        (float64 for float64). Differentiable as `flash_attention`. Gradients of q, k and v are whole; those
        of bias, alibi_slopes and sinks are of this rank's heads (0 for others), to be summed over the ranks
        as those of any parameter of the model.

    Raises:
        RuntimeError: torch.distributed is not there, or not initialised; or a peer did not answer in time.
        TypeError, ValueError, NotImplementedError: a wrong call, before anything is sent where one rank can
            see it; on all ranks where it takes two to see it.

    Example:
        >>> q, k, v = (shard_sequence(t) for t in (q, k, v))
        >>> out = ulysses_attention(q, k, v, causal=True, alibi_slopes=slopes)

    Source: Jacobs et al., DeepSpeed Ulysses, 2023, arXiv:2309.14509.
    """
    a = _extended.Arguments(
        causal, scale, layout, mask, bias, window, softcap, alibi_slopes, sinks, kv_lengths, dropout_p,
        return_lse, deterministic, batch_invariant, backend, config,
    )  # fmt: skip
    check_arguments(q, k, v, a)
    _errors.choice("placement", placement, _placement.PLACEMENTS)
    ranks = Ranks.of(group)
    if ranks.size == 1:
        return functional.flash_attention(q, k, v, **a._asdict())
    if torch._C._is_any_autocast_enabled():
        q, k, v = autograd.autocast(q, k, v)
    rows = [_sequence_first(t, a.layout) for t in (q, k, v)]
    (seq_q, batch, heads_q, dim), (seq_kv, _, heads_kv, _) = rows[0].shape, rows[1].shape
    _check_shapes(q, k, v, a._replace(mask=None, bias=None), seq_q, seq_kv)
    share = HeadShare(ranks.rank, ranks.size, heads_q, heads_kv)
    facts = {
        "the rank of q": q.dim(), "q's batch": batch, "q's heads": heads_q, "k's heads": heads_kv,
        "q's dim": dim, "v's dim": v.shape[-1], "q's dtype": q.dtype, "placement": placement, **facts_of(a),
    }  # fmt: skip
    for name, t in {"q": q, "k": k, "v": v}.items():
        facts[f"whether {name}'s gradient is asked for"] = torch.is_grad_enabled() and t.requires_grad
    lengths_q, lengths_kv = zip(*ranks.agree(facts, (seq_q, seq_kv), q.device, check_ranks), strict=True)
    for name, lengths in (("q", lengths_q), ("k", lengths_kv)):
        _placement.check_lengths(name, placement, lengths)
    _check_shapes(q, k, v, a, sum(lengths_q), sum(lengths_kv))

    ways = (_Way(ranks, share, lengths_q), *[_Way(ranks, share, lengths_kv, share.sharers)] * 2)
    moved = _Move.apply(ways, True, *rows)
    whole = (_placement.in_order(t, 0, placement, way.lengths) for t, way in zip(moved, ways, strict=True))
    own = a._replace(
        layout="bshd",
        mask=own_mask(mask, share),
        bias=None if bias is None else own_scores(bias, share),
        alibi_slopes=None if alibi_slopes is None else share.own(alibi_slopes, alibi_slopes.dim() - 1),
        sinks=None if sinks is None else share.own(sinks, 0),
    )
    found = _extended.attention(*(t.transpose(0, 1) for t in whole), own, draw=draw_for(ranks.rank))
    # (batch, seq, heads, dim_v), and an LSE (batch, heads, seq) as one of dim 1.
    out, lse = found if return_lse else (found, None)
    results = (out.transpose(0, 1), *(() if lse is None else (lse.permute(2, 0, 1)[..., None],)))
    parts = [_placement.in_parts(t, 0, placement, lengths_q) for t in results]
    out, *lses = _Move.apply(ways[:1] * len(parts), False, *parts)
    out = _as_called(out, q, a.layout)
    return (out, _lse_as_called(lses[0][..., 0], q)) if return_lse else out


def _sequence_first(t: Tensor, layout: str) -> Tensor:
    """(seq, batch, heads, dim), a view."""
    return heads_first(t, LAYOUTS[layout]).permute(2, 0, 1, 3)


def _as_called(out: Tensor, q: Tensor, layout: str) -> Tensor:
    """(seq, batch, heads, dim_v) in the caller's axes."""
    if q.dim() == 2:
        return out[:, 0, 0].contiguous()
    out = out.transpose(0, 1) if layout == "bshd" else out.permute(1, 2, 0, 3)
    return (out if q.dim() == 4 else out[0]).contiguous()


def _lse_as_called(lse: Tensor, q: Tensor) -> Tensor:
    """(seq, batch, heads) in the caller's axes."""
    lse = lse.permute(1, 2, 0).contiguous().to(lse_dtype(q))
    return lse if q.dim() == 4 else lse[0] if q.dim() == 3 else lse[0, 0]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, a: _extended.Arguments, seq_q: int, seq_kv: int) -> None:
    """Raises what `flash_attention` would raise with whole sequences of these lengths."""

    def whole(t: Tensor, seq: int) -> Tensor:
        """As large, and of one element."""
        shape = list(t.shape)
        shape[t.dim() - (3 if t.dim() > 2 and a.layout == "bshd" else 2)] = seq
        return t.new_empty(()).expand(shape)

    q, k, v = whole(q, seq_q), whole(k, seq_kv), whole(v, seq_kv)
    options = _extended.options_of(q, k, a._replace(dropout_p=0.0), a.config or AttentionConfig())
    _errors.check_call(q, k, v, options)


@dataclass(frozen=True)
class _Way:
    """Of one tensor between (part of seq, batch, heads, dim) and (seq, batch, heads / size, dim)."""

    ranks: Ranks
    share: HeadShare
    lengths: tuple[int, ...]  # of the parts
    sharers: int = 1  # ranks that get the same head

    def to_heads(self, t: Tensor) -> Tensor:
        seq, batch, heads, dim = t.shape
        if self.sharers > 1:
            t = t[:, :, :, None].expand(-1, -1, -1, self.sharers, -1).flatten(2, 3)
            heads *= self.sharers
        size = self.share.size
        rows = t.reshape(seq, batch, size, heads // size, dim).permute(2, 0, 1, 3, 4).flatten(0, 1)
        return self.ranks.exchange(rows, [seq] * size, list(self.lengths))

    def to_sequence(self, t: Tensor) -> Tensor:
        """`to_heads` undone; what comes back from ranks that share a head is added up."""
        _, batch, heads, dim = t.shape
        size, seq = self.share.size, self.lengths[self.share.rank]
        rows = self.ranks.exchange(t, list(self.lengths), [seq] * size)
        parts = rows.view(size, seq, batch, heads, dim).permute(1, 2, 0, 3, 4)
        if self.sharers == 1:
            return parts.flatten(2, 3)
        parts = parts.reshape(seq, batch, size // self.sharers, self.sharers, dim)
        return parts.sum(3, dtype=lse_dtype(t)).to(t.dtype)


class _Move(torch.autograd.Function):
    """Every tensor its way, to heads or back; gradients go the other way, and theirs too. All tensors are in
    one function: their exchanges come in one order on all ranks, backward too."""

    @staticmethod
    def forward(ctx, ways, to_heads, *tensors):
        ctx.ways, ctx.to_heads = ways, to_heads
        moves = (way.to_heads if to_heads else way.to_sequence for way in ways)
        return tuple(move(t) for move, t in zip(moves, tensors, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[2:]
        ways, given = zip(*itertools.compress(zip(ctx.ways, grads, strict=True), needed), strict=True)
        moved = iter(_Move.apply(ways, not ctx.to_heads, *given))
        return None, None, *(next(moved) if need else None for need in needed)
