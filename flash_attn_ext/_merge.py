"""The one merge of partial results: attention over disjoint sets of keys is a monoid of (out, lse) states."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the union, out in `dtype`, lse in its own; differentiable.

    out_a, out_b: (..., dim_v) of any floating dtype; lse_a, lse_b: (..., 1), of one dtype, -inf for a state
    without keys, whose out counts for nothing. The neutral element is any out with -inf.
    """
    # The shift cancels out of the result, so no gradient is due to it.
    shift = torch.maximum(lse_a, lse_b).detach()
    shift = shift.masked_fill(shift == -math.inf, 0)
    weight_a, weight_b = (lse_a - shift).exp(), (lse_b - shift).exp()
    total = weight_a + weight_b
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    out = sum(
        out.to(dtype).masked_fill(lse == -math.inf, 0) * (weight / total).to(dtype)
        for out, lse, weight in ((out_a, lse_a, weight_a), (out_b, lse_b, weight_b))
    )
    return out, (shift + total.log()).masked_fill(nothing, -math.inf)
