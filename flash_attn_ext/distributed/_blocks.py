"""What a rank's queries see of another's keys: a few rectangles, each a call of a kernel.

Query i of the whole sequence sees the keys j with i + low <= j <= i + high. Between two segments of one step
that is a band again. Cut down to the rows and columns that it touches, a band is a window whose sides are not
negative, aligned bottom right as the kernels have it: its last row sees the last key, and sees it not alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ._placement import Segment, segments


class Band(NamedTuple):
    """Query i sees keys in [i + low, i + high]; None is unbounded."""

    low: int | None
    high: int | None

    @classmethod
    def of(cls, causal: int, left: int, right: int, seq_q: int, seq_kv: int) -> Band:
        """`causal`: 0, 1 (bottom right), 2 (top left); a side of -1 is unbounded; lengths are whole."""
        shift = seq_kv - seq_q
        highs = [shift + right] if right >= 0 else []
        if causal:
            highs.append(shift if causal == 1 else 0)
        return cls(shift - left if left >= 0 else None, min(highs, default=None))


class Block(NamedTuple):
    """Queries and keys of two ranks' parts, and the window between them, -1 being unbounded."""

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    left: int = -1
    right: int = -1

    @property
    def is_full(self) -> bool:
        return self.left == self.right == -1


@functools.lru_cache(maxsize=256)
def blocks(
    placement: str,
    lengths_q: tuple[int, ...],
    lengths_kv: tuple[int, ...],
    band: Band,
    rank: int,
    source: int,
) -> tuple[Block, ...]:
    """What rank `rank` computes with the keys of `source`; what nobody sees is in none of them."""
    found = []
    q_begin = 0
    for queries in segments(placement, rank, lengths_q):
        row, k_begin = [], 0
        for keys in segments(placement, source, lengths_kv):
            block = _block(queries, keys, band, q_begin, k_begin)
            if block is not None:
                row = _beside(row, block)
            k_begin += keys.length
        found = _below(found, row)
        q_begin += queries.length
    return tuple(found)


@functools.lru_cache(maxsize=256)
def steps(placement: str, lengths_q: tuple[int, ...], lengths_kv: tuple[int, ...], band: Band) -> int:
    """How often keys have to be passed on until everybody has had all that it sees."""
    size = len(lengths_q)
    for step in range(size - 1, 0, -1):
        for rank in range(size):
            if blocks(placement, lengths_q, lengths_kv, band, rank, (rank - step) % size):
                return step
    return 0


def _block(queries: Segment, keys: Segment, band: Band, q_begin: int, k_begin: int) -> Block | None:
    """The part that the band touches; None is empty. `q_begin`, `k_begin`: where the segments are held."""
    step, ahead = queries.step, queries.start - keys.start
    rows, columns = queries.length, keys.length
    low = None if band.low is None else -(-(band.low + ahead) // step)
    high = None if band.high is None else (band.high + ahead) // step
    if low is not None and high is not None and low > high:
        return None
    first_row = 0 if high is None else max(0, -high)
    last_row = (rows if low is None else min(rows, columns - low)) - 1
    if first_row > last_row or not columns:
        return None
    first_key = 0 if low is None else max(0, first_row + low)
    last_key = columns - 1 if high is None else min(columns - 1, last_row + high)
    # The bounds from the kept rows and keys on, and how far each reaches from the aligned diagonal.
    rows, columns = last_row - first_row + 1, last_key - first_key + 1
    shift, moved = columns - rows, first_row - first_key
    left = right = -1
    if low is not None and rows - 1 + low + moved > 0:
        left = shift - low - moved
    if high is not None and high + moved < columns - 1:
        right = high + moved - shift
    q, k = q_begin + first_row, k_begin + first_key
    return Block(q, q + rows, k, k + columns, left, right)


def _beside(row: list[Block], block: Block) -> list[Block]:
    """Blocks of the same queries, with those made one that a kernel can take at once."""
    if row:
        a = row[-1]
        same_rows = (a.q_begin, a.q_end, a.k_end) == (block.q_begin, block.q_end, block.k_begin)
        # A bound on the right is counted from the last row and key, and so stays what it is.
        if same_rows and a.is_full and block.left == -1:
            return [*row[:-1], block._replace(k_begin=a.k_begin)]
    return [*row, block]


def _below(found: list[Block], row: list[Block]) -> list[Block]:
    if len(found) == len(row) == 1:
        a, b = found[0], row[0]
        same_keys = (a.k_begin, a.k_end, a.q_end) == (b.k_begin, b.k_end, b.q_begin)
        if same_keys and a.is_full and b.is_full:
            return [b._replace(q_begin=a.q_begin)]
    return found + row
