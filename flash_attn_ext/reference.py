"""The unfused computation: a whole (seq_q, seq_kv) score matrix in the dtype of the inputs.

`backend="standard"` is this, the baseline that fused attention is compared with; and
`attention_fp64` is the same in float64, the yardstick of the tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._problem import LAYOUTS, Problem, contract, lse_dtype, lse_shape, no_autocast


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


class _Narrowed(torch.autograd.Function):
    """t.to(dtype), finite where t is: finfo.min of a wider bias is a low score, and only -inf hides."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t, dtype):
        limit = torch.finfo(dtype).max
        return t.clamp(-limit, limit).where(t.isfinite(), t).to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    layout: int,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the textbook, differentiable by torch's autograd; every intermediate in
    q's dtype. Arguments are those of the operator `attention_forward`."""
    p = Problem.make(
        q, k, v, mask, bias, kv_lengths, layout, causal, window_left, window_right, scale, softcap
    )
    if not p.has_work():
        # Sums over nothing: zeros that autograd knows to depend on the inputs.
        zero = sum(t[None][:0].sum() for t in (q, k, v, bias) if t is not None)
        lse = q.new_full(lse_shape(q, layout) if return_lse else (0,), -math.inf, dtype=lse_dtype(q))
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + zero, lse + zero
    with no_autocast(q.device):
        out, lse = _unfused(p, q.dtype, lse_dtype(q) if return_lse else None)
    if q.dim() != 2 and layout == LAYOUTS["bshd"]:
        out = out.transpose(1, 2)
    out = out.reshape(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(0, dtype=lse_dtype(q)) if lse is None else lse.reshape(lse_shape(q, layout))


def _unfused(p: Problem, dtype: torch.dtype, lse_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """(batch, heads_q, seq_q, dim_v), and (batch, heads_kv, group * seq_q) when `lse_dtype` is given."""
    # (batch, heads_kv, group * seq_q, seq_kv): query heads of a group are rows of one product.
    shape = (*p.q.shape[:-1], p.k.shape[2])
    rows = p.q.flatten(2, 3)
    visible = p.visible(0, shape[3], 0, shape[4])
    if visible is None:
        s = rows @ p.k.mT
    else:
        visible = visible.expand(shape).flatten(2, 3)
        s = _SeenScores.apply(rows, p.k, visible)
    s = s * p.scale
    if p.softcap:
        s = torch.tanh(s / p.softcap) * p.softcap
    if p.bias is not None:
        s = _Narrowed.apply(s.view(shape) + p.bias, dtype).flatten(2, 3)
    if visible is None:
        out = torch.softmax(s, -1) @ p.v
    else:
        hidden = ~visible
        s = s.masked_fill(hidden, -math.inf)
        # The second fill is for rows of nothing but -inf, whose softmax is NaN.
        out = _SeenProduct.apply(torch.softmax(s, -1).masked_fill(hidden, 0), visible, p.v)
    lse = None if lse_dtype is None else s.to(lse_dtype).logsumexp(-1)
    return out.unflatten(2, shape[2:4]).flatten(1, 2), lse


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
