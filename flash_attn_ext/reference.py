"""The unfused computation: a whole (seq_q, seq_kv) score matrix in the dtype of the inputs.

`backend="standard"` is this, the baseline that fused attention is compared with; and
`attention_fp64` is the same in float64, the yardstick of the tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._errors import check_call
from ._options import Options
from ._problem import LAYOUTS, Problem, contract, lse_dtype, lse_shape, no_autocast, ordered_as, parts


class _SeenProduct(torch.autograd.Function):
    """weights @ values for weights that are 0 where `seen` is False, and nothing of what is
    not seen enters the product or its gradients. (..., rows, keys) @ (..., keys, columns)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights, seen, values):
        return contract(weights, seen, values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        weights, seen, values = ctx.saved_tensors
        return (grad @ values.mT).masked_fill(~seen, 0), None, contract(weights.mT, seen.mT, grad)


class _SeenScores(torch.autograd.Function):
    """q @ k^T; what is not seen, which the caller overwrites, gets no gradient and gives none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, seen):
        return q @ k.mT

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        q, k, seen = ctx.saved_tensors
        grad = grad.masked_fill(~seen, 0)
        return contract(grad, seen, k), contract(grad.mT, seen.mT, q), None


class _DualSeenProduct(_SeenProduct):
    """With a forward-mode derivative."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dweights, _, dvalues):
        weights, seen, values = ctx.saved_tensors
        by_weights = 0 if dweights is None else contract(dweights, seen, values)
        return by_weights + (0 if dvalues is None else contract(weights, seen, dvalues))


class _DualSeenScores(_SeenScores):
    """With a forward-mode derivative."""

    setup_context = staticmethod(_DualSeenProduct.setup_context)

    @staticmethod
    def jvp(ctx, dq, dk, _):
        q, k, seen = ctx.saved_tensors
        change = (0 if dq is None else dq @ k.mT) + (0 if dk is None else q @ dk.mT)
        return change.masked_fill(~seen, 0)


_DUALS = {_SeenProduct: _DualSeenProduct, _SeenScores: _DualSeenScores}


def _apply(function: type[torch.autograd.Function], *inputs):
    """`torch.compile` traces no function that has a jvp."""
    return (function if torch.compiler.is_compiling() else _DUALS[function]).apply(*inputs)


def _narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), finite where t is, its derivative 1: finfo.min of a wider bias is a low score, and only
    -inf hides."""
    limit = torch.finfo(dtype).max
    value = t.detach()
    finite = value.isfinite()
    moving = t.where(finite, 0)
    return (value.clamp(-limit, limit) + (moving - moving.detach())).where(finite, t).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options, return_lse: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) by the textbook, differentiable by torch's autograd; every intermediate in q's dtype. lse is
    empty, (0,), when not asked for."""
    dtype = lse_dtype(q)
    with no_autocast(q.device):
        found = [_attend(p, q.dtype, dtype if return_lse else None) for p, *_ in parts(q, k, v, options)]
    if options.cu_seqlens_q is None:
        out, lse = found[0]
    else:
        # Rows past the last sequence see nothing.
        rest = (1, q.shape[1], q.shape[0] - sum(part.shape[2] for part, _ in found))
        zero = _zero(q, k, v)
        outs, lses = zip(
            *found, (q.new_zeros(*rest, v.shape[-1]) + zero, _nothing(rest, q) + zero), strict=True
        )
        out, lse = torch.cat(outs, 2), torch.cat(lses, 2) if return_lse else None
    if q.dim() != 2 and options.layout == LAYOUTS["bshd"]:
        out = out.transpose(1, 2)
    out = ordered_as(out.reshape(*q.shape[:-1], v.shape[-1]).contiguous(), q, options.layout)
    if not return_lse:
        return out, q.new_empty(0, dtype=dtype)
    return out, lse.reshape(lse_shape(q, options.layout))


