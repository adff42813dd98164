"""`ring_attention`: keys and values go round, queries stay."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _errors, autograd, functional
from .._extended import check_dropout
from .._options import Options
from .._philox import draw_state
from .._problem import LAYOUTS, heads_first, lse_dtype, lse_shape
from .._run import check_constants, check_types
from .._windows import CAUSAL, window_bounds
from . import _blocks, _placement, _ring
from ._group import Ranks
from ._kernels import Kernels

_REFUSED = {
    "mask": "keys travel and a mask would have to travel with them, seq_q x seq_kv entries in all",
    "bias": "keys travel and a bias would have to travel with them, seq_q x seq_kv entries in all",
    "alibi_slopes": "the kernels count distances within the keys that they are given, not over all ranks",
}


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    *,
    group: dist.ProcessGroup | None = None,
    placement: str = "contiguous",
    scale: float | None = None,
    layout: str = "bshd",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
    check_ranks: bool | None = None,
    mask: None = None,
    bias: None = None,
    alibi_slopes: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence of which every process of a group holds a part, in memory for its part.

    Keys and values go round the group, each time while those that came before are being computed with; what a
    rank's queries do not see is not computed, and what nobody sees any more is not sent. The partial results
    of a step have the inputs' dtype; they are merged in float32 (float64 for float64), and rounded once.
    Autograd keeps q, k, v, the output and the LSE of this rank; the backward pass goes round once more, and
    sums of gradients are float32 (float64). All ranks must call it alike, forward and backward.

    Args:
        q: this rank's queries, (batch, seq_q / P, heads_q, dim) in a group of P; float16, bfloat16, float32,
            and on the CPU float64.
        k, v: its keys and values, (batch, seq_kv / P, heads_kv, dim or dim_v); heads_kv divides heads_q.
        causal, window: as for `flash_attention`, by places in the whole sequence. seq_q and seq_kv are whole
            lengths, and mostly the same.
        group: the processes; None is the default group. With one process this is `flash_attention`.
        placement: which places a rank holds, see `shard_sequence`. "contiguous": a piece, of any length;
            "zigzag" (of an even length) and "striped" give every rank the same work when causal.
        scale, layout, softcap, deterministic: as for `flash_attention`. Rank 3 and rank 2 too.
        sinks: (heads_q,), counted once over all ranks, the same on each.
        kv_lengths: (batch,), of the whole sequence, the same on each rank.
        dropout_p: as for `flash_attention`: drawn by each rank for its own queries from its own generator;
            ranks with the same seed draw differently.
        return_lse: also return the log-sum-exp of this rank's rows, over the keys of all ranks.
        backend: "auto", "cpu", "cuda" or "portable".
        check_ranks: whether to make sure, by one collective of a few numbers, that all ranks were told the
            same. None: unless a device would have to be waited for, as in a group of NCCL alone. Without
            this check parts must be of one length, and a mismatch ends in the group's timeout.
        mask, bias, alibi_slopes: must be None; `ulysses_attention` has them.

    Returns:
        out like q with v's last axis, contiguous; with `return_lse` also (batch, heads_q, seq_q / P) float32
        (float64 for float64). A row that sees no key on any rank gives 0 and -inf, or its sink, and its
        gradients are 0. Differentiable with respect to q, k, v and sinks; the sinks' gradient is that of this
        rank's rows, to be summed over the ranks as those of any parameter of the model.

    Raises:
        RuntimeError: torch.distributed is not there, or not initialised; or a peer did not answer in time.
        NotImplementedError: what is said above to be left out.
        TypeError, ValueError: a wrong call, before anything is sent where one rank can see it; on all ranks
            where it takes two to see it.

    Example:
        >>> q, k, v = (shard_sequence(t, placement="zigzag") for t in (q, k, v))
        >>> out = ring_attention(q, k, v, causal=True, placement="zigzag")

    Source: Liu et al., Ring Attention with Blockwise Transformers, 2023, arXiv:2310.01889; stripes: Brandon
    et al., Striped Attention, 2023, arXiv:2311.09431; the backward pass with the LSE of all keys: Dao,
    FlashAttention-2, 2023, arXiv:2307.08691.
    """
    for name, value in {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes}.items():
        if value is not None:
            raise NotImplementedError(f"{name} must be None in ring_attention: {_REFUSED[name]}")
    tensors = (None, None, kv_lengths, None, None, sinks)
    check_types(q, k, v, tensors, layout, causal, scale, softcap, None)
    check_constants(scale=scale, softcap=softcap)
    _errors.choice("placement", placement, _placement.PLACEMENTS)
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be a bool or None, got {deterministic!r}")
    dropout_p = check_dropout(dropout_p)
    ranks = Ranks.of(group)
    if ranks.size == 1:
        return functional.flash_attention(
            q, k, v, causal, scale=scale, layout=layout, window=window, softcap=softcap, sinks=sinks,
            kv_lengths=kv_lengths, dropout_p=dropout_p, return_lse=return_lse, deterministic=deterministic,
            backend=backend,
        )  # fmt: skip
    if torch._C._is_any_autocast_enabled():
        q, k, v = autograd.autocast(q, k, v)
    left, right = (-1, -1) if window is None else window_bounds(window)
    options = Options(
        kv_lengths=kv_lengths,
        sinks=sinks,
        layout=LAYOUTS[layout],
        causal=CAUSAL[causal],
        window_left=left,
        window_right=right,
        scale=scale,
        softcap=softcap,
    )
    _errors.check_call(q, k, v, options)
    kernels = Kernels.of(q, v, backend, deterministic, extended=dropout_p > 0)
    batch, heads_q, seq_q, dim = heads_first(q, options.layout).shape
    _, heads_kv, seq_kv, dim_v = heads_first(v, options.layout).shape
    facts = {
        "the rank of q": q.dim(), "q's batch": batch, "q's heads": heads_q, "k's heads": heads_kv,
        "q's dim": dim, "v's dim": dim_v, "q's dtype": q.dtype, "causal": options.causal,
        "window": (left, right), "placement": placement, "layout": layout, "softcap": float(softcap),
        "scale": scale if scale is None else float(scale), "dropout_p": float(dropout_p),
        "whether sinks is given": sinks is not None, "whether kv_lengths is given": kv_lengths is not None,
        "whether gradients are asked for": torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (q, k, v, sinks)),
    }  # fmt: skip
    lengths_q, lengths_kv = zip(*ranks.agree(facts, (seq_q, seq_kv), q.device, check_ranks), strict=True)
    for name, lengths in (("q", lengths_q), ("k", lengths_kv)):
        _placement.check_lengths(name, placement, lengths)
    band = _blocks.Band.of(options.causal, left, right, sum(lengths_q), sum(lengths_kv))
    call = _ring.Call(
        ranks=ranks,
        kernels=kernels,
        placement=placement,
        lengths_q=lengths_q,
        lengths_kv=lengths_kv,
        band=band,
        layout=options.layout,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        rng_state=draw_state(q.device) if dropout_p > 0 else None,
    )
    out, lse = _ring.Attention.apply(call, q, k, v, sinks, kv_lengths)
    return (out, lse.to(lse_dtype(q)).view(lse_shape(q, options.layout))) if return_lse else out
