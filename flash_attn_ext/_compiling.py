"""What torch.compile is told, without importing it, and who else records what is called."""

from __future__ import annotations

from collections.abc import Callable

import torch

_RECORDERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)


def is_recorded() -> bool:
    """Whether torch.jit.trace or make_fx keeps the operators that are called, to run them again on others."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _RECORDERS))


def constant_when_compiled(function: Callable) -> Callable:
    """Marks a function whose result a compiled graph may keep, as torch.compiler.assume_constant_result does.

    That decorator imports the whole compiler to set this attribute, as long again as importing torch.
    """
    function._dynamo_marked_constant = True
    return function
