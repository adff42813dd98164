"""The `causal` and `window` arguments as the operators take them."""

from __future__ import annotations

import operator

CAUSAL = {False: 0, True: 1, "bottom_right": 1, "top_left": 2}
_FAR = 1 << 62  # a window that reaches this far is unbounded, and fits an operator's int


def window_bounds(window: object) -> tuple[int, int]:
    """(left, right) with -1 for None."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be None or a pair (left, right), got {window!r}")
    return _window_side(window[0], window), _window_side(window[1], window)


def _window_side(side: object, window: tuple | list) -> int:
    if side is None:
        return -1
    if isinstance(side, bool) or not (isinstance(side, int) or hasattr(side, "__index__")):
        raise TypeError(f"window must hold ints or None, got {window!r}")
    if not isinstance(side, int):
        side = operator.index(side)
    return -1 if side >= _FAR else side
