"""Jagged nested tensors as packed sequences, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._errors import choice
from ._problem import LAYOUTS

if TYPE_CHECKING:
    from ._extended import Arguments


def attention(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, attend: Callable):
    """`attend(q, k, v, arguments, packing)` of the packed values, made jagged again. In "bshd" (batch, seq,
    heads, dim) with a jagged seq, in "bhsd" (batch, heads, seq, dim); an LSE is (batch, heads, seq)."""
    if arguments.out is not None:
        raise ValueError("out must be None for nested tensors: it would have to share their offsets")
    layout = choice("layout", arguments.layout, LAYOUTS)
    given = {"q": q, "k": k, "v": v}
    packed = [_values(name, t, layout) for name, t in given.items()]
    offsets_q, offsets_k, offsets_v = (t.offsets() for t in given.values())
    if not _same(offsets_k, offsets_v):
        raise ValueError("v must have the same sequence lengths as k")
    if len(offsets_q) != len(offsets_k):
        raise ValueError(f"k has {len(offsets_k) - 1} sequences, q has {len(offsets_q) - 1}")
    longest = (_lengths(t)["max_seqlen"] for t in (q, k))
    packing = (offsets_q, offsets_k, *(-1 if n is None else n for n in longest))
    result = attend(*packed, arguments._replace(layout="bshd"), packing)
    out, lse = result if arguments.return_lse else (result, None)
    out = _jagged(out, q)
    out = out.transpose(1, 2) if layout == LAYOUTS["bhsd"] else out
    return (out, _jagged(lse.mT, q).transpose(1, 2)) if arguments.return_lse else out


def _values(name: str, t: object, layout: int) -> Tensor:
    """(total, heads, dim) of a jagged tensor, differentiable."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.layout != torch.jagged:
        given = f"a nested one of layout {t.layout}" if t.is_nested else "a dense one"
        raise TypeError(f"{name} must be a jagged nested Tensor like the others of q, k and v, got {given}")
    axis = 1 if layout == LAYOUTS["bshd"] else 2
    if t.dim() != 4 or t._ragged_idx != axis:
        raise ValueError(f"{name} must have rank 4 with axis {axis} jagged, got shape {tuple(t.shape)}")
    if t.lengths() is not None:
        raise ValueError(f"{name} must have no holes between its sequences; make it contiguous()")
    return (t if axis == 1 else t.transpose(1, 2)).values()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two offsets are known to be equal, without waiting for a device. A compiled call raises when it
    runs."""
    if torch.compiler.is_compiling() and len(a) == len(b):
        torch._assert_async((a == b).all(), "v must have the same sequence lengths as k")
        return True
    return a is b or (a.device.type == "cpu" and b.device.type == "cpu" and torch.equal(a, b))


def _jagged(values: Tensor, like: Tensor) -> Tensor:
    """(batch, seq, ...) of packed (total, ...), with the sequences of `like`."""
    return torch.nested.nested_tensor_from_jagged(values, like.offsets(), **_lengths(like))


def _lengths(t: Tensor) -> dict[str, int | None]:
    """Those of the shortest and the longest sequence, where they are known; torch's compiler cannot ask."""
    if torch.compiler.is_compiling():
        return {"min_seqlen": None, "max_seqlen": None}
    return {"min_seqlen": t._maybe_min_seqlen, "max_seqlen": t._maybe_max_seqlen}
