"""The functions below autograd that ring-attention packages import from flash_attn.

They take and give what flash_attn 2.8's do: LSE in float32, (batch, heads, seq) or (heads, total); gradients
are written into dq, dk and dv where these are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, ops
from .._errors import translate
from .._options import Options
from .._philox import draw_state
from .._problem import kernel_lse_dtype
from .._run import own_arguments
from ..config import AttentionConfig
from ._probabilities import signed_probabilities

_CONFIG = AttentionConfig()


def block_size_n(device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys that share a scale in S_dmask: those of a row, however many."""
    return 1 << 30


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    packing: dict,
) -> Options:
    left, right = (side if side is not None and side >= 0 else -1 for side in window)
    return Options(
        causal=int(bool(causal)),
        window_left=left,
        window_right=right,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        rng_state=rng_state if dropout_p > 0 else None,
        **packing,
    )


def _operators(
    q: Tensor, v: Tensor, options: Options, deterministic: bool | None
) -> tuple[ops.Operators, tuple, tuple]:
    """Those that serve such a call, the options in their form, and what the backend wants to be told."""
    request = dispatch.Request.of(q, v, False)
    name = dispatch.resolve("auto", "auto", request)
    if name == "standard":
        raise NotImplementedError("backend 'standard' has no operators below autograd")
    extended = options.is_extended()
    family = (ops.EXTENDED_BY_BACKEND if extended else ops.BY_BACKEND)[name]
    own = own_arguments(name, _CONFIG, False, deterministic, q.dtype)
    return family, tuple(options) if extended else options.plain(), own


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, return_softmax: bool, *scores, packing: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state), S_dmask empty unless it is asked for and there is a dropout.
    `scores`: softmax_scale, causal, window, softcap, alibi_slopes."""
    drawn = draw_state(q.device) if dropout_p > 0 else None
    options = _options(dropout_p, *scores, drawn, packing)
    operators, taken, own = _operators(q, v, options, None)
    try:
        out, lse = operators.forward(q, k, v, *taken, True, *own)
    except RuntimeError as error:
        raise translate(error) from None
    lse = lse.float()
    if drawn is None:
        return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64, device=q.device)
    probabilities = q.new_empty(0)
    if return_softmax:
        named = dict(zip(("scale", "causal", "window", "softcap", "alibi_slopes"), scores, strict=True))
        starts = tuple(packing[name].tolist() for name in packing if name.startswith("cu_seqlens")) or None
        probabilities = signed_probabilities(q, k, drawn, dropout_p, **named, starts=starts)
    return out, lse, probabilities, drawn


@torch.no_grad()
def backward(
    dout: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    dropout_p: float,
    deterministic: bool,
    rng_state: Tensor | None,
    *scores,
    packing: dict,
) -> Tensor:
    """Writes dq, dk and dv; returns rowsum(dout * out), float32, shaped like the LSE."""
    q, k, v, out, lse = tensors
    if dropout_p > 0 and rng_state is None:
        raise ValueError("rng_state must be that of the forward pass where dropout_p is above 0, got None")
    options = _options(dropout_p, *scores, rng_state, packing)
    operators, taken, own = _operators(q, v, options, deterministic)
    needs = (False,) * len(operators.family.differentiable)
    lse = lse.to(kernel_lse_dtype(q))
    try:
        found = operators.backward(dout, None, q, k, v, out, lse, *taken, *needs, *own)
    except RuntimeError as error:
        raise translate(error) from None
    for given, grad in zip(grads, found, strict=False):
        if given is not None:
            given.copy_(grad)
    return (dout.float() * out.float()).sum(-1).mT
