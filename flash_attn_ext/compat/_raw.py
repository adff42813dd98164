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
from .._windows import window_bounds
from ..config import AttentionConfig
from . import _cached
from ._errors import as_runtime_errors
from ._probabilities import signed_probabilities
from ._scores import scores_of

_CONFIG = AttentionConfig()


def _get_block_size_n(device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys that share a scale in S_dmask: those of a row, however many."""
    return 1 << 30


def _options(dropout_p: float, scores: dict, rng_state: Tensor | None, packing: dict) -> Options:
    left, right = window_bounds(scores["window"])
    return Options(
        causal=int(bool(scores["causal"])),
        window_left=left,
        window_right=right,
        scale=scores["scale"],
        softcap=scores["softcap"],
        alibi_slopes=scores["alibi_slopes"],
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
def _forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, return_softmax: bool, scores: dict, packing: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state), S_dmask empty unless it is asked for and there is a dropout.
    `scores`: see `scores_of`."""
    drawn = draw_state(q.device) if dropout_p > 0 else None
    options = _options(dropout_p, scores, drawn, packing)
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
        starts = tuple(packing[name].tolist() for name in packing if name.startswith("cu_seqlens")) or None
        probabilities = signed_probabilities(q, k, drawn, dropout_p, **scores, starts=starts)
    return out, lse, probabilities, drawn


@torch.no_grad()
def _backward(
    dout: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    dropout_p: float,
    deterministic: bool,
    rng_state: Tensor | None,
    scores: dict,
    packing: dict,
) -> Tensor:
    """Writes dq, dk and dv; returns rowsum(dout * out), float32, shaped like the LSE."""
    q, k, v, out, lse = tensors
    if dropout_p > 0 and rng_state is None:
        raise ValueError("rng_state must be that of the forward pass where dropout_p is above 0, got None")
    options = _options(dropout_p, scores, rng_state, packing)
    operators, _, own = _operators(q, v, options, deterministic)
    given = (dout, None, q, k, v, out, lse.to(kernel_lse_dtype(q)))
    try:
        found = operators.backward_of_part(given, options, own)  # callers may have only a part of the keys
    except RuntimeError as error:
        raise translate(error) from None
    for into, grad in zip(grads, found, strict=True):
        if into is not None:
            into.copy_(grad)
    return (dout.float() * out.float()).sum(-1).mT


@as_runtime_errors
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state), outside autograd; S_dmask is empty without a dropout."""
    window = (window_size_left, window_size_right)
    scores = scores_of(softmax_scale, causal, window, softcap, alibi_slopes)
    return _forward(q, k, v, dropout_p, return_softmax, scores, packing={})


@as_runtime_errors
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv; returns rowsum(dout * out), (batch, heads, seq_q) float32."""
    window = (window_size_left, window_size_right)
    scores = scores_of(softmax_scale, causal, window, softcap, alibi_slopes)
    saved, grads = (q, k, v, out, softmax_lse), (dq, dk, dv)
    return _backward(dout, saved, grads, dropout_p, deterministic, rng_state, scores, packing={})


@as_runtime_errors
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of packed sequences; softmax_lse (heads, total_q)."""
    del zero_tensors  # what belongs to no sequence is 0 anyway
    if num_splits > 1:
        raise RuntimeError(f"num_splits > 1 is not supported for packed sequences, got {num_splits}")
    window = (window_size_left, window_size_right)
    scores = scores_of(softmax_scale, causal, window, softcap, alibi_slopes)
    if any(t is not None for t in (block_table, leftpad_k, seqused_k)):
        if dropout_p:
            raise NotImplementedError(
                f"dropout_p must be 0 with block_table, leftpad_k or seqused_k, got {dropout_p}"
            )
        placed = (max_seqlen_q, scores, block_table, leftpad_k, seqused_k)
        out, lse = _cached.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *placed)
        state = torch.zeros(2, dtype=torch.int64, device=q.device)
        return out, lse.float(), q.new_empty(0), state
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _forward(q, k, v, dropout_p, return_softmax, scores, packing=packing)


@as_runtime_errors
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk and dv; returns rowsum(dout * out), (heads, total_q) float32."""
    del zero_tensors
    window = (window_size_left, window_size_right)
    scores = scores_of(softmax_scale, causal, window, softcap, alibi_slopes)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    saved, grads = (q, k, v, out, softmax_lse), (dq, dk, dv)
    return _backward(dout, saved, grads, dropout_p, deterministic, rng_state, scores, packing=packing)


def _packing(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> dict:
    longest = {"max_seqlen_q": int(max_seqlen_q), "max_seqlen_k": int(max_seqlen_k)}
    return {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, **longest}
