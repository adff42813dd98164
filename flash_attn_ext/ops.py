"""The operators, loaded and named: everything in `torch.ops.flash_attn_ext`.

| operator | what | where it runs |
|---|---|---|
| `attention_forward`, `attention_forward_out` | (out, lse) | CPU and CUDA kernels (C++) |
| `attention_backward` | (dq, dk, dv, dbias) | CPU and CUDA kernels (C++) |
| `attention_kvcache` | (out, lse) over a cache, after appending to it | CPU and CUDA kernels (C++) |
| `attention` | attention_forward with autograd and autocast | as attention_forward |
| `portable_forward`, `portable_backward`, `portable` | the same three by `portable.py` | any device |
| `attention_extended`..., `portable_extended`... | the same with all `Options` | as the same without |

The extended operators' backward has two more results, (dalibi_slopes, dsinks).

Eager calls use `attention_forward` without the dispatcher's autograd layer, which costs
more than a small attention; tracing (compile, export, torch.func) sees `attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import _cuda, portable
from ._load import load_operators
from ._options import EXTENDED, EXTENDED_TENSORS, PLAIN, PLAIN_TENSORS, Options

load_operators()
_cuda.load()


class Family(NamedTuple):
    """What operators have in common: the options that they take, in order, the tensors among them first.
    Places are those in a forward operator's arguments: q, k, v, the options, return_lse, and what a backend
    wants to be told beyond that."""

    options: tuple[str, ...]
    tensors: tuple[str, ...]
    differentiable: tuple[str, ...]  # of the tensors; q, k and v are anyway
    places: tuple[int, ...]  # of the differentiable
    first_number: int
    numbers: int  # how many options are no tensors; return_lse follows them

    @classmethod
    def make(
        cls, options: tuple[str, ...], tensors: tuple[str, ...], differentiable: tuple[str, ...]
    ) -> Family:
        places = tuple(3 + options.index(name) for name in differentiable)
        return cls(options, tensors, differentiable, places, 3 + len(tensors), len(options) - len(tensors))

    def read(self, arguments: tuple) -> tuple[Options, tuple]:
        """The options that stand first in `arguments`, and the rest."""
        count = len(self.options)
        return Options(**dict(zip(self.options, arguments, strict=False))), arguments[count:]


PLAIN_FAMILY = Family.make(PLAIN, PLAIN_TENSORS, ("bias",))
EXTENDED_FAMILY = Family.make(EXTENDED, EXTENDED_TENSORS, portable.Needs._fields)

_TYPES = {"scale": "float?", "softcap": "float", "dropout_p": "float"}
_BLOCKS = "int block_q=0, int block_kv=0"


def _schemas(family: Family) -> tuple[str, str]:
    """Those of forward and of backward, without the name."""
    tensors = [f"Tensor? {name}" for name in family.tensors]
    numbers = [f"{_TYPES.get(name, 'int')} {name}" for name in family.options[len(tensors) :]]
    options = ", ".join([*tensors, *numbers])
    needs = ", ".join(
        f"bool need_{name}_grad" for name in ("bias", "slope", "sink")[: len(family.differentiable)]
    )
    grads = ", ".join(f"Tensor d{name}" for name in ("q", "k", "v", *family.differentiable))
    saved = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
    return (
        f"(Tensor q, Tensor k, Tensor v, {options}, bool return_lse, {_BLOCKS}) -> (Tensor out, Tensor lse)",
        f"({saved}, {options}, {needs}, {_BLOCKS}) -> ({grads})",
    )


def _portable_kernels(family: Family) -> tuple[Callable, Callable]:
    """`portable.forward` and `portable.backward` for the arguments of the operators."""
    count = len(family.differentiable)

    def forward(q, k, v, *arguments):
        options, rest = family.read(arguments)
        return portable.forward(q, k, v, options, *rest)

    def backward(dout, dlse, q, k, v, out, lse, *arguments):
        options, rest = family.read(arguments)
        needs = portable.Needs(*rest[:count])
        return portable.backward(dout, dlse, q, k, v, out, lse, options, needs, *rest[count:])[: 3 + count]

    return forward, backward


_library = torch.library.Library("flash_attn_ext", "FRAGMENT")
for _name, _family in (("portable", PLAIN_FAMILY), ("portable_extended", EXTENDED_FAMILY)):
    _forward, _backward = _portable_kernels(_family)
    _forward_schema, _backward_schema = _schemas(_family)
    for _end, _schema, _kernel in (
        ("", _forward_schema, _forward),
        ("_forward", _forward_schema, _forward),
        ("_backward", _backward_schema, _backward),
    ):
        _library.define(_name + _end + _schema)
        _library.impl(_name + _end, _kernel, "CompositeExplicitAutograd")


@dataclass(frozen=True)  # not a tuple: torch.func would take it apart
class Operators:
    """The operators of one family and backend. What a backend wants to be told beyond the options (block
    sizes, determinism) follows as the last arguments of each."""

    family: Family
    attention: torch._ops.OpOverload  # differentiable
    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    forward_out: torch._ops.OpOverload | None

    def backward_of_part(self, given: tuple, options: Options, own: tuple) -> tuple[torch.Tensor, ...]:
        """(dq, dk, dv) as far as they come from the keys in `given`: the arguments of `backward` before the
        options, where out, lse and their gradients may be of more keys. `own`: what the backend wants to be
        told."""
        if self in (PORTABLE, PORTABLE_EXTENDED):
            return portable.backward(*given, options, portable.Needs(), *own, of_part=True)[:3]
        taken = tuple(options) if self.family is EXTENDED_FAMILY else options.plain()
        needs = (False,) * len(self.family.differentiable)
        return self.backward(*given, *taken, *needs, *own)[:3]

    # The operators without the frame of Python around them.
    @functools.cached_property
    def call(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        return getattr(self.forward, "_op", self.forward)

    @functools.cached_property
    def call_backward(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        return getattr(self.backward, "_op", self.backward)


def named(name: str, family: Family = PLAIN_FAMILY) -> Operators | None:
    """The operators `name`, `name`_forward, `name`_backward and, if there is one, `name`_forward_out."""
    every = torch.ops.flash_attn_ext
    found = [getattr(every, name + end, None) for end in ("", "_forward", "_backward", "_forward_out")]
    return Operators(family, *(packet and packet.default for packet in found)) if found[0] else None


KERNELS = named("attention")
PORTABLE = named("portable")
KERNELS_EXTENDED = named("attention_extended", EXTENDED_FAMILY)
PORTABLE_EXTENDED = named("portable_extended", EXTENDED_FAMILY)
# "standard" has no operators, but its calls are those of this family.
BY_BACKEND = {"cpu": KERNELS, "cuda": KERNELS, "portable": PORTABLE, "standard": PORTABLE}
EXTENDED_BY_BACKEND = {
    "cpu": KERNELS_EXTENDED,
    "cuda": KERNELS_EXTENDED,
    "portable": PORTABLE_EXTENDED,
    "standard": PORTABLE_EXTENDED,
}
