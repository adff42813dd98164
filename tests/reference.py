"""The oracle: attention and its gradients in fp64, straight from the definition, and the error rule.

Everything is O(Sq * Sk) and written out by hand, forward and backward, so that the rules of the contract
can be read off the code: what is masked is never read, a row that sees no key gives output 0, LSE -inf and
zero gradients. Shapes inside are `(B, H, S, D)`; `attend` converts from and to the caller's layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

NEG_INF = float("-inf")
# Last bits granted on top of the error of the unfused computation, in ulps of the result's size.
SLACK_ULPS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4, torch.float64: 16}
# One small tensor against the worst of a few unfused draws: where both round alike, one draw in a thousand is worse
# by luck. `test_errors_are_those_of_the_unfused_computation` holds all draws together to the rule itself.
LUCK = {torch.float32: 2.5, torch.float64: 1.5}
# The fp32 LSE of half inputs, held against fp32 arithmetic: dot instructions round after every pair of products.
HALF_LSE_ULPS = 16


@dataclass
class Result:
    """Output, LSE and gradients in the caller's layout; gradients are None when `dout` was not given."""

    out: Tensor
    lse: Tensor
    visible: Tensor  # bool (B, Hq, Sq, Sk)
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None
    # Root of the sum of squares of what dq, dk and dbias add up, before anything cancels; see `complaint`.
    terms: dict[str, float] = field(default_factory=dict)


def to_bhsd(x: Tensor, layout: str) -> Tensor:
    """A 2-, 3- or 4-D tensor in `layout` as `(B, H, S, D)`."""
    if x.dim() == 2:
        return x[None, None]
    if x.dim() == 3:
        x = x[None]
    return x.transpose(1, 2) if layout == "bshd" else x


def from_bhsd(x: Tensor, layout: str, rank: int) -> Tensor:
    """The inverse of `to_bhsd`."""
    if rank == 2:
        return x[0, 0]
    x = x.transpose(1, 2) if layout == "bshd" else x
    return x[0] if rank == 3 else x


def lse_from_bhs(x: Tensor, rank: int) -> Tensor:
    """`(B, H, S)` as the LSE of a call with tensors of `rank`."""
    return x if rank == 4 else x[0] if rank == 3 else x[0, 0]


def visibility(shape, causal=False, window=None, mask=None, bias=None, kv_lengths=None) -> Tensor:
    """Which key each query may see: bool `shape` = (B, Hq, Sq, Sk)."""
    batch, _, seq_q, seq_kv = shape
    i = torch.arange(seq_q)[:, None]
    j = torch.arange(seq_kv)[None, :]
    shift = seq_kv - seq_q
    seen = torch.ones(shape, dtype=torch.bool)
    if causal in (True, "bottom_right"):
        seen &= j <= i + shift
    elif causal == "top_left":
        seen &= j <= i
    left, right = (-1, -1) if window is None else window
    if left is not None and left >= 0:
        seen &= j >= i + shift - left
    if right is not None and right >= 0:
        seen &= j <= i + shift + right
    if kv_lengths is not None:
        seen &= j < kv_lengths.long().reshape(batch, 1, 1, 1)
    if mask is not None:
        seen &= mask
    if bias is not None:
        seen &= bias != NEG_INF
    return seen


