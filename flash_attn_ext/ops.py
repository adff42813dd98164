"""The operators, loaded and named: everything in `torch.ops.flash_attn_ext`.

| operator | what | where it runs |
|---|---|---|
| `attention_forward`, `attention_forward_out` | (out, lse) | CPU and CUDA kernels (C++) |
| `attention_backward` | (dq, dk, dv, dbias) | CPU and CUDA kernels (C++) |
| `attention` | attention_forward with autograd and autocast | as attention_forward |
| `portable_forward`, `portable_backward`, `portable` | the same three by `portable.py` | any device |

Eager calls use `attention_forward` without the dispatcher's autograd layer, which costs
more than a small attention; tracing (compile, export, torch.func) sees `attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _cuda, portable
from ._load import load_operators

load_operators()
_cuda.load()

_library = torch.library.Library("flash_attn_ext", "FRAGMENT")
_OPTIONS = (
    "Tensor? mask, Tensor? bias, Tensor? kv_lengths, int layout, int causal, "
    "int window_left, int window_right, float? scale, float softcap"
)
_BLOCKS = "int block_q=0, int block_kv=0"
_FORWARD = (
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool return_lse, {_BLOCKS}) -> (Tensor out, Tensor lse)"
)
_BACKWARD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool need_bias_grad, {_BLOCKS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)
for _name, _schema, _kernel in (
    ("portable", _FORWARD, portable.forward),
    ("portable_forward", _FORWARD, portable.forward),
    ("portable_backward", _BACKWARD, portable.backward),
):
    _library.define(_name + _schema)
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


class Operators(NamedTuple):
    """The operators of one family. What a backend wants to be told beyond the options (block sizes,
    determinism) follows as the last arguments of each."""

    attention: torch._ops.OpOverload  # differentiable
    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    forward_out: torch._ops.OpOverload | None


def named(name: str) -> Operators:
    """The operators `name`, `name`_forward, `name`_backward and, if there is one, `name`_forward_out."""
    family = torch.ops.flash_attn_ext
    found = (getattr(family, name + end, None) for end in ("", "_forward", "_backward", "_forward_out"))
    return Operators(*(packet and packet.default for packet in found))


KERNELS = named("attention")
PORTABLE = named("portable")
BY_BACKEND = {"cpu": KERNELS, "cuda": KERNELS, "portable": PORTABLE}
