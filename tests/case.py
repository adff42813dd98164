"""What an attention problem is, and its tensors.

A `Case` says shapes and options without a dtype; `build(case, dtype)` makes its tensors, always the same ones
for the same name. Stride recipes and broadcast patterns are strings, so that a case prints as what it is.
"""

from __future__ import annotations

import functools
import math
import operator
import zlib
from dataclasses import dataclass, replace

import torch
from philox import keep_mask
from torch import Tensor
from typed_masks import Typed, draw_typed

import flash_attn_ext as fae
from flash_attn_ext import masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One problem. `mask` and `bias` are broadcast patterns over the letters b, h, q, k and 1, such as "b11k"."""

    name: str
    batch: int = 1
    heads: tuple[int, int] = (2, 2)  # query heads, key/value heads
    seq: tuple[int, int] = (33, 33)  # queries, keys
    dim: tuple[int, int] = (16, 16)  # D of q and k, Dv of v
    layout: str = "bshd"
    rank: int = 4
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float = 0.0
    mask: str | None = None
    mask_strides: str = "dense"
    bias: str | None = None
    bias_strides: str = "dense"
    bias_dtype: str = "same"
    bias_neg_inf: bool = False
    lengths: tuple[int, ...] | None = None
    lengths_dtype: str = "int32"
    strides: tuple[str, str, str] = ("dense", "dense", "dense")  # of q, k, v
    out_grad_strides: str = "dense"
    use_lse: bool = True  # whether a gradient flows through the LSE
    alibi: str | None = None  # the slopes' axes: "h" or "bh"
    alibi_dtype: str = "float32"
    sinks: str | None = None  # their dtype, or "same"
    dropout_p: float = 0.0
    typed: tuple[str, ...] = ()  # masks of `typed_masks.RECIPES`

    @property
    def is_extended(self) -> bool:
        """Whether it takes what the plain operators do not know."""
        return bool(self.alibi or self.sinks or self.dropout_p or self.typed)

    def options(self) -> dict:
        """The keyword arguments that are not tensors."""
        return dict(
            layout=self.layout, causal=self.causal, window=self.window, scale=self.scale, softcap=self.softcap
        )


@dataclass
class Inputs:
    """The tensors of a case; `kwargs()` is what to pass after q, k, v."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    keep: Tensor | None = None  # what dropout leaves after torch.manual_seed(seed)
    typed: tuple[Typed, ...] = ()
    seed: int = 0

    def to(self, device: str) -> Inputs:
        """The same numbers at the same strides on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: moved_to(device, value) for name, value in tensors.items()})

    def _shared(self) -> dict:
        names = ("bias", "kv_lengths", "alibi_slopes", "sinks")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {
            **self.case.options(),
            **given,
            **({"dropout_p": self.case.dropout_p} if self.case.dropout_p else {}),
        }

    def kwargs(self) -> dict:
        """For the package. With dropout it draws what `oracle` says after torch.manual_seed(seed)."""
        dense = () if self.mask is None else (masks.DenseMask(self.mask) if self.typed else self.mask,)
        every = (*(typed.mask for typed in self.typed), *dense)
        mask = functools.reduce(operator.and_, every) if every else None
        return {**self._shared(), **({} if mask is None else {"mask": mask})}

    def oracle(self) -> dict:
        """For `reference.attend` and `unfused`: masks drawn by their definition."""
        dense = [*(typed.dense for typed in self.typed), *(() if self.mask is None else (self.mask,))]
        mask = functools.reduce(operator.and_, dense) if dense else None
        more = {"mask": mask, "keep": self.keep}
        return {**self._shared(), **{name: t for name, t in more.items() if t is not None}}


def moved_to(device: str, t: Tensor) -> Tensor:
    """A copy on the device with the memory layout of `t`, which `Tensor.to` would tidy up."""
    memory = t.new_empty(0).set_(t.untyped_storage())
    return memory.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def laid_out(batch: int, heads: int, seq: int, dim: int, layout: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor in `layout` and `rank`."""
    if rank == 2:
        return (seq, dim)
    shape = (batch, seq, heads, dim) if layout == "bshd" else (batch, heads, seq, dim)
    return shape if rank == 4 else shape[1:]


