"""The attention masks of transformers without their tensors of (seq_q, seq_kv).

transformers says which keys a query sees by a function of indices, made of a few known ones: causal, windows,
chunks, packed sequences. `read` recognises them, and `of_pattern` says the same by `flash_attn_ext.masks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from transformers import masking_utils as hf

from .._lowering import INT32, Lowering, Sizes
from ..masks import CausalMask, DenseMask, DocumentMask, Mask, WindowMask


class CompactMask:
    """Which keys each query of a batch sees, in memory linear in the lengths; models hand it through.

    In a model that computes with its mask it turns into the dense tensor: when it is indexed, given to a
    torch function, or asked for a method of tensors.

    Args:
        seen: a mask of `flash_attn_ext.masks`, for the first `keys` keys.
        shape: (batch, 1, seq_q, seq_kv) of the dense tensor.
        keys: those past it are hidden from all queries: a static cache has not filled them.
        device: where the dense tensor would be.
        dtype: of the dense tensor: bool, True = may attend; or floating, 0 there and else the least number,
            as models have it that know the masks of "eager" alone.
    """

    ndim = 4

    def __init__(
        self,
        seen: Mask,
        shape: tuple[int, int, int, int],
        keys: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.bool,
    ):
        self.seen = seen
        self.dtype = dtype
        self.shape = shape
        self.keys = keys
        self.device = torch.device(device)

    def __repr__(self) -> str:
        return f"CompactMask({self.seen!r}, shape={tuple(self.shape)}, keys={self.keys})"

    def dense(self) -> Tensor:
        """(batch, 1, seq_q, seq_kv)."""
        batch, heads, seq_q, seq_kv = self.shape
        seen = self.seen.dense(batch, heads, seq_q, self.keys, device=self.device)
        seen = seen.expand(batch, heads, seq_q, self.keys)
        if self.keys != seq_kv:
            seen = torch.nn.functional.pad(seen, (0, seq_kv - self.keys))
        if self.dtype == torch.bool:
            return seen
        return torch.where(seen, seen.new_zeros((), dtype=self.dtype), torch.finfo(self.dtype).min)

    def to(self, device: torch.device | str | None = None, *args, **kwargs) -> CompactMask | Tensor:
        """On another device; another dtype makes it dense."""
        if args or "dtype" in kwargs or not isinstance(device, (torch.device, str, int)):
            return self.dense().to(*(() if device is None else (device,)), *args, **kwargs)
        return CompactMask(_moved(self.seen, device), self.shape, self.keys, device, self.dtype)

    def for_eager(self, dtype: torch.dtype) -> CompactMask:
        """The same, which turns into a mask of "eager"."""
        return CompactMask(self.seen, self.shape, self.keys, self.device, dtype)

    def dim(self) -> int:
        return 4

    def size(self, axis: int | None = None) -> tuple[int, ...] | int:
        return self.shape if axis is None else self.shape[axis]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> Tensor:
        return self.dense()[index]

    def __and__(self, other) -> Tensor:
        return self.dense() & other

    def __or__(self, other) -> Tensor:
        return self.dense() | other

    def __invert__(self) -> Tensor:
        return ~self.dense()

    def __getattr__(self, name: str):
        # Only methods of tensors, lest a probe for something else draws the mask.
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"CompactMask has no attribute {name!r}")
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map(
            lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _moved(mask: Mask, device) -> Mask:
    def move(value):
        if isinstance(value, tuple):
            return tuple(_moved(part, device) for part in value)
        return value.to(device) if isinstance(value, Tensor) else value

    return replace(mask, **{f.name: move(getattr(mask, f.name)) for f in fields(mask) if f.init})


@dataclass(frozen=True, eq=False, repr=False)
class PositionMask(Mask):
    """Keys by the positions of queries: key j is seen where low[j] <= positions[i] < high[j].

    Unlike causal and windows of the operators this also goes where the place of the first query is a tensor.
    positions: integers (1, seq_q); low, high: (1, seq_kv).
    """

    positions: Tensor
    low: Tensor
    high: Tensor

    def _dense(self, sizes: Sizes) -> Tensor:
        position = self.positions.to(sizes.device)[:, None, :, None]
        low, high = (t.to(sizes.device)[:, None, None] for t in (self.low, self.high))
        return (low <= position) & (position < high)

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        into.add_interval(*(t.to(sizes.device) for t in (self.positions, self.low, self.high)))


@dataclass(frozen=True)
class Pattern:
    """What a mask function of transformers says; positions count from the start of the sequence."""

    causal: bool = False
    window: int | None = None  # causal: the last `window` keys; else a distance of at most `window`
    chunk: int | None = None  # keys of the query's own chunk, counted from `left_padding` (batch,)
    left_padding: Tensor | None = None
    documents: Tensor | None = None  # (batch, seq): keys of the same number
    positions: Tensor | None = None  # (batch, seq), within the documents


# Whether torch.compile looks into the closure of a function that it has seen made: known of these versions,
# and not so of 2.11.
_TRACES_CLOSURES = torch.__version__ >= (2, 15)
_AND = hf.and_masks(hf.causal_mask_function).__code__
_WINDOW = hf.sliding_window_overlay(1).__code__
_WINDOW_BOTH = hf.sliding_window_bidirectional_overlay(1).__code__
_CHUNK = hf.chunked_overlay(1, None).__code__
_PACKED = hf.packed_sequence_mask_function(None).__code__
_REMAPPED = hf.remap_positions_for_packed_sequence(None, None).__code__


def read(function: Callable) -> Pattern | None:
    """The pattern of a mask function; None for one that is not known."""
    found = _read(function, {})
    if found is None or ("positions" in found) != ("documents" in found):
        return None
    both_sides, causal = found.pop("both_sides", None), found.get("causal", False)
    if both_sides is causal:  # the one kind of window goes with causal, the other without
        return None
    return Pattern(**found)


def _read(function: Callable, found: dict) -> dict | None:
    """Adds what `function` says to `found`; None when it says what a `Pattern` has no word for."""
    if function is hf.causal_mask_function:
        return {**found, "causal": True}
    if function is hf.bidirectional_mask_function:
        return {"causal": False, **found}
    code = getattr(function, "__code__", None)
    if code not in (_AND, _WINDOW, _WINDOW_BOTH, _CHUNK, _PACKED, _REMAPPED):
        return None
    if torch.compiler.is_compiling() and not _TRACES_CLOSURES:
        return None
    cells = {
        name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__, strict=True)
    }
    if code is _AND:
        for part in cells["mask_functions"]:
            found = None if found is None else _read(part, found)
        return found
    if code is _REMAPPED:
        return _add(_read(cells["mask_function"], found), positions=cells["position_ids"])
    if code is _PACKED:
        return _add(found, documents=cells["packed_sequence_mask"])
    if code is _CHUNK:
        return _add(found, chunk=cells["chunk_size"], left_padding=cells["left_padding"])
    return _add(found, window=cells["sliding_window"], both_sides=code is _WINDOW_BOTH)


def _add(found: dict | None, **more) -> dict | None:
    """None where something would be said twice."""
    return None if found is None or any(name in found for name in more) else {**found, **more}


@dataclass(frozen=True)
class Place:
    """Where queries and keys stand in the sequence."""

    batch: int
    seq_q: int
    seq_kv: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device | str

    @property
    def known(self) -> bool:
        return not isinstance(self.q_offset, Tensor)

    def queries(self) -> Tensor:
        """The position of each: (1, seq_q)."""
        return torch.arange(self.seq_q, device=self.device)[None] + self.q_offset

    def keys(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)[None] + self.kv_offset


def of_pattern(pattern: Pattern, place: Place, padding: Tensor | None, traced: bool) -> CompactMask | None:
    """The mask of a pattern; None where every query sees all keys up to its own place, or all if not causal.

    Args:
        padding: bool (batch, seq_kv), True = may attend, or None.
        traced: values cannot be asked for, and no sizes be compared: the mask is to be right for others, too.
    """
    keys, parts = place.seq_kv, []
    aligned = False  # whether the last query stands at the last key, as causal and windows of ours have it
    if place.known:
        after = place.q_offset + place.seq_q - place.kv_offset
        if pattern.causal and after <= place.seq_kv:
            keys = after
        aligned = after == keys
    if pattern.causal or _window_hides(pattern, place, keys, traced):
        parts += _band(pattern, place, keys, aligned, traced)
    if pattern.documents is not None:
        parts.append(DocumentMask(pattern.documents))
    if pattern.chunk is not None and _chunk_hides(pattern, place, traced):
        parts.append(_chunks(pattern, place, keys))
    if padding is not None and (traced or not bool(padding[:, :keys].all())):
        parts.append(DenseMask(padding[:, None, None, :keys]))
    # With fewer queries than keys implementations differ in what they take None for.
    whole = not pattern.causal or place.seq_q == 1 or place.seq_q == place.seq_kv
    implied = 1 if aligned and pattern.causal else 0
    if whole and keys == place.seq_kv and len(parts) <= implied:
        return None
    shape = (place.batch, 1, place.seq_q, place.seq_kv)
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return CompactMask(seen, shape, keys, place.device)


def _window_hides(pattern: Pattern, place: Place, keys: int, traced: bool) -> bool:
    """False where no key is known to stand outside of the window."""
    if pattern.window is None or traced or not place.known:
        return pattern.window is not None
    first = place.q_offset - place.kv_offset
    if pattern.causal:
        return first + place.seq_q > pattern.window
    return first + place.seq_q - 1 > pattern.window or keys - 1 - first > pattern.window


def _band(pattern: Pattern, place: Place, keys: int, aligned: bool, traced: bool) -> list[Mask]:
    """Causal and window."""
    window = pattern.window if _window_hides(pattern, place, keys, traced) else None
    if aligned and pattern.causal:
        return [CausalMask()] + ([] if window is None else [WindowMask(window - 1, None)])
    if aligned:
        return [WindowMask(window, window)]
    position = place.keys(keys)
    if not pattern.causal:
        return [PositionMask(place.queries(), position - window, position + window + 1)]
    high = torch.full_like(position, INT32.max) if window is None else position + window
    return [PositionMask(place.queries(), position, high)]


def _chunk_hides(pattern: Pattern, place: Place, traced: bool) -> bool:
    """False where all positions are known to be of one chunk."""
    if pattern.positions is not None or traced or not place.known:
        return True
    return place.q_offset + place.seq_q > pattern.chunk or bool(pattern.left_padding.any())


def _chunks(pattern: Pattern, place: Place, keys: int) -> Mask:
    start = pattern.left_padding[:, None]

    def number(position: Tensor) -> Tensor:
        return torch.div(position - start, pattern.chunk, rounding_mode="floor")

    if pattern.positions is not None:
        return DocumentMask(number(pattern.positions))
    return DocumentMask(number(place.queries()), number(place.keys(keys)))
