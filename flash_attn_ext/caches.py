"""Caches of keys and values for decoding: `KVCache` in one piece, `PagedKVCache` in shared pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _errors
from ._integers import as_integer, as_integers
from ._pages import PageTables
from .kvcache import flash_attention_with_kvcache


class KVCache:
    """Keys and values of `batch` sequences, each with room for `capacity` of them.

    Args:
        batch, capacity, heads_kv, dim: sizes; dim_v: of the values, default dim.
        dtype, device: of the tensors.

    Attributes:
        k: (batch, capacity, heads_kv, dim); v: (batch, capacity, heads_kv, dim_v). What lies at or past a
            length is of no meaning.
        lengths: (batch,) int32, on their device.

    Example:
        >>> cache = KVCache(2, 1024, 8, 64)
        >>> q, k, v = torch.randn(2, 5, 32, 64), *torch.randn(2, 2, 5, 8, 64).unbind(0)
        >>> cache.attend(q, k, v).shape, cache.lengths.tolist()
        (torch.Size([2, 5, 32, 64]), [5, 5])
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads_kv: int,
        dim: int,
        dim_v: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"batch": batch, "capacity": capacity, "heads_kv": heads_kv}
        self.k, self.v = _storage(sizes, dim, dim_v, dtype, device)
        self._set_lengths(torch.zeros(batch, dtype=torch.int32, device=device), 0)

    def attend(
        self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Appends k and v, then attends: `flash_attention_with_kvcache` with its options."""
        longest, added = self._longest(), k.shape[1] if isinstance(k, Tensor) and k.dim() == 4 else 0
        if longest is not None:
            self._check_room(longest, added)
        result = flash_attention_with_kvcache(q, self.k, self.v, k, v, cache_lengths=self.lengths, **options)
        if k is not None:
            self._set_lengths(self.lengths.add_(added), None if longest is None else longest + added)
        return result

    def append(self, k: Tensor, v: Tensor, **rotary) -> None:
        """Appends k (batch, seq_new, heads_kv, dim) and v; `rotary` as for `flash_attention_with_kvcache`.

        Raises:
            ValueError: there is no room; nothing was written. Of `lengths` on a device that somebody else has
                written, or that a graph writes, nobody can tell without waiting for it: keys past the room
                then take the place of the last ones.
        """
        _errors.check_tensor("k", k)
        none = k.new_empty(k.shape[0], 0, self.k.shape[2], self.k.shape[3])
        self.attend(none, k, v, **rotary)

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forgets what lies past `lengths`, one or one per sequence.

        Raises:
            ValueError: a length is below 0 or above what there is, or there are not as many as sequences.
            TypeError: what is no integer.
        """
        wanted = as_integers("lengths", lengths, self.lengths.device)
        if wanted.dim() and wanted.shape != self.lengths.shape:
            raise ValueError(
                f"lengths has shape {tuple(wanted.shape)}, but must be () or {tuple(self.lengths.shape)}"
            )
        wanted = wanted.expand(self.lengths.shape)
        if ((wanted < 0) | (wanted > self.lengths)).any():
            raise ValueError(
                f"lengths are {wanted.tolist()}, but must be between 0 and {self.lengths.tolist()}"
            )
        self.lengths.copy_(wanted)
        self._set_lengths(self.lengths, int(wanted.max()) if len(wanted) else 0)

    def reorder(self, sources: Sequence[int] | Tensor) -> None:
        """Sequence i becomes a copy of what sequence sources[i] was, as beam search wants it.

        Raises:
            IndexError: there is no such sequence. ValueError: not one source for each. TypeError: what is no
            integer.
        """
        sources = as_integers("sources", sources, self.k.device)
        if sources.shape != self.lengths.shape:
            raise ValueError(
                f"sources has shape {tuple(sources.shape)}, but must be {tuple(self.lengths.shape)}"
            )
        if ((sources < 0) | (sources >= len(self.lengths))).any():
            raise IndexError(
                f"sources are {sources.tolist()}, but must be between 0 and {len(self.lengths) - 1}"
            )
        lengths = self.lengths[sources]
        filled = int(lengths.max()) if len(lengths) else 0
        for t in (self.k, self.v):
            t[:, :filled] = t[sources, :filled]
        self.lengths.copy_(lengths)
        self._set_lengths(self.lengths, filled)

    def fork(self) -> KVCache:
        """A copy that goes its own way."""
        copy = object.__new__(KVCache)
        copy.k, copy.v = self.k.clone(), self.v.clone()
        copy._set_lengths(self.lengths.clone(), self._longest())
        return copy

    def _set_lengths(self, lengths: Tensor, longest: int | None) -> None:
        """`longest`: the most that one is, None where the host does not know."""
        self.lengths = lengths
        known = longest is not None and len(lengths) > 0
        self._known = (lengths, _version(lengths), longest) if known else None

    def _longest(self) -> int | None:
        """The most keys of a sequence, if nobody else has written `lengths` since that was known."""
        if torch.compiler.is_compiling() or self._known is None:
            return None
        if self.k.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # Python runs once then, and the graph any number of times
        lengths, version, longest = self._known
        same = lengths is self.lengths and version is not None and version == _version(lengths)
        return longest if same else None

    def _check_room(self, longest: int, added: int) -> None:
        """What the operator cannot see of lengths on a device."""
        capacity = self.k.shape[1]
        if longest + added > capacity:
            raise ValueError(
                f"cache_lengths is {longest} for a sequence and {added} to append, but k_cache has room for "
                f"{capacity}: its shape is {tuple(self.k.shape)}"
            )


class PagedKVCache:
    """Keys and values of any number of sequences in one pool of pages; forks share pages until they write.

    Args:
        pages, page_size: of the pool, keys of a page; heads_kv, dim, dim_v, dtype, device as for `KVCache`.

    Attributes:
        k: (pages, page_size, heads_kv, dim); v: (pages, page_size, heads_kv, dim_v).

    Sequences are named by ints that `add` and `fork` return. Tables and lengths live on the host; a step
    sends them to the device. Every method leaves all as it was when it raises.

    Example:
        >>> cache = PagedKVCache(64, 16, 8, 64)
        >>> a, b = cache.add(), cache.add()
        >>> q, k, v = torch.randn(2, 1, 32, 64), *torch.randn(2, 2, 1, 8, 64).unbind(0)
        >>> cache.attend([a, b], q, k, v).shape, cache.length(a), cache.free_pages
        (torch.Size([2, 1, 32, 64]), 1, 62)

    Source: Kwon et al., PagedAttention, 2023, arXiv:2309.06180.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        heads_kv: int,
        dim: int,
        dim_v: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"pages": pages, "page_size": page_size, "heads_kv": heads_kv}
        if page_size == 0:
            raise ValueError("page_size must be at least 1, got 0")
        self.k, self.v = _storage(sizes, dim, dim_v, dtype, device)
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages
        self._tables = PageTables()
        self._lengths: dict[int, int] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The names of all sequences."""
        return tuple(self._tables)

    def length(self, sequence: int) -> int:
        """Keys of a sequence."""
        return self._lengths[self._known(sequence)]

    def add(self) -> int:
        """A new, empty sequence."""
        name, self._next = self._next, self._next + 1
        self._tables[name], self._lengths[name] = (), 0
        return name

    def fork(self, sequence: int) -> int:
        """A new sequence with the keys and values of another, in the same pages."""
        table, length = self._tables[self._known(sequence)], self._lengths[sequence]
        name = self.add()
        self._tables[name], self._lengths[name] = table, length
        for page in table:
            self._users[page] += 1
        return name

    def free(self, sequence: int) -> None:
        """Ends a sequence; pages that no other shares return to the pool."""
        self._release(self._tables.pop(self._known(sequence)))
        del self._lengths[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets what lies past `length`.

        Raises:
            ValueError: it is below 0 or above what there is. TypeError: it is no integer.
        """
        known = self.length(sequence)
        length = as_integer("length", length)  # a tensor's value, which it may change later
        if not 0 <= length <= known:
            raise ValueError(f"length is {length}, but must be between 0 and {known}")
        kept = -(-length // self.k.shape[1])
        self._release(self._tables[sequence][kept:])
        self._tables.replace(sequence, kept, ())
        self._lengths[sequence] = length

    def reorder(self, sequences: Sequence[int], sources: Sequence[int]) -> None:
        """sequences[i] becomes a fork of what sources[i] was, as beam search wants it."""
        if len(set(sequences)) != len(sequences) or len(sources) != len(sequences):
            raise ValueError(
                f"sequences must differ and be as many as sources, got {sequences} and {sources}"
            )
        new = [(self._tables[self._known(s)], self._lengths[s]) for s in sources]
        for name in sequences:
            self._known(name)
        for table, _ in new:
            for page in table:
                self._users[page] += 1
        for name, (table, length) in zip(sequences, new, strict=True):
            self._release(self._tables[name])
            self._tables[name], self._lengths[name] = table, length

    def block_table(self, sequences: Sequence[int]) -> Tensor:
        """(batch, most pages of one) int32, -1 where a sequence has no more, on the cache's device."""
        return self._tables.tensor([self._known(s) for s in sequences]).to(self.k.device)

    def attend(
        self,
        sequences: Sequence[int],
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Appends k and v (batch, seq_new, heads_kv, dim) to the sequences, then attends:
        `flash_attention_with_kvcache` with its options.

        Raises:
            KeyError: no such sequence. RuntimeError: the pool has too few free pages. ValueError: a
            sequence is named twice while k is given; and what `flash_attention_with_kvcache` raises.
        """
        lengths = [self.length(s) for s in sequences]
        added = 0
        if k is not None:
            _errors.check_tensor("k", k)
            if len(set(sequences)) != len(sequences):
                raise ValueError(f"sequences must differ where k is given, got {list(sequences)}")
            added = k.shape[1] if k.dim() == 4 else 0
        undo = self._reserve(sequences, added)
        try:
            result = flash_attention_with_kvcache(
                q, self.k, self.v, k, v,
                cache_lengths=torch.tensor(lengths, dtype=torch.int32, device="cpu").to(self.k.device),
                block_table=self.block_table(sequences), **options,
            )  # fmt: skip
        except BaseException:
            self._undo(undo)
            raise
        for page in undo.replaced:
            self._release([page])
        for name in sequences if added else ():
            self._lengths[name] += added
        return result

    def append(self, sequences: Sequence[int], k: Tensor, v: Tensor, **rotary) -> None:
        """Appends k (batch, seq_new, heads_kv, dim) and v; `rotary` as for `flash_attention_with_kvcache`."""
        _errors.check_tensor("k", k)
        none = k.new_empty(len(sequences), 0, *self.k.shape[2:])
        self.attend(sequences, none, k, v, **rotary)

    def _known(self, sequence: int) -> int:
        if sequence not in self._tables:
            raise KeyError(f"there is no sequence {sequence!r}")
        return sequence

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)

    def _reserve(self, sequences: Sequence[int], added: int) -> _Reservation:
        """Gives each sequence pages of its own for `added` more keys; a shared last page is copied."""
        size = self.k.shape[1]
        plans = []
        copies: dict[int, int] = {}  # of a page, by which it has fewer users
        for name in sequences if added else ():
            held, length = self._tables.count(name), self._lengths[name]
            last = self._tables.last(name) if length % size else None
            shared = last is not None and self._users[last] - copies.get(last, 0) > 1
            if shared:
                copies[last] = copies.get(last, 0) + 1
            plans.append((name, shared, -(-(length + added) // size) - held))
        wanted = sum(more + shared for _, shared, more in plans)
        if wanted > len(self._free):
            raise RuntimeError(
                f"PagedKVCache has {len(self._free)} free pages of {len(self._users)}, but appending {added} "
                f"keys to {len(plans)} sequences takes {wanted}"
            )
        undo = _Reservation([], [], [])
        for name, shared, more in plans:
            begin = self._tables.count(name) - shared
            pages = [self._take(undo) for _ in range(more + shared)]
            replaced = [self._tables.last(name)] if shared else []
            if shared:
                for t in (self.k, self.v):
                    t[pages[0]] = t[replaced[0]]
            if pages:
                self._tables.replace(name, begin, pages)
                undo.changed.append((name, begin, replaced))
                undo.replaced += replaced
        return undo

    def _take(self, undo: _Reservation) -> int:
        page = self._free.pop()
        self._users[page] = 1
        undo.taken.append(page)
        return page

    def _undo(self, undo: _Reservation) -> None:
        for name, begin, pages in undo.changed:
            self._tables.replace(name, begin, pages)
        self._release(undo.taken)


class _Reservation:
    """What `_reserve` has changed."""

    def __init__(
        self, changed: list[tuple[int, int, list[int]]], taken: list[int], replaced: list[int]
    ) -> None:
        self.changed = changed  # names, and from where on their tables had other pages, and which
        self.taken = taken  # pages from the pool
        self.replaced = replaced  # shared pages of which a copy took the place


def _version(t: Tensor) -> int | None:
    """Another number after each write; None where torch does not count them."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version


def _storage(
    sizes: dict[str, int], dim: int, dim_v: int | None, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Keys (*sizes, dim) and values (*sizes, dim_v), which is dim by default."""
    dim_v = dim if dim_v is None else dim_v
    for name, size in {**sizes, "dim": dim, "dim_v": dim_v}.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
    shape = tuple(sizes.values())
    return tuple(torch.zeros(*shape, last, dtype=dtype, device=device) for last in (dim, dim_v))
