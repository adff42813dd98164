"""flash_attn raises RuntimeError where this package raises ValueError or TypeError: here an error is both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .._errors import also_runtime_error

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def as_runtime_errors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, whose errors callers may also catch as flash_attn's."""

    @functools.wraps(function)
    def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **options)
        except RuntimeError:  # one of these from a function within, or NotImplementedError
            raise
        except (TypeError, ValueError) as error:
            raise also_runtime_error(error, str(error)) from error

    # inspect.getfullargspec, by which callers learn what there is, does not look behind a wrapper.
    wrapped.__signature__ = inspect.signature(function)
    return wrapped
