"""Typed masks for cases: drawn by name, each with what it hides by its definition, written out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_ext import masks


class Typed(NamedTuple):
    mask: masks.Mask
    dense: Tensor  # bool, broadcasts to (batch, heads, seq_q, seq_kv)


def _documents(batch, heads, seq_q, seq_kv, g) -> Typed:
    """Documents in a row, the same in every batch, queries at the end of them."""
    ids = torch.randint(0, 5, (max(seq_q, seq_kv),), generator=g).sort().values
    query_ids, key_ids = ids[len(ids) - seq_q :], ids[len(ids) - seq_kv :].int()
    return Typed(masks.DocumentMask(query_ids, key_ids), query_ids[:, None] == key_ids)


def _scattered(batch, heads, seq_q, seq_kv, g) -> Typed:
    """Every batch its own documents, in no order, some without keys."""
    query_ids = torch.randint(-2, 3, (batch, seq_q), generator=g)
    key_ids = torch.randint(-1, 4, (batch, seq_kv), generator=g)
    return Typed(masks.DocumentMask(query_ids, key_ids), (query_ids[:, :, None] == key_ids[:, None])[:, None])


def _prefix_seen(prefix, seq_q, seq_kv) -> Tensor:
    i, j = torch.arange(seq_q)[:, None], torch.arange(seq_kv)
    return (j < prefix) | (j <= i + seq_kv - seq_q)


def _prefix(batch, heads, seq_q, seq_kv, g) -> Typed:
    prefix = int(torch.randint(0, seq_kv + 2, (), generator=g))
    return Typed(masks.PrefixLMMask(prefix), _prefix_seen(prefix, seq_q, seq_kv))


def _prefixes(batch, heads, seq_q, seq_kv, g) -> Typed:
    prefix = torch.randint(0, seq_kv + 2, (batch,), generator=g)
    return Typed(masks.PrefixLMMask(prefix), _prefix_seen(prefix[:, None, None, None], seq_q, seq_kv))


def _tree_seen(parents: list[int], seq_q: int, seq_kv: int) -> Tensor:
    nodes = len(parents)
    seen = torch.zeros(seq_q, seq_kv, dtype=torch.bool)
    seen[:, : seq_kv - nodes] = True
    for node in range(nodes):
        row, up = seq_q - nodes + node, node
        while row >= 0 and up >= 0:
            seen[row, seq_kv - nodes + up] = True
            up = parents[up]
    return seen


def _parents(nodes: int, g) -> list[int]:
    """A forest whose nodes stand in any order."""
    order = torch.randperm(nodes, generator=g).tolist()
    parents = [-1] * nodes
    for place, node in enumerate(order):
        above = int(torch.randint(-1, place, (), generator=g)) if place else -1
        parents[node] = order[above] if above >= 0 else -1
    return parents


def _tree(batch, heads, seq_q, seq_kv, g) -> Typed:
    parents = _parents(max(1, seq_kv // 2), g)
    return Typed(masks.TreeMask(torch.tensor(parents)), _tree_seen(parents, seq_q, seq_kv))


def _trees(batch, heads, seq_q, seq_kv, g) -> Typed:
    parents = [_parents(max(1, seq_kv // 3), g) for _ in range(batch)]
    seen = torch.stack([_tree_seen(tree, seq_q, seq_kv) for tree in parents])[:, None]
    return Typed(masks.TreeMask(torch.tensor(parents, dtype=torch.int32)), seen)


def _blocks_of(shape, block_q, block_kv, seq_q, seq_kv, g) -> Typed:
    blocks = torch.rand(*shape, -(-seq_q // block_q), -(-seq_kv // block_kv), generator=g) < 0.6
    i, j = torch.arange(seq_q) // block_q, torch.arange(seq_kv) // block_kv
    return Typed(masks.BlockSparseMask(blocks, block_q, block_kv), blocks[..., i[:, None], j])


def _blocks(batch, heads, seq_q, seq_kv, g) -> Typed:
    return _blocks_of((), 16, 16, seq_q, seq_kv, g)


def _head_blocks(batch, heads, seq_q, seq_kv, g) -> Typed:
    return _blocks_of((batch, heads), 7, 20, seq_q, seq_kv, g)


def _padding(batch, heads, seq_q, seq_kv, g) -> Typed:
    lengths = torch.randint(-1, seq_kv + 3, (batch,), generator=g)
    return Typed(masks.PaddingMask(lengths), torch.arange(seq_kv) < lengths[:, None, None, None])


def _causal(batch, heads, seq_q, seq_kv, g) -> Typed:
    i, j = torch.arange(seq_q)[:, None], torch.arange(seq_kv)
    return Typed(masks.CausalMask(), j <= i + seq_kv - seq_q)


def _top_left(batch, heads, seq_q, seq_kv, g) -> Typed:
    return Typed(masks.CausalMask("top_left"), torch.arange(seq_kv) <= torch.arange(seq_q)[:, None])


def _window(batch, heads, seq_q, seq_kv, g) -> Typed:
    left, right = (None if n < 0 else int(n) for n in torch.randint(-4, 20, (2,), generator=g))
    far = torch.arange(seq_kv) - torch.arange(seq_q)[:, None] - (seq_kv - seq_q)
    seen = torch.ones(seq_q, seq_kv, dtype=torch.bool)
    seen = seen if left is None else seen & (far >= -left)
    return Typed(masks.WindowMask(left, right), seen if right is None else seen & (far <= right))


def _dense(batch, heads, seq_q, seq_kv, g) -> Typed:
    seen = torch.rand(batch, 1, seq_q, seq_kv, generator=g) < 0.7
    return Typed(masks.DenseMask(seen), seen)


RECIPES = {
    "documents": _documents,
    "scattered": _scattered,
    "prefix": _prefix,
    "prefixes": _prefixes,
    "tree": _tree,
    "trees": _trees,
    "blocks": _blocks,
    "head-blocks": _head_blocks,
    "padding": _padding,
    "causal": _causal,
    "top-left": _top_left,
    "window": _window,
    "dense": _dense,
}


def draw_typed(name: str, batch: int, heads: int, seq_q: int, seq_kv: int, g: torch.Generator) -> Typed:
    return RECIPES[name](batch, heads, seq_q, seq_kv, g)
