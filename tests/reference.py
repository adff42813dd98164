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
    dalibi_slopes: Tensor | None = None
    dsinks: Tensor | None = None
    # Root of the sum of squares of what a gradient adds up, before anything cancels; see `complaint`.
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


def visibility(
    shape,
    causal=False,
    window=None,
    mask=None,
    bias=None,
    kv_lengths=None,
    row_labels=None,
    key_bounds=None,
    mask_block=(1, 1),
) -> Tensor:
    """Which key each query may see: bool `shape` = (B, Hq, Sq, Sk).

    row_labels (n, B or 1, Sq), key_bounds (n, B or 1, Sk, 2): a key is seen where low <= label < high, n times.
    mask_block: `mask` has one entry for so many queries and keys.
    """
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
        for axis, block in zip((-2, -1), mask_block, strict=True):
            if block > 1 and mask.shape[axis] > 1:
                mask = mask.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
        seen &= mask
    if row_labels is not None:
        label, (low, high) = row_labels[..., None], key_bounds[..., None, :, :].unbind(-1)
        seen &= ((low <= label) & (label < high)).all(0)[:, None]
    if bias is not None:
        seen &= bias != NEG_INF
    return seen


def distances(seq_q: int, seq_kv: int) -> Tensor:
    """|i + Sk - Sq - j|, which a slope of ALiBi multiplies: fp64 (Sq, Sk)."""
    rows = torch.arange(seq_q, dtype=torch.float64)[:, None] + (seq_kv - seq_q)
    return (rows - torch.arange(seq_kv, dtype=torch.float64)).abs()


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
    alibi_slopes=None,
    sinks=None,
    dropout_p=0.0,
    keep=None,
    dout=None,
    dlse=None,
    **hiding,
) -> Result:
    """Exact attention in fp64; with `dout` (and `dlse`) also all gradients, by the explicit formulas.

    keep: bool (B, Hq, Sq, Sk), what a dropout with `dropout_p` leaves. hiding: more arguments of `visibility`.
    """
    rank = q.dim()
    q4, k4, v4 = (to_bhsd(x.detach().double(), layout) for x in (q, k, v))
    batch, heads_q, seq_q, dim = q4.shape
    heads_kv, seq_kv = k4.shape[1], k4.shape[2]
    group = heads_q // heads_kv if heads_kv else 1
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    k4, v4 = k4.repeat_interleave(group, 1), v4.repeat_interleave(group, 1)
    b4 = None if bias is None else bias.detach().double()

    seen = visibility((batch, heads_q, seq_q, seq_kv), causal, window, mask, b4, kv_lengths, **hiding)
    s = _dot_rows(q4, k4, seen) * scale
    slope = torch.ones_like(s)
    if softcap > 0:
        slope = 1 - torch.tanh(s / softcap) ** 2
        s = softcap * torch.tanh(s / softcap)
    if b4 is not None:
        s = s + torch.where(seen, b4, 0.0)
    far = distances(seq_q, seq_kv)
    if alibi_slopes is not None:
        s = s - alibi_slopes.detach().double()[..., None, None] * far
    s = torch.where(seen, s, NEG_INF)
    # A sink is a key that every row has, with a score of its own and without a value. Without one: score -inf.
    sink = s.new_full((1, heads_q), NEG_INF) if sinks is None else sinks.detach().double()[None]
    sink = sink[..., None, None].expand(batch, heads_q, seq_q, 1)
    row_max = torch.cat([s, sink], -1).amax(-1, keepdim=True)
    # Where there is nothing the maximum is -inf, and 0 takes its place in the difference.
    safe_max = torch.where(row_max == NEG_INF, 0.0, row_max)
    e, e_sink = torch.where(seen, torch.exp(s - safe_max), 0.0), torch.exp(sink - safe_max)
    row_sum = e.sum(-1, keepdim=True) + e_sink
    nothing = ~seen.any(-1, keepdim=True) & (sink == NEG_INF)
    row_sum = torch.where(nothing, 1.0, row_sum)
    p, p_sink = e / row_sum, e_sink / row_sum
    lse = torch.where(nothing, NEG_INF, safe_max + torch.log(row_sum))[..., 0]
    kept = torch.ones_like(p) if keep is None else keep.double() / (1 - dropout_p)
    out = _weighted_sum(p * kept, v4, seen)
    result = Result(from_bhsd(out, layout, rank), lse_from_bhs(lse, rank), seen)
    if dout is None:
        return result

    do4 = to_bhsd(dout.double(), layout)
    dlse4 = torch.zeros_like(lse) if dlse is None else dlse.double().reshape(lse.shape)
    dp = _dot_rows(do4, v4, seen) * kept
    delta = torch.where(seen, p * dp, 0.0).sum(-1, keepdim=True)
    ds = torch.where(seen, p * (dp - delta + dlse4[..., None]), 0.0)
    squares = torch.where(seen, p * (dp.abs() + delta.abs() + dlse4[..., None].abs()), 0.0) ** 2
    if bias is not None:
        result.dbias = _sum_to_shape(ds, bias.shape)
        result.terms["dbias"] = largest(_sum_to_shape(squares, bias.shape)) ** 0.5
    if alibi_slopes is not None:
        slope_shape = (*alibi_slopes.shape, 1, 1)
        result.dalibi_slopes = _sum_to_shape(-ds * far, slope_shape)[..., 0, 0]
        result.terms["dalibi_slopes"] = largest(_sum_to_shape(squares * far**2, slope_shape)) ** 0.5
    if sinks is not None:
        # dp of a key without a value is 0. A row that sees nothing else is 0 whatever the sink is.
        looks = seen.any(-1, keepdim=True)
        row_grad, row_size = dlse4[..., None] - delta, dlse4[..., None].abs() + delta.abs()
        result.dsinks = torch.where(looks, p_sink * row_grad, 0.0).sum((0, 2, 3))
        result.terms["dsinks"] = (
            largest((torch.where(looks, p_sink * row_size, 0.0) ** 2).sum((0, 2, 3))) ** 0.5
        )
    ds = torch.where(seen, ds * slope * scale, 0.0)
    squares = squares * (slope * scale) ** 2
    result.terms["dq"] = largest(_weighted_sum(squares, k4**2, seen)) ** 0.5
    result.terms["dk"] = (
        largest(_weighted_sum(squares.transpose(-1, -2), q4**2, seen.transpose(-1, -2))) ** 0.5
    )
    seen_t = seen.transpose(-1, -2)
    dq = _weighted_sum(ds, k4, seen)
    dk = _weighted_sum(ds.transpose(-1, -2), q4, seen_t)
    dv = _weighted_sum((p * kept).transpose(-1, -2), do4, seen_t)
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
    alibi_slopes=None,
    sinks=None,
    dropout_p=0.0,
    keep=None,
    dout=None,
    dlse=None,
    lse_dtype=None,
    other=False,
    **hiding,
) -> Result:
    """What a torch user writes without a fused kernel, in the inputs' own dtype, differentiated by autograd.

    lse_dtype: that of the LSE's computation, by default the one that it is returned in: fp32, or fp64 for fp64.
    other: the second of two equally good formulations, with other products: the scale goes into q, products are
    taken transposed, keys come in reverse. Finite inputs only.
    """
    rank = q.dim()
    leaves = [
        x if x is None else x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for x in (q, k, v, bias, alibi_slopes, sinks)
    ]
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

    def scores_of(q, k, bias, slopes, dtype):
        q4, k4 = to_bhsd(q.to(dtype), layout), repeated(k.to(dtype))
        s = (
            product(q4 * factor, k4.transpose(-1, -2))
            if other
            else product(q4, k4.transpose(-1, -2)) * factor
        )
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        seen = visibility(s.shape, causal, window, mask, bias, kv_lengths, **hiding)
        if bias is not None:
            s = s + torch.where(seen, bias, 0.0).to(dtype)
        if slopes is not None:
            s = s - (slopes[..., None, None] * distances(*s.shape[-2:]).to(slopes.dtype)).to(dtype)
        some = seen.any(-1, keepdim=True)
        return torch.where(some, torch.where(seen, s, NEG_INF), 0.0), seen, some

    def with_sink(s, sink):
        """One more column; its score is a row's LSE where the row sees no key."""
        if sink is None:
            return s, s.new_tensor(NEG_INF)
        sink = sink.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)
        return torch.cat([s, sink], -1), sink.detach()[..., 0]

    def forward(q, k, v, bias, slopes, sink):
        s, seen, some = scores_of(q, k, bias, slopes, q.dtype)
        p = torch.where(some, torch.softmax(with_sink(s, sink)[0], -1)[..., : s.shape[-1]], 0.0)
        if keep is not None:
            p = p * keep.to(p.dtype) / (1 - dropout_p)
        wide, _, some = scores_of(q, k, bias, slopes, lse_dtype)
        wide, alone = with_sink(wide, sink)
        lse = torch.where(some[..., 0], torch.logsumexp(wide, -1), alone)
        return from_bhsd(product(p, repeated(v)), layout, rank), lse_from_bhs(lse, rank), seen

    out, lse, seen = forward(*leaves)
    result = Result(out.detach(), lse.detach(), seen)
    if dout is None:
        return result
    heads = (out, lse) if dlse is not None else (out,)
    given = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(heads, given, (dout, dlse)[: len(heads)], allow_unused=True)
    grads = iter(torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True))
    for name, leaf in zip(("dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks"), leaves, strict=True):
        setattr(result, name, None if leaf is None else next(grads))
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
