"""Which pages the sequences of a `PagedKVCache` have: lists, and the same as rows of one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class PageTables:
    """By the name of a sequence its pages, in order. Of a table that is asked for as a tensor only what has
    changed since is written, for a long sequence has many pages and a step of decoding adds a few."""

    def __init__(self) -> None:
        self._pages: dict[int, list[int]] = {}
        self._rows: dict[int, int] = {}
        self._free_rows: list[int] = []
        self._tensor = torch.full((1, 1), -1, dtype=torch.int32, device="cpu")
        self._right: dict[int, int] = {}  # so many entries of the row are those of the list
        self._written: dict[int, int] = {}  # those past this are -1

    def __contains__(self, name: object) -> bool:
        return name in self._pages

    def __iter__(self) -> Iterator[int]:
        return iter(self._pages)

    def __getitem__(self, name: int) -> tuple[int, ...]:
        return tuple(self._pages[name])

    def count(self, name: int) -> int:
        return len(self._pages[name])

    def last(self, name: int) -> int:
        return self._pages[name][-1]

    def __setitem__(self, name: int, pages: Sequence[int]) -> None:
        self.replace(name, 0, pages)

    def replace(self, name: int, begin: int, pages: Sequence[int]) -> None:
        """Those from `begin` on become `pages`; a name that is new gets them all."""
        self._pages.setdefault(name, [])[begin:] = pages
        self._right[name] = min(begin, self._right.get(name, 0))

    def pop(self, name: int) -> list[int]:
        """Forgets a sequence; returns its pages."""
        del self._right[name]
        if name in self._rows:
            row = self._rows.pop(name)
            self._tensor[row, : self._written.pop(name)] = -1
            self._free_rows.append(row)
        return self._pages.pop(name)

    def tensor(self, names: Sequence[int]) -> Tensor:
        """(batch, most pages of one) int32 on the CPU, -1 where a sequence has no more."""
        rows = [self._row(name) for name in names]
        most = max((len(self._pages[name]) for name in names), default=0)
        return self._tensor[:, :most].index_select(0, torch.tensor(rows, dtype=torch.int64, device="cpu"))

    def _row(self, name: int) -> int:
        """The place of a sequence in the tensor, where all of its pages stand."""
        pages, begin = self._pages[name], self._right[name]
        if name not in self._rows:
            self._rows[name] = self._free_rows.pop() if self._free_rows else len(self._rows)
            self._written[name] = 0
        row, written = self._rows[name], self._written[name]
        self._grow(row + 1, len(pages))
        if begin == len(pages) == written:
            return row
        if begin < len(pages):
            self._tensor[row, begin : len(pages)] = torch.tensor(
                pages[begin:], dtype=torch.int32, device="cpu"
            )
        if len(pages) < written:
            self._tensor[row, len(pages) : written] = -1
        self._right[name] = self._written[name] = len(pages)
        return row

    def _grow(self, rows: int, columns: int) -> None:
        """By doubling, so that to add pages one by one takes linear time."""
        had = self._tensor.shape
        if rows <= had[0] and columns <= had[1]:
            return
        shape = [
            size if size >= n else max(n, 2 * size) for n, size in zip((rows, columns), had, strict=True)
        ]
        with torch.inference_mode(False):  # else it could be written under inference_mode only
            larger = torch.full(shape, -1, dtype=torch.int32, device="cpu")
            larger[: had[0], : had[1]] = self._tensor
        self._tensor = larger
