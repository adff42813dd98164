"""What makes the scores, from flash_attn's arguments to this package's."""

from __future__ import annotations

from torch import Tensor


def scores_of(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict:
    """scale, causal, window, softcap and alibi_slopes as `flash_attention` takes them.

    flash_attn's windows are any two integers, of a tensor too, and every negative one is unbounded; so is a
    softcap that is not above 0. What is of a wrong type goes on, to where its error names it.
    """
    if isinstance(window_size, Tensor):
        window_size = window_size.tolist()
    if isinstance(window_size, (tuple, list)):
        window_size = tuple(-1 if hasattr(n, "__index__") and n < 0 else n for n in window_size)
    if isinstance(softcap, (int, float)):
        softcap = max(softcap, 0.0)
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
