"""Masks as values: each says in a few numbers which keys a query sees, and can be drawn as a dense tensor.

`flash_attention(..., mask=CausalMask() & DocumentMask(ids))` takes them where it takes a tensor. Seen is what
every mask of such a conjunction lets through. Most cost O(seq_q + seq_kv) memory; none is ever made dense,
but what is dense already. The idea of typed masks is xFormers' (Lefaudeux et al., 2022).

| mask | query i sees key j where |
|---|---|
| `CausalMask` | j <= i + seq_kv - seq_q, or j <= i |
| `WindowMask` | i - left <= j - (seq_kv - seq_q) <= i + right |
| `PaddingMask` | j < kv_lengths[b] |
| `PrefixLMMask` | j < prefix_lengths[b], or causal |
| `DocumentMask` | both are of the same document |
| `TreeMask` | j is i or an ancestor of i, or stands before the tree |
| `BlockSparseMask` | the block of (i, j) is True |
| `DenseMask` | the tensor is True |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ._lowering import INT32, Lowering, Sizes, tree_numbers
from ._windows import CAUSAL, window_bounds

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check(owner: object, name: str, dtypes: tuple[torch.dtype, ...], ranks: tuple[int, ...]) -> None:
    """Raises unless the field is a dense tensor of one of these dtypes and ranks."""
    value, who = getattr(owner, name), f"{type(owner).__name__}: {name}"
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
        given = f"one of layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{who} must be a dense Tensor, got {given}")
    if value.dtype not in dtypes:
        allowed = "bool" if dtypes == (torch.bool,) else "an integer type"
        raise TypeError(f"{who} must be of {allowed}, got {value.dtype}")
    if value.dim() not in ranks:
        allowed = " or ".join(map(str, ranks)) if len(ranks) < 4 else f"at most {max(ranks)}"
        raise ValueError(f"{who} must have rank {allowed}, got shape {tuple(value.shape)}")


def _check_ids(owner: object, name: str) -> None:
    """Raises where an id, or the one after it, is no int32; on the CPU, where a look costs no wait."""
    ids = getattr(owner, name)
    readable = type(ids) is Tensor and ids.device.type == "cpu" and ids.numel() > 0
    if not readable or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < INT32.min or high >= INT32.max:
        raise ValueError(
            f"{type(owner).__name__}: {name} must lie in [-2**31, 2**31 - 2], got ids from {low} to {high}"
        )


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"


class Mask(ABC):
    """Which keys each query sees. `a & b` sees what both see; a mask is never changed."""

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return CombinedMask((*self._parts(), *other._parts()))

    def _parts(self) -> tuple[Mask, ...]:
        return (self,)

    def __repr__(self) -> str:
        shown = (f"{f.name}={_shown(getattr(self, f.name))}" for f in fields(self) if f.repr)
        return f"{type(self).__name__}({', '.join(shown)})"

    def dense(
        self, batch: int, heads: int, seq_q: int, seq_kv: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        """What is seen, as a bool tensor that broadcasts to (batch, heads, seq_q, seq_kv); for looking at.

        Example:
            >>> CausalMask().dense(1, 1, 2, 3).int()
            tensor([[1, 1, 0],
                    [1, 1, 1]], dtype=torch.int32)
        """
        device = torch.device("cpu" if device is None else device)
        return self._dense(Sizes(batch, heads, seq_q, seq_kv, device))

    @abstractmethod
    def _dense(self, sizes: Sizes) -> Tensor: ...

    @abstractmethod
    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        """Adds this mask to what the operators will be told."""


def _band(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """i (seq_q, 1) and j (seq_kv,)."""
    rows, keys = (torch.arange(n, device=sizes.device) for n in (sizes.seq_q, sizes.seq_kv))
    return rows[:, None], keys


@dataclass(frozen=True, eq=False, repr=False)
class CausalMask(Mask):
    """Query i sees keys j <= i + seq_kv - seq_q ("bottom_right"), or j <= i ("top_left")."""

    alignment: str = "bottom_right"

    def __post_init__(self) -> None:
        if self.alignment not in ("bottom_right", "top_left"):
            raise ValueError(
                f"CausalMask: alignment must be 'bottom_right' or 'top_left', got {self.alignment!r}"
            )

    def _dense(self, sizes: Sizes) -> Tensor:
        i, j = _band(sizes)
        return j <= i + (sizes.seq_kv - sizes.seq_q if self.alignment == "bottom_right" else 0)

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        into.add_causal(CAUSAL[self.alignment])


@dataclass(frozen=True, eq=False, repr=False)
class WindowMask(Mask):
    """Query i sees keys in [i - left, i + right] + seq_kv - seq_q; None or -1 is unbounded on that side."""

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        window_bounds((self.left, self.right))
        for name in ("left", "right"):
            if (getattr(self, name) or 0) < -1:
                raise ValueError(f"WindowMask: {name} must be at least -1, got {getattr(self, name)}")

    def _dense(self, sizes: Sizes) -> Tensor:
        i, j = _band(sizes)
        left, right = window_bounds((self.left, self.right))
        place = i + (sizes.seq_kv - sizes.seq_q)
        seen = torch.ones(sizes.seq_q, sizes.seq_kv, dtype=torch.bool, device=sizes.device)
        if left >= 0:
            seen = seen & (j >= place - left)
        return seen & (j <= place + right) if right >= 0 else seen

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        into.add_window(*window_bounds((self.left, self.right)))


@dataclass(frozen=True, eq=False, repr=False)
class PaddingMask(Mask):
    """Keys at or past `kv_lengths` (batch,), int32 or int64, are hidden."""

    kv_lengths: Tensor

    def __post_init__(self) -> None:
        _check(self, "kv_lengths", (torch.int32, torch.int64), (1,))

    def _dense(self, sizes: Sizes) -> Tensor:
        return _band(sizes)[1] < self.kv_lengths.to(sizes.device)[:, None, None, None]

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        into.add_lengths(self.kv_lengths)


@dataclass(frozen=True, eq=False, repr=False)
class PrefixLMMask(Mask):
    """All queries see the first `prefix_lengths` keys; the others are causal, aligned bottom right.

    Args:
        prefix_lengths: an int of 0 or more, or an integer tensor (batch,).

    Source: the prefix LM of Raffel et al., T5, 2020, arXiv:1910.10683, section 3.2.1.
    """

    prefix_lengths: int | Tensor

    def __post_init__(self) -> None:
        if isinstance(self.prefix_lengths, Tensor):
            return _check(self, "prefix_lengths", _INTEGERS, (1,))
        if not isinstance(self.prefix_lengths, int) or isinstance(self.prefix_lengths, bool):
            given = type(self.prefix_lengths).__name__
            raise TypeError(f"PrefixLMMask: prefix_lengths must be an int or a Tensor, got {given}")
        if self.prefix_lengths < 0:
            raise ValueError(f"PrefixLMMask: prefix_lengths must be at least 0, got {self.prefix_lengths}")

    def _prefix(self, sizes: Sizes) -> int | Tensor:
        """An int, or (batch, 1)."""
        if not isinstance(self.prefix_lengths, Tensor):
            return self.prefix_lengths
        sizes.check_batch("PrefixLMMask.prefix_lengths", self.prefix_lengths)
        return self.prefix_lengths.to(sizes.device)[:, None]

    def _dense(self, sizes: Sizes) -> Tensor:
        i, j = _band(sizes)
        prefix = self._prefix(sizes)
        if isinstance(prefix, Tensor):
            prefix = prefix[..., None, None]
        return (j < prefix) | (j <= i + (sizes.seq_kv - sizes.seq_q))

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        rows, keys = (torch.arange(n, device=sizes.device)[None] for n in (sizes.seq_q, sizes.seq_kv))
        low = torch.where(keys < self._prefix(sizes), INT32.min, keys)
        into.add_interval(rows + sizes.shift(), low, torch.full_like(low, INT32.max))


@dataclass(frozen=True, eq=False, repr=False)
class DocumentMask(Mask):
    """Queries see the keys of their own document.

    Args:
        query_ids: integers from -2**31 to 2**31 - 2, (seq_q,) or (batch, seq_q); in any order, each document
            anywhere.
        key_ids: (seq_kv,) or (batch, seq_kv); query_ids when None.

    Example:
        >>> ids = torch.tensor([0, 0, 0, 1, 1])
        >>> flash_attention(q, k, v, mask=CausalMask() & DocumentMask(ids))
    """

    query_ids: Tensor
    key_ids: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("query_ids",) if self.key_ids is None else ("query_ids", "key_ids"):
            _check(self, name, _INTEGERS, (1, 2))
            _check_ids(self, name)

    def _ids(self, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """(batch or 1, seq_q) and (batch or 1, seq_kv)."""
        key_ids = self.query_ids if self.key_ids is None else self.key_ids
        name = "query_ids" if self.key_ids is None else "key_ids"
        sizes.check_rows("DocumentMask.query_ids", self.query_ids, sizes.seq_q)
        sizes.check_rows(f"DocumentMask.{name}", key_ids, sizes.seq_kv)
        queries, keys = (ids.to(sizes.device) for ids in (self.query_ids, key_ids))
        return queries if queries.dim() == 2 else queries[None], keys if keys.dim() == 2 else keys[None]

    def _dense(self, sizes: Sizes) -> Tensor:
        queries, keys = self._ids(sizes)
        return (queries[:, :, None] == keys[:, None])[:, None]

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        queries, keys = (ids.long() for ids in self._ids(sizes))
        into.add_interval(queries, keys, keys + 1)


@dataclass(frozen=True, eq=False, repr=False)
class TreeMask(Mask):
    """The last keys are the nodes of a tree, and the last queries too: each sees itself and its ancestors.

    Keys before the tree are context that every query sees; queries before it see nothing but that. Where
    there are fewer queries than nodes, they are the last ones. Add a `CausalMask` for a causal context, if
    parents come before their children.

    Args:
        parents: integers (nodes,) or (batch, nodes): the parent's place in the tree, -1 for a root. They
            are read once, when the mask is made.

    Example:
        >>> TreeMask(torch.tensor([-1, 0, 0, 1])).dense(1, 1, 4, 4).int()[0, 0]
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [1, 1, 0, 1]], dtype=torch.int32)

    Source: tree attention of Miao et al., SpecInfer, 2023, arXiv:2305.09781.
    """

    parents: Tensor
    _numbers: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self, "parents", _INTEGERS, (1, 2))
        object.__setattr__(self, "_numbers", tree_numbers(self.parents))

    def _nodes(self, length: int | Tensor, count: int, sizes: Sizes) -> Tensor:
        """Which node each of `count` rows is, below 0 before the tree: (batch or 1, count)."""
        return torch.arange(count, device=sizes.device)[None] - (length - self.parents.shape[-1])

    def _check_sizes(self, sizes: Sizes) -> None:
        nodes = self.parents.shape[-1]
        if self.parents.dim() == 2:
            sizes.check_batch("TreeMask.parents", self.parents)
        if sizes.lengths_k is None and sizes.seq_kv < nodes:
            raise ValueError(f"mask: TreeMask has {nodes} nodes, and there are {sizes.seq_kv} keys")

    def _dense(self, sizes: Sizes) -> Tensor:
        self._check_sizes(sizes)
        parents = torch.atleast_2d(self.parents).long().to(sizes.device)
        batch, nodes = parents.shape
        # One more column stands for what is above the roots.
        seen = torch.zeros(batch, nodes, nodes + 1, dtype=torch.bool, device=sizes.device)
        up = torch.cat([parents, parents.new_full((batch, 1), -1)], 1) % (nodes + 1)
        place = torch.arange(nodes, device=sizes.device).expand(batch, nodes)
        for _ in range(nodes):
            seen.scatter_(2, place[..., None], True)
            place = up.gather(1, place)
        rows, keys = (self._nodes(n, n, sizes)[0] for n in (sizes.seq_q, sizes.seq_kv))
        related = seen[:, rows.clamp(min=0)][:, :, keys.clamp(min=0)] & (rows >= 0)[:, None]
        return (related | (keys < 0))[:, None]

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        self._check_sizes(sizes)
        first, last = self._numbers.to(sizes.device).unbind(-1)

        def of(table: Tensor, nodes: Tensor, otherwise: int) -> Tensor:
            batch = max(len(table), len(nodes))
            table, nodes = table.expand(batch, -1), nodes.expand(batch, -1)
            found = table.gather(1, nodes.clamp(0, table.shape[1] - 1))
            return torch.where(nodes >= 0, found, otherwise)

        rows = self._nodes(sizes.seq_q if sizes.lengths_q is None else sizes.lengths_q, sizes.seq_q, sizes)
        keys = self._nodes(sizes.seq_kv if sizes.lengths_k is None else sizes.lengths_k, sizes.seq_kv, sizes)
        into.add_interval(of(first, rows, -1), of(first, keys, INT32.min), of(last, keys, INT32.max))


@dataclass(frozen=True, eq=False, repr=False)
class BlockSparseMask(Mask):
    """Blocks of queries and keys see each other or not.

    Args:
        blocks: bool, broadcastable to (batch, heads_q, ceil(seq_q / block_q), ceil(seq_kv / block_kv)).
        block_q, block_kv: queries and keys of a block, 1 or more.
    """

    blocks: Tensor
    block_q: int
    block_kv: int

    def __post_init__(self) -> None:
        _check(self, "blocks", (torch.bool,), (0, 1, 2, 3, 4))
        for name in ("block_q", "block_kv"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"BlockSparseMask: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"BlockSparseMask: {name} must be at least 1, got {value}")

    def _dense(self, sizes: Sizes) -> Tensor:
        blocks = torch.atleast_2d(self.blocks.to(sizes.device))
        for axis, block, length in ((-2, self.block_q, sizes.seq_q), (-1, self.block_kv, sizes.seq_kv)):
            if blocks.shape[axis] != 1:
                blocks = blocks.repeat_interleave(block, axis).narrow(axis, 0, length)
        return blocks

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        into.add_mask(self.blocks, (self.block_q, self.block_kv))


@dataclass(frozen=True, eq=False, repr=False)
class DenseMask(Mask):
    """A bool tensor, broadcastable to (batch, heads_q, seq_q, seq_kv), True = may attend."""

    seen: Tensor

    def __post_init__(self) -> None:
        _check(self, "seen", (torch.bool,), (0, 1, 2, 3, 4))

    def _dense(self, sizes: Sizes) -> Tensor:
        return self.seen.to(sizes.device)

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        into.add_mask(self.seen, (1, 1))


@dataclass(frozen=True, eq=False, repr=False)
class CombinedMask(Mask):
    """What every one of `parts` lets through; `a & b` makes it."""

    parts: tuple[Mask, ...]

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, Mask):
                raise TypeError(f"CombinedMask: parts must be masks, got {type(part).__name__}")

    def _parts(self) -> tuple[Mask, ...]:
        return self.parts

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))

    def _dense(self, sizes: Sizes) -> Tensor:
        seen = torch.ones((), dtype=torch.bool, device=sizes.device)
        for part in self.parts:
            seen = seen & part._dense(sizes)
        return seen

    def _lower(self, into: Lowering, sizes: Sizes) -> None:
        for part in self.parts:
            part._lower(into, sizes)