def _strided(shape: tuple[int, ...], recipe: str, fill) -> Tensor:
    """A tensor of `shape` whose memory is as `recipe` says; fill(shape) makes dense values."""
    n = len(shape)
    if recipe == "dense":
        return fill(shape)
    if recipe == "transposed" and n >= 3:  # the other layout's memory
        axes = list(range(n))
        axes[-3], axes[-2] = axes[-2], axes[-3]
        return fill(tuple(shape[a] for a in axes)).permute(axes)
    if recipe in ("d_slow", "transposed"):  # the head dim is not the fastest axis
        return fill((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    if recipe == "step2":  # last-dim stride 2
        return fill((*shape[:-1], 2 * shape[-1]))[..., ::2]
    if recipe == "rows2":  # every other row and an odd start
        return fill((*shape[:-2], 2 * shape[-2] + 1, shape[-1]))[..., 1::2, :]
    if recipe == "offset":  # an unaligned start
        count = math.prod(shape)
        return fill((count + 7,))[3 : 3 + count].view(shape)
    if recipe == "padded":  # a slice of a packed tensor: rows further apart than they are long
        return fill((*shape[:-1], 3, shape[-1]))[..., 1, :]
    if recipe.startswith("expand"):  # stride 0 along one axis
        axis = int(recipe[6:])
        if shape[axis] == 0:
            return fill(shape)
        small = list(shape)
        small[axis] = 1
        return fill(tuple(small)).expand(shape)
    if recipe == "overlap":  # each step of an axis moves less than the axes inside it span
        strides = [1] * n
        for a in range(n - 2, -1, -1):
            strides[a] = max(1, (strides[a + 1] * shape[a + 1]) // 2 + 1)
        span = 1 + sum((s - 1) * t for s, t in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        return fill((max(span, 0),)).as_strided(shape, strides)
    raise ValueError(recipe)


def build(case: Case, dtype: torch.dtype, draw: int = 0) -> Inputs:
    """The tensors of `case` with q, k, v in `dtype`: the same values at every call, others for another `draw`."""
    seed = zlib.crc32(case.name.encode()) + draw
    g = torch.Generator().manual_seed(seed)
    (heads_q, heads_kv), (seq_q, seq_kv), (dim, dim_v) = case.heads, case.seq, case.dim

    def normal(t):
        return lambda shape: torch.randn(shape, generator=g, dtype=torch.float64).to(t)

    def qkv(heads, seq, width, recipe):
        shape = laid_out(case.batch, heads, seq, width, case.layout, case.rank)
        return _strided(shape, recipe, normal(dtype))

    def broadcast(pattern):
        sizes = {"b": case.batch, "h": heads_q, "q": seq_q, "k": seq_kv, "1": 1}
        return tuple(sizes[c] for c in pattern)

    q = qkv(heads_q, seq_q, dim, case.strides[0])
    k = qkv(heads_kv, seq_kv, dim, case.strides[1])
    v = qkv(heads_kv, seq_kv, dim_v, case.strides[2])
    dout = qkv(heads_q, seq_q, dim_v, case.out_grad_strides)
    lse_shape = {4: (case.batch, heads_q, seq_q), 3: (heads_q, seq_q), 2: (seq_q,)}[case.rank]
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = Inputs(case, q, k, v, dout, normal(lse_dtype)(lse_shape) if case.use_lse else None, seed=seed)

    if case.mask is not None:

        def holes(shape):
            allowed = torch.rand(shape, generator=g) < 0.7
            if "q" in case.mask and len(shape) == len(case.mask):
                allowed.narrow(case.mask.index("q"), 0, min(2, seq_q)).fill_(False)  # rows that see nothing
            return allowed

        inputs.mask = _strided(broadcast(case.mask), case.mask_strides, holes)
    if case.bias is not None:
        bias_dtype = dtype if case.bias_dtype == "same" else getattr(torch, case.bias_dtype)
        inputs.bias = _strided(broadcast(case.bias), case.bias_strides, normal(bias_dtype))
        if case.bias_neg_inf:
            hidden = torch.rand(inputs.bias.shape, generator=g) < 0.3
            inputs.bias = inputs.bias.masked_fill(hidden, float("-inf"))
    if case.lengths is not None:
        inputs.kv_lengths = torch.tensor(case.lengths, dtype=getattr(torch, case.lengths_dtype))
    if case.alibi is not None:
        inputs.alibi_slopes = normal(getattr(torch, case.alibi_dtype))(broadcast(case.alibi)) / 8
    if case.sinks is not None:
        inputs.sinks = normal(dtype if case.sinks == "same" else getattr(torch, case.sinks))((heads_q,))
    if case.dropout_p:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = fae.testing.next_rng_state("cpu")
        inputs.keep = keep_mask(state, case.batch, heads_q, seq_q, seq_kv, case.dropout_p)
    inputs.typed = tuple(draw_typed(name, case.batch, heads_q, seq_q, seq_kv, g) for name in case.typed)
    return inputs
