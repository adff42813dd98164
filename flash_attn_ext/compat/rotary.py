"""`flash_attn.layers.rotary`: rotary position embedding, on any device, differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._cache_call import rotate

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turn the first rotary_dim elements of every head by the angles of its position.

    Args:
        x: (batch, seq, heads, dim), floating; with `cu_seqlens` (total, heads, dim).
        cos, sin: (positions, rotary_dim / 2), floating, rotary_dim <= dim; row i belongs to position i.
        interleaved: pairs are elements (0, 1), (2, 3), ... (GPT-J), instead of (0, rotary_dim / 2), ...
            (GPT-NeoX, Llama).
        inplace: write into x, which is then the result; x may be a leaf that requires grad. A view is
            written to behind autograd's back: its values must not have been saved for another's gradient.
        seqlen_offsets: the position of a sequence's first row: one for all, or integers (batch,).
        cu_seqlens: (batch + 1,) integers; sequence b is rows [cu_seqlens[b], cu_seqlens[b + 1]) of x.
        max_seqlen: as in flash_attn, where it sizes a grid; not needed here.

    Returns:
        A tensor like x. Rows at positions that the table lacks, or behind the last sequence, stay what they
        are.

    Raises:
        ValueError: shapes that do not fit, or a table too short for an integer `seqlen_offsets`.

    Example:
        >>> angles = torch.outer(torch.arange(16.0), 10000 ** (-torch.arange(4.0) / 4))
        >>> apply_rotary_emb(torch.randn(2, 16, 4, 8), angles.cos(), angles.sin()).shape
        torch.Size([2, 16, 4, 8])

    Source: Su et al., RoFormer, 2021, arXiv:2104.09864, equation 34.
    """
    if x.dim() != (4 if cu_seqlens is None else 3):
        expected = "(batch, seq, heads, dim)" if cu_seqlens is None else "(total, heads, dim)"
        raise ValueError(f"x must be {expected}, got shape {tuple(x.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos and sin must be (positions, rotary_dim / 2) with rotary_dim <= {x.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    positions = _positions(x, len(cos), seqlen_offsets, cu_seqlens)
    # One more row, for positions that the table lacks: no turn.
    cos, sin = torch.cat((cos, torch.ones_like(cos[:1]))), torch.cat((sin, torch.zeros_like(sin[:1])))
    cos, sin = cos[positions], sin[positions]
    if not inplace:
        return rotate(x, cos, sin, interleaved)
    return _in_place(x, lambda t, back: t.copy_(rotate(t, cos, -sin if back else sin, interleaved)))


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`apply_rotary_emb` for angles of each row: cos and sin (seq, rotary_dim / 2), perhaps with a batch."""
    return rotate(x, cos, sin, interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turns queries and keys in place; qkv is the result.

    Args:
        qkv: (batch, seq, 3, heads, dim); or (batch, seq, heads_q + 2 * heads_kv, dim) with `num_heads_q`.
        cos_k, sin_k: tables for the keys, where they have their own.
        Others: as for `apply_rotary_emb`.

    Raises:
        ValueError: shapes that do not fit.
    """
    packed = qkv.dim() == 5 and qkv.shape[2] == 3
    others = qkv.shape[2] - num_heads_q if qkv.dim() == 4 and num_heads_q is not None else -1
    if not packed and (others < 0 or others % 2):
        raise ValueError(
            "qkv must be (batch, seq, 3, heads, dim), or (batch, seq, heads_q + 2 * heads_kv, dim) with "
            f"num_heads_q, got {tuple(qkv.shape)} and num_heads_q {num_heads_q}"
        )
    tables = [(cos, sin), (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)]

    def turn(t: Tensor, back: bool) -> None:
        parts = t.unbind(2) if packed else t.split([num_heads_q, others // 2, others // 2], 2)
        for part, (c, s) in zip(parts, tables, strict=False):
            apply_rotary_emb(part, c, -s if back else s, interleaved, True, seqlen_offsets)

    return _in_place(qkv, turn)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turns the keys of kv (batch, seq, 2, heads, dim) in place; kv is the result. See `apply_rotary_emb`."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be (batch, seq, 2, heads, dim), got {tuple(kv.shape)}")

    def turn(t: Tensor, back: bool) -> None:
        apply_rotary_emb(t[:, :, 0], cos, -sin if back else sin, interleaved, True, seqlen_offsets)

    return _in_place(kv, turn)


class RotaryEmbedding(torch.nn.Module):
    """The angles of a head's pairs, and their application to queries and keys in place.

    Pair p of position i is turned by i * base ** (-2 p / dim). With `scale_base` (xPos, Sun et al., 2022,
    arXiv:2212.10554) its query is also scaled by ((2 p / dim + 0.4) / 1.4) ** ((i - n // 2) / scale_base),
    where n positions have tables, and its key by the inverse.

    Args:
        dim: how many elements of a head are turned; even.
        base: of the wave lengths.
        interleaved: see `apply_rotary_emb`.
        scale_base: None, or positions per power; 512 is usual.
        device: of the buffers.

    Example:
        >>> rotary = RotaryEmbedding(32)
        >>> rotary(torch.randn(2, 16, 3, 4, 64)).shape
        torch.Size([2, 16, 3, 4, 64])
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        # Tables (positions, dim / 2); the keys have their own where there is a scale.
        self._cos_cached = self._sin_cached = self._cos_k_cached = self._sin_k_cached = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return self.base ** (-even / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Tables for so many positions, unless they are there."""
        have = self._cos_cached
        usable = have is not None and have.device == torch.device(device or "cpu") and have.dtype == dtype
        if usable and seqlen <= self._seq_len_cached and not (self.training and have.is_inference()):
            return
        self._seq_len_cached = seqlen
        # Angles are large numbers: float32 also where a model was cast to something narrower.
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq()
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = position[:, None] * inv_freq.to(position.device)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (position - seqlen // 2) / self.scale_base
        scale = self.scale.to(position.device, torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns queries and keys in place.

        Args:
            qkv: as for `apply_rotary_emb_qkv_`; with `kv` the queries (batch, seq, heads, dim).
            kv: (batch, seq, 2, heads, dim).
            seqlen_offset: the position of the first row: one for all, or integers (batch,) with `max_seqlen`.
            max_seqlen: positions that tables are made for.
            num_heads_q: as for `apply_rotary_emb_qkv_`.

        Returns:
            qkv; or (qkv, kv).

        Raises:
            ValueError: shapes that do not fit; offsets in a tensor, and no max_seqlen at the first call.
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif self._cos_cached is None:
            raise ValueError("max_seqlen must be given with a tensor of seqlen_offset: it sizes the tables")
        queries = (self._cos_cached, self._sin_cached)
        keys = queries if self.scale is None else (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, *queries, *keys, self.interleaved, seqlen_offset, num_heads_q=num_heads_q
            )
        turned = apply_rotary_emb(qkv, *queries, self.interleaved, True, seqlen_offset)
        return turned, apply_rotary_emb_kv_(kv, *keys, self.interleaved, seqlen_offset)


class _InPlace(torch.autograd.Function):
    """Turns a tensor where it lies, a leaf, too, as in flash_attn; the gradient is turned back."""

    @staticmethod
    def forward(ctx, x, turn, back, unseen):
        ctx.turn, ctx.back = turn, back
        turn(x.data if unseen else x, back)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _InPlace.apply(grad.clone(), ctx.turn, not ctx.back, False), None, None, None


def _in_place(x: Tensor, turn: Callable[[Tensor, bool], object]) -> Tensor:
    """turn(t, back) turns t in place."""
    if torch.is_grad_enabled() and x.requires_grad:
        # Queries and keys may be slices of one projection. To write to one would invalidate the other, so a
        # view is written to unseen by autograd, as flash_attn's kernels do. What is no view has no such
        # neighbours, and there autograd goes on to find who has saved the values that were overwritten.
        return _InPlace.apply(x, turn, False, x._base is not None)
    turn(x, False)
    return x


def _positions(x: Tensor, table: int, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Rows of a table of so many positions, and `table` for those that it lacks: (batch, seq) or (total,)."""
    if cu_seqlens is None:
        rows = torch.arange(x.shape[1], device=x.device)
        if isinstance(offsets, int):
            if not 0 <= offsets <= table - len(rows):
                raise ValueError(
                    f"seqlen_offsets {offsets} and {len(rows)} rows exceed the {table} positions of cos"
                )
            return rows + offsets
        positions = offsets[:, None] + rows
    else:
        rows = torch.arange(len(x), device=x.device)
        sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
        beyond = sequence >= len(cu_seqlens) - 1
        sequence = sequence.clamp(max=len(cu_seqlens) - 2)
        offset = offsets if isinstance(offsets, int) else offsets[sequence]
        positions = (rows - cu_seqlens[sequence] + offset).masked_fill(beyond, table)
    return positions.masked_fill((positions < 0) | (positions > table), table)
