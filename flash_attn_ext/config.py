"""`AttentionConfig`: advice on tiles and backend, with presets for common devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# (block_q, block_kv) whose q, k and v tiles fit a multiprocessor's shared memory at
# dim 128 in 16 bits: 163 KiB on A100, 227 KiB on H100 and H200, 99 KiB on Ada and
# consumer Ampere. The CPU's tiles live in its second-level cache.
_PRESETS = {
    "a100": (128, 128),
    "h100": (128, 128),
    "h200": (128, 128),
    "rtx4090": (128, 64),
    "rtx3090": (128, 64),
    "l4": (64, 64),
    "cpu": (192, 512),
    "mps": (64, 64),
    "xpu": (128, 64),
}


@dataclass(frozen=True)
class AttentionConfig:
    """How an attention call should be carried out. `None` leaves a choice to the backend.

    Args:
        block_q: query rows per tile, 1 or more.
        block_kv: keys per tile, 1 or more.
        num_splits: pieces that the keys of one head are cut into, 1 or more.
        backend: "auto", "cpu", "cuda", "portable" or "standard".
        softmax_scale: any finite float; `None` is 1 / sqrt(dim).

    Tiles and splits are advice: they change speed and the last bits, never the meaning of a
    result. The same advice gives the same bits, for any number of threads. What becomes of it:

    | field | "cpu" | "portable" | "cuda" | "standard" |
    |---|---|---|---|---|
    | block_q | in whole register tiles | as given; 1 when `batch_invariant` | not used | not used |
    | block_kv | in whole register tiles | as given | not used | not used |
    | num_splits | up to 12 rows and many keys | not used | forward, unless `batch_invariant` | not used |

    "cpu" counts the rows of all query heads that share a K/V head, and stops at 4096 or a few
    megabytes of workspace per thread. Both take their blocks forward and backward. `explain`
    says what is used; what is not used is logged once, as a warning.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, by name.

    Example:
        >>> config = AttentionConfig.for_device("a100")
        >>> config.block_q, config.sram_bytes(dim=128, dtype=torch.float16)
        (128, 98304)
    """

    block_q: int | None = None
    block_kv: int | None = None
    num_splits: int | None = None
    backend: str = "auto"
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        from .dispatch import check_backend_name

        for name in ("block_q", "block_kv", "num_splits"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int or None, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_backend_name("backend", self.backend)
        scale = self.softmax_scale
        if scale is not None:
            if not isinstance(scale, (int, float)) or isinstance(scale, bool):
                raise TypeError(f"softmax_scale must be a float or None, got {scale!r}")
            if not math.isfinite(scale):
                raise ValueError(f"softmax_scale must be finite, got {scale}")

    @classmethod
    def for_device(cls, device: str | torch.device) -> AttentionConfig:
        """The preset for a device: a name such as "h100" or "RTX 4090", or a `torch.device`.

        Raises:
            ValueError: no preset has that name; the message lists those there are.
            TypeError: neither a name nor a device.
        """
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"device must be a str or torch.device, got {type(device).__name__}")
        name = _device_name(device)
        key = "".join(c for c in name.lower() if c.isalnum())
        for preset, (block_q, block_kv) in _PRESETS.items():
            if preset in key:
                return cls(block_q=block_q, block_kv=block_kv)
        presets = ", ".join(map(repr, _PRESETS))
        raise ValueError(f"device must be one of {presets} or a torch.device, got {name!r}")

    def sram_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes that one q tile, one k tile and one v tile take: (block_q + 2 block_kv) * dim elements.

        Blocks that are `None` count as the "cpu" preset's.
        """
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be an int of at least 1, got {dim!r}")
        block_q, block_kv = _PRESETS["cpu"]
        rows = (self.block_q or block_q) + 2 * (self.block_kv or block_kv)
        return rows * dim * dtype.itemsize


def _device_name(device: str | torch.device) -> str:
    """What a CUDA device calls itself; the type of any other."""
    if isinstance(device, str) and not device.startswith("cuda"):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    if not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, and this torch sees no CUDA device")
    return torch.cuda.get_device_name(device)