def _dot_rows(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """sum_d a[i, d] b[j, d] for the pairs that are seen, 0 elsewhere."""
    return torch.where(seen, a @ b.transpose(-1, -2), 0.0)


def _weighted_sum(w: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """sum_j w[i, j] x[j, d] over the j that i sees: a NaN or Inf in an unseen row of x changes nothing."""
    if torch.isfinite(x).all():
        return torch.where(seen, w, 0.0) @ x
    terms = w[..., None] * x[..., None, :, :]
    return torch.where(seen[..., None], terms, 0.0).sum(-2)


def _sum_to_shape(x: Tensor, shape) -> Tensor:
    """The gradient of broadcasting `shape` to x's shape."""
    lead = x.dim() - len(shape)
    x = x.sum(tuple(range(lead))) if lead else x
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1)
    return x.sum(axes, keepdim=True) if axes else x


def attend(
    q,
    k,
    v,
    *,
    layout="bshd",
    causal=False,
    window=None,
    scale=None,
    softcap=0.0,
    mask=None,
    bias=None,
    kv_lengths=None,
    dout=None,
    dlse=None,
) -> Result:
    """Exact attention in fp64; with `dout` (and `dlse`) also all gradients, by the explicit formulas."""
    rank = q.dim()
    q4, k4, v4 = (to_bhsd(x.detach().double(), layout) for x in (q, k, v))
    batch, heads_q, seq_q, dim = q4.shape
    heads_kv, seq_kv = k4.shape[1], k4.shape[2]
    group = heads_q // heads_kv if heads_kv else 1
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    k4, v4 = k4.repeat_interleave(group, 1), v4.repeat_interleave(group, 1)
    b4 = None if bias is None else bias.detach().double()

    seen = visibility((batch, heads_q, seq_q, seq_kv), causal, window, mask, b4, kv_lengths)
    s = _dot_rows(q4, k4, seen) * scale
    slope = torch.ones_like(s)
    if softcap > 0:
        slope = 1 - torch.tanh(s / softcap) ** 2
        s = softcap * torch.tanh(s / softcap)
    if b4 is not None:
        s = s + torch.where(seen, b4, 0.0)
    s = torch.where(seen, s, NEG_INF)
    # A row without keys: max of nothing is -inf, and 0 takes its place in the difference.
    row_max = s.amax(-1, keepdim=True) if seq_kv else s.new_full((*s.shape[:-1], 1), NEG_INF)
    safe_max = torch.where(row_max == NEG_INF, 0.0, row_max)
    e = torch.where(seen, torch.exp(s - safe_max), 0.0)
    row_sum = e.sum(-1, keepdim=True)
    nothing = ~seen.any(-1, keepdim=True)
    p = torch.where(nothing, 0.0, e / torch.where(nothing, 1.0, row_sum))
    lse = torch.where(nothing, NEG_INF, safe_max + torch.log(torch.where(nothing, 1.0, row_sum)))[..., 0]
    out = _weighted_sum(p, v4, seen)
    result = Result(from_bhsd(out, layout, rank), lse_from_bhs(lse, rank), seen)
    if dout is None:
        return result

    do4 = to_bhsd(dout.double(), layout)
    dlse4 = torch.zeros_like(lse) if dlse is None else dlse.double().reshape(lse.shape)
    dp = _dot_rows(do4, v4, seen)
    delta = torch.where(seen, p * dp, 0.0).sum(-1, keepdim=True)
    ds = torch.where(seen, p * (dp - delta + dlse4[..., None]), 0.0)
    squares = torch.where(seen, p * (dp.abs() + delta.abs() + dlse4[..., None].abs()), 0.0) ** 2
    if bias is not None:
        result.dbias = _sum_to_shape(ds, bias.shape)
        result.terms["dbias"] = largest(_sum_to_shape(squares, bias.shape)) ** 0.5
    ds = torch.where(seen, ds * slope * scale, 0.0)
    squares = squares * (slope * scale) ** 2
    result.terms["dq"] = largest(_weighted_sum(squares, k4**2, seen)) ** 0.5
    result.terms["dk"] = (
        largest(_weighted_sum(squares.transpose(-1, -2), q4**2, seen.transpose(-1, -2))) ** 0.5
    )
    seen_t = seen.transpose(-1, -2)
    dq = _weighted_sum(ds, k4, seen)
    dk = _weighted_sum(ds.transpose(-1, -2), q4, seen_t)
    dv = _weighted_sum(p.transpose(-1, -2), do4, seen_t)
    if heads_kv:
        dk, dv = (x.unflatten(1, (heads_kv, group)).sum(2) for x in (dk, dv))
    result.dq, result.dk, result.dv = (from_bhsd(x, layout, rank) for x in (dq, dk, dv))
    return result


def unfused(
    q,
    k,
    v,
    *,
    layout="bshd",
    causal=False,
    window=None,
    scale=None,
    softcap=0.0,
    mask=None,
    bias=None,
    kv_lengths=None,
    dout=None,
    dlse=None,
    lse_dtype=None,
    other=False,
) -> Result:
    """What a torch user writes without a fused kernel, in the inputs' own dtype, differentiated by autograd.

    lse_dtype: that of the LSE's computation, by default the one that it is returned in: fp32, or fp64 for fp64.
    other: the second of two equally good formulations, with other products: the scale goes into q, products are
    taken transposed, keys come in reverse. Finite inputs only.
    """
    rank = q.dim()
    leaves = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)]
    if bias is not None:
        leaves.append(bias.detach().clone(memory_format=torch.contiguous_format).requires_grad_())
    heads_q, dim = to_bhsd(q, layout).shape[1], q.shape[-1]
    factor = 1.0 / math.sqrt(dim) if scale is None else scale
    lse_dtype = lse_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)

    def repeated(x):
        x = to_bhsd(x, layout)
        return x.repeat_interleave(heads_q // max(x.shape[1], 1), 1)

    def product(a, b):
        """a @ b, or the same by way of the transposed product over the reversed inner axis."""
        return (
            (b.flip(-2).transpose(-1, -2) @ a.flip(-1).transpose(-1, -2)).transpose(-1, -2)
            if other
            else a @ b
        )

    def scores_of(q, k, bias, dtype):
        q4, k4 = to_bhsd(q.to(dtype), layout), repeated(k.to(dtype))
        s = (
            product(q4 * factor, k4.transpose(-1, -2))
            if other
            else product(q4, k4.transpose(-1, -2)) * factor
        )
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        seen = visibility(s.shape, causal, window, mask, bias, kv_lengths)
        if bias is not None:
            s = s + torch.where(seen, bias, 0.0).to(dtype)
        some = seen.any(-1, keepdim=True)
        return torch.where(some, torch.where(seen, s, NEG_INF), 0.0), seen, some

    def forward(q, k, v, bias=None):
        s, seen, some = scores_of(q, k, bias, q.dtype)
        p = torch.where(some, torch.softmax(s, -1), 0.0)
        wide, _, some = scores_of(q, k, bias, lse_dtype)
        lse = torch.where(some[..., 0], torch.logsumexp(wide, -1), NEG_INF)
        return from_bhsd(product(p, repeated(v)), layout, rank), lse_from_bhs(lse, rank), seen

    out, lse, seen = forward(*leaves)
    result = Result(out.detach(), lse.detach(), seen)
    if dout is None:
        return result
    heads = (out, lse) if dlse is not None else (out,)
    grads = torch.autograd.grad(heads, leaves, (dout, dlse)[: len(heads)], allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    result.dq, result.dk, result.dv = grads[:3]
    result.dbias = grads[3] if bias is not None else None
    return result


def ulp(size: float, dtype: torch.dtype) -> float:
    """Spacing of `dtype`'s numbers at magnitude `size`."""
    info = torch.finfo(dtype)
    if not size > info.tiny:
        return info.tiny * info.eps
    return info.eps * 2.0 ** math.floor(math.log2(size))


def largest(x: Tensor) -> float:
    """Largest magnitude among the finite entries; 0 when there are none."""
    x = x[torch.isfinite(x)]
    return float(x.abs().max()) if x.numel() else 0.0


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest error of the finite entries, in units of the largest entry of `want`."""
    finite = torch.isfinite(want)
    size = largest(want)
    return largest((got.double() - want)[finite]) / size if size else 0.0


def allowance(
    name: str,
    dtype: torch.dtype,
    want: Tensor,
    unfused_error: float = 0.0,
    term: float = 0.0,
    input_dtype=None,
) -> float:
    """The largest error that the rule grants a result of `dtype`.

    want: the fp64 reference. unfused_error: that of the unfused same-dtype computation, relative to the result's size.
    term: size of the summands where the result is a sum that cancels. A gradient of the scores is
    p (dp - delta), and with few keys the two are all but equal: how much of their rounding is left over is
    luck, for any algorithm, so the last bits are those of the summands. input_dtype: that of q and of the
    output that delta may be made of, whose last bits these are.
    """
    size = largest(want)
    half_lse = name == "lse" and input_dtype in (torch.float16, torch.bfloat16)
    granted = (HALF_LSE_ULPS if half_lse else SLACK_ULPS[dtype]) * ulp(size, dtype)
    if term:
        granted = max(granted, SLACK_ULPS[input_dtype] * ulp(max(size, term), input_dtype))
    return unfused_error * size + granted


def complaint(name: str, got: Tensor, want: Tensor, *rule, **more_rule) -> str | None:
    """None when `got` obeys the rule for `want`, else one line that says how it does not; see `allowance`."""
    if tuple(got.shape) != tuple(want.shape):
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got64 = got.detach().double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(kind(got64), kind(want)):
            wrong = int((kind(got64) != kind(want)).sum())
            return f"{name}: {kind.__name__} differs from the reference in {wrong} of {got.numel()} entries"
    error = largest((got64 - want)[torch.isfinite(want)])
    allowed = allowance(name, got.dtype, want, *rule, **more_rule)
    if error > LUCK.get(got.dtype, 1.0) * allowed:
        return f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    return None
