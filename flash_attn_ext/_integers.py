"""Integers that a caller gives, as Python or torch has them."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor


def as_integer(name: str, value: object) -> int:
    """One that NumPy or torch may have made."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        given = f"a Tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int, got {given}") from None


def as_integers(name: str, values: object, device: torch.device) -> Tensor:
    """One or several as int64, of the shape that they have."""
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must hold ints, got a Tensor of {values.dtype}")
        return values.to(device, torch.int64)
    if isinstance(values, Iterable) and not isinstance(values, str):
        values = [as_integer(f"{name}[{n}]", value) for n, value in enumerate(values)]
    else:
        values = as_integer(name, values)
    try:
        return torch.tensor(values, dtype=torch.int64, device=device)
    except (OverflowError, RuntimeError, ValueError):
        raise ValueError(f"{name} must fit int64, got {values}") from None
