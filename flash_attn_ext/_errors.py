"""One kind of error text, whichever side found the mistake.

The C++ validator is the only predicate. Its operators raise `RuntimeError` with a
tagged text; `translate` turns that into the exception that a Python caller expects.
The plain torch backends ask the same predicate through `check_call`.
"""

from __future__ import annotations

import re
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import _C
from ._options import EXTENDED_NUMBERS, EXTENDED_TENSORS, PLAIN_TENSORS, Options
from ._problem import AS_GIVEN, LAYOUTS, OPERATOR_LAYOUTS

_KINDS = {
    "value": ValueError,
    "type": TypeError,
    "not_implemented": NotImplementedError,
    "runtime": RuntimeError,
}
_TAGGED = re.compile(r"\[fae:(\w+)\] (.*)")
# What torch says when an argument cannot be converted to its schema type.
_SCHEMA = re.compile(
    r"Expected a value of type '([^']+)' for argument '(\w+)' but instead found type '([^']+)'"
)


def translate(error: RuntimeError) -> Exception:
    """The exception to show instead of `error`; `error` itself when it is none of ours."""
    text = str(error)
    if tagged := _TAGGED.search(text):
        return _KINDS[tagged[1]](tagged[2])
    if schema := _SCHEMA.search(text):
        expected, name, given = schema.groups()
        return TypeError(f"{name} must be {_described(expected)}, got {given}")
    return error


def _described(schema_type: str) -> str:
    optional = schema_type.startswith("Optional[")
    name = schema_type.removeprefix("Optional[").removesuffix("]")
    name = "a Tensor" if name == "Tensor" else f"of type {name}"
    return f"{name} or None" if optional else name


class WrongValueError(ValueError, RuntimeError):
    """An argument's value, shape or device, where callers may expect the RuntimeError of another package."""


class WrongTypeError(TypeError, RuntimeError):
    """An argument's type or dtype, likewise."""


def also_runtime_error(error: Exception, text: str) -> Exception:
    """`error` with this text, as a RuntimeError too."""
    if isinstance(error, (ValueError, TypeError)) and not isinstance(error, RuntimeError):
        return (WrongValueError if isinstance(error, ValueError) else WrongTypeError)(text)
    return type(error)(text)


def causal_variant(value: object) -> str | None:
    """What a mask of `torch.nn.attention.bias` stands for, as `causal`; its memory was never written."""
    # The module is slow to import, and without it there is no such mask.
    module = sys.modules.get("torch.nn.attention.bias")
    if module is None or not isinstance(value, module.CausalBias):
        return None
    return "top_left" if value.variant == module.CausalVariant.UPPER_LEFT else "bottom_right"


def check_tensor(name: str, value: object) -> None:
    """Raise a `TypeError` that names `value` when it is not a dense tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense Tensor, got one of layout {layout}")
    if causal_variant(value) is not None:
        raise TypeError(f"{name} must hold its values, got a CausalBias: pass causal='top_left' or True")


def choice(name: str, value: object, allowed: dict):
    """`allowed[value]`, or an error that lists what is allowed."""
    try:
        return allowed[value]
    except (KeyError, TypeError):
        kind = ValueError if isinstance(value, (str, int)) else TypeError
        raise kind(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}") from None


def describe(tensor: torch.Tensor | None, with_address: bool) -> tuple | None:
    """A tensor in the form that `_C` reads."""
    if tensor is None:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    place = (tuple(tensor.shape), tuple(tensor.stride()), dtype, tensor.device.type)
    return (*place, tensor.data_ptr()) if with_address else place


def _is_readable(tensor: torch.Tensor | None) -> bool:
    """Whether the validator may look at the values."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.device.type == "cpu"
        and not isinstance(tensor, FakeTensor)
    )


def call_desc(q, k, v, options: Options, out: torch.Tensor | None = None) -> dict:
    """The call in the form that `_C.validate` and `_C.plan` read."""
    named = {"q": q, "k": k, "v": v, "out": out} | {name: getattr(options, name) for name in PLAIN_TENSORS}
    numbers = {}
    if options.is_extended():
        named |= {name: getattr(options, name) for name in EXTENDED_TENSORS}
        numbers = {name: getattr(options, name) for name in EXTENDED_NUMBERS}
    # Addresses tell whether `out` overlaps an input. A tensor that is being traced has none.
    with_address = out is not None and out.device.type != "meta" and not isinstance(out, FakeTensor)
    desc: dict = {
        name: describe(tensor, with_address or (name.startswith("cu_seqlens") and _is_readable(tensor)))
        for name, tensor in named.items()
    }
    desc.update(
        layout=LAYOUTS["bhsd"] if options.layout == OPERATOR_LAYOUTS[AS_GIVEN] else options.layout,
        causal=options.causal,
        window=(options.window_left, options.window_right),
        scale=options.scale,
        softcap=options.softcap,
        **numbers,
    )
    return desc


def check_call(q, k, v, options: Options, out: torch.Tensor | None = None) -> None:
    """Raise what the C++ operators would raise for this call."""
    raise_if(_C.validate(call_desc(q, k, v, options, out)))


def raise_if(error: tuple[str, str] | None) -> None:
    """Raise what a validator of `_C` found, if anything."""
    if error:
        kind, text = error
        raise _KINDS[kind](text)
