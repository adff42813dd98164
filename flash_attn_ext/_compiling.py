"""What torch.compile is told, without importing it."""

from __future__ import annotations

from collections.abc import Callable


def constant_when_compiled(function: Callable) -> Callable:
    """Marks a function whose result a compiled graph may keep, as torch.compiler.assume_constant_result does.

    That decorator imports the whole compiler to set this attribute, as long again as importing torch.
    """
    function._dynamo_marked_constant = True
    return function