def with_weights(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Out and the weights that made it, (batch, heads_q, seq_q, seq_kv), after dropout; differentiable.
    q, k, v: rank 4."""
    if not torch.compiler.is_compiling():
        check_call(q, k, v, options)
    with no_autocast(q.device):
        [(p, *_)] = parts(q, k, v, options)
        batch, heads_kv, group, seq_q, _ = p.q.shape
        rows, seq_kv = (batch, heads_kv * group, seq_q), p.k.shape[2]
        if p.has_work():
            out, weights, _ = _unfused(p, q.dtype, None)
        else:
            out, weights = _attend(p, q.dtype, None)[0], q.new_zeros(*rows, seq_kv)
    out, weights = out.reshape(*rows, v.shape[-1]), weights.reshape(*rows, seq_kv)
    return (out.transpose(1, 2) if options.layout == LAYOUTS["bshd"] else out), weights


def _zero(*tensors: Tensor | None) -> Tensor:
    """A sum over nothing: a zero that autograd knows to depend on the tensors."""
    return sum(t[None][:0].sum() for t in tensors if t is not None)


def _nothing(shape: tuple[int, ...], q: Tensor) -> Tensor:
    """The log-sum-exp of rows without keys."""
    return q.new_full(shape, -math.inf, dtype=lse_dtype(q))


def _attend(p: Problem, dtype: torch.dtype, lse_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """(batch, heads_q, seq_q, dim_v), and (batch, heads_q, seq_q) when `lse_dtype` is given."""
    if p.has_work():
        out, _, lse = _unfused(p, dtype, lse_dtype)
    else:
        zero = _zero(p.q, p.k, p.v, p.bias, p.slopes, p.sinks)
        rows = p.q.shape[:-1]
        out = p.q.new_zeros(*rows, p.v.shape[-1]) + zero
        lse = _nothing(rows, p.q)
        if p.sinks is not None:
            lse = p.sinks.detach()[..., 0].to(lse.dtype).expand(rows)
        lse = lse + zero
    batch, heads_kv, group, seq_q, _ = p.q.shape
    shape = (batch, heads_kv * group, seq_q)
    return out.reshape(*shape, p.v.shape[-1]), None if lse_dtype is None else lse.reshape(shape)


def _unfused(
    p: Problem, dtype: torch.dtype, lse_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output (batch, heads_kv, group * seq_q, dim_v), weights (..., seq_kv), and if `lse_dtype` is given the
    LSE, without the last axis."""
    # (batch, heads_kv, group * seq_q, seq_kv): query heads of a group are rows of one product.
    shape = (*p.q.shape[:-1], p.k.shape[2])
    whole = (0, shape[3], 0, shape[4])
    rows = p.q.flatten(2, 3)
    visible = p.visible(*whole)
    if visible is None:
        s = rows @ p.k.mT
    else:
        visible = visible.expand(shape).flatten(2, 3)
        s = _apply(_SeenScores, rows, p.k, visible)
    s = s * p.scale
    if p.softcap:
        s = torch.tanh(s / p.softcap) * p.softcap
    if p.bias is not None or p.slopes is not None:
        s = s.view(shape)
        if p.bias is not None:
            s = s + p.bias
        if p.slopes is not None:
            wide = torch.promote_types(dtype, torch.float32)
            s = s - p.slopes.to(wide) * p.distance(*whole, wide)
        s = _narrowed(s, dtype).flatten(2, 3)
    if visible is not None:
        s = s.masked_fill(~visible, -math.inf)
    logits = s
    if p.sinks is not None:
        sinks = p.sinks.to(dtype).expand(*shape[:-1], 1).flatten(2, 3)
        logits = torch.cat([s, sinks], -1)
    weights = torch.softmax(logits, -1)[..., : shape[4]]
    if (kept := p.kept(*whole)) is not None:
        weights = weights.masked_fill(~kept.flatten(2, 3), 0) * p.dropout_scale
    if visible is None:
        out = weights @ p.v
    else:
        weights = weights.masked_fill(~visible, 0)  # rows of nothing but -inf are NaN
        out = _apply(_SeenProduct, weights, visible, p.v)
    if lse_dtype is None:
        return out, weights, None
    lse = logits.to(lse_dtype).logsumexp(-1)
    if visible is not None:
        lse = lse.where(visible.any(-1), lse.detach())  # a row that sees no key has no derivative
    return out, weights, lse


def attention_fp64(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    *,
    scale: float | None = None,
    layout: str = "bshd",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention in float64, for comparing with. Differentiable, O(seq_q * seq_kv) memory.

    Arguments: those of `flash_attention`, of any floating dtypes.
    Returns: (out, lse), both float64.
    """
    from .functional import flash_attention

    q, k, v = (t.double() for t in (q, k, v))
    bias = None if bias is None else bias.double()
    return flash_attention(
        q,
        k,
        v,
        causal,
        scale=scale,
        layout=layout,
        mask=mask,
        bias=bias,
        window=window,
        softcap=softcap,
        kv_lengths=kv_lengths,
        return_lse=True,
        backend="standard",
    )
