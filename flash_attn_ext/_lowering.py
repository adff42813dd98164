"""From typed masks to what the operators take: causal, window, lengths, a mask, and interval masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ._options import Options

INT32 = torch.iinfo(torch.int32)


class Sizes(NamedTuple):
    """What a mask has to know of a call. With packed sequences seq_q and seq_kv are those of the longest."""

    batch: int
    heads: int
    seq_q: int
    seq_kv: int
    device: torch.device
    lengths_q: Tensor | None = None  # (batch, 1), of packed sequences
    lengths_k: Tensor | None = None

    def shift(self) -> int | Tensor:
        """seq_kv - seq_q, of each sequence by itself."""
        if self.lengths_q is None:
            return self.seq_kv - self.seq_q
        return self.lengths_k - self.lengths_q

    def check_batch(self, name: str, t: Tensor) -> None:
        if t.shape[0] != self.batch:
            raise ValueError(f"mask: {name} has shape {tuple(t.shape)}, and the batch is {self.batch}")

    def check_rows(self, name: str, t: Tensor, seq: int) -> None:
        """`t` is to be (seq,) or (batch, seq)."""
        if t.shape[-1] != seq or (t.dim() == 2 and t.shape[0] not in (1, self.batch)):
            expected = f"({seq},) or ({self.batch}, {seq})"
            raise ValueError(f"mask: {name} has shape {tuple(t.shape)}, expected {expected}")


def _nearer(a: int, b: int) -> int:
    """The shorter reach of two, of which -1 is unbounded."""
    return max(a, b) if -1 in (a, b) else min(a, b)


@dataclass
class Lowering:
    """What the operators will be told of the masks added so far; it starts with what the caller says."""

    options: Options
    intervals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def _set(self, **changes) -> None:
        self.options = self.options._replace(**changes)

    def add_causal(self, causal: int) -> None:
        if self.options.causal in (0, causal):
            self._set(causal=causal)
        else:  # the bottom right diagonal is that of a window without keys to its right
            self._set(causal=2)
            self.add_window(-1, 0)

    def add_window(self, left: int, right: int) -> None:
        o = self.options
        self._set(window_left=_nearer(o.window_left, left), window_right=_nearer(o.window_right, right))

    def add_lengths(self, kv_lengths: Tensor) -> None:
        own = self.options.kv_lengths
        self._set(kv_lengths=kv_lengths if own is None else torch.minimum(own, kv_lengths))

    def add_mask(self, mask: Tensor, block: tuple[int, int]) -> None:
        own, own_block = self.options.mask, (self.options.mask_block_q, self.options.mask_block_kv)
        if own is not None:
            if own_block != block:
                shown = " and ".join(f"blocks of {q} x {kv}" for q, kv in (own_block, block))
                raise NotImplementedError(
                    f"mask: two masks with {shown} cannot be combined without making them dense; "
                    "combine them beforehand"
                )
            try:
                mask = own & mask
            except RuntimeError:
                shapes = f"{tuple(own.shape)} and {tuple(mask.shape)}"
                raise ValueError(f"mask: two masks of shapes {shapes} do not broadcast") from None
        self._set(mask=mask, mask_block_q=block[0], mask_block_kv=block[1])

    def add_interval(self, labels: Tensor, low: Tensor, high: Tensor) -> None:
        """A query sees a key where low <= label < high: (batch or 1, seq_q), (batch or 1, seq_kv) twice."""
        self.intervals.append((labels.int(), torch.stack([low, high], -1).int()))

    def lowered(self, batch: int) -> Options:
        if not self.intervals:
            return self.options
        stacked = []
        for tensors in zip(*self.intervals, strict=True):
            rows = batch if any(len(t) != 1 for t in tensors) else 1
            stacked.append(torch.stack([t.expand(rows, *t.shape[1:]) for t in tensors]))
        return self.options._replace(row_labels=stacked[0], key_bounds=stacked[1])


def tree_numbers(parents: Tensor) -> Tensor:
    """For each node its number in preorder, and the one after its subtree's last: int64 (batch or 1, nodes,
    2) on the CPU. A node is in the subtree of another where its number lies between those two.

    Raises:
        ValueError: `parents` is no forest.
    """
    return torch.tensor([_preorder(tree) for tree in torch.atleast_2d(parents).tolist()], device="cpu")


def _preorder(parents: list[int]) -> list[list[int]]:
    nodes = len(parents)
    if nodes == 0:
        raise ValueError("TreeMask: parents must hold at least one node")
    children: list[list[int]] = [[] for _ in range(nodes + 1)]  # the last: of no parent
    for node, parent in enumerate(parents):
        if not -1 <= parent < nodes:
            raise ValueError(f"TreeMask: parents must lie in [-1, {nodes}), got {parent} at node {node}")
        children[parent].append(node)
    numbers = [[-1, -1] for _ in range(nodes)]
    count, stack = 0, [(root, False) for root in reversed(children[-1])]
    while stack:
        node, is_left = stack.pop()
        if is_left:
            numbers[node][1] = count
            continue
        numbers[node][0], count = count, count + 1
        stack += [(node, True), *((child, False) for child in reversed(children[node]))]
    if count < nodes:
        lost = next(node for node, (first, _) in enumerate(numbers) if first < 0)
        raise ValueError(f"TreeMask: parents must lead to a root, those of node {lost} go round in a circle")
    return numbers
