"""Attention over two queries and four keys, two keys at a time, with every intermediate printed.

The softmax of a row needs its largest score and the sum of its exponentials, and both are known only
after the last key. The online softmax keeps a running maximum and a running sum instead, and corrects
what it has so far whenever the maximum moves; so the row of scores never has to exist as a whole.
"""

from __future__ import annotations

import math

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from flash_attn_ext import flash_attention

Q = torch.tensor([[1.0, 0.0], [1.0, 2.0]])  # (2 queries, dim 2)
K = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 2.0]])  # (4 keys, dim 2)
V = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])  # (4 keys, dim_v 2)
BLOCK = 2


def _numbers(values: torch.Tensor) -> str:
    return "  ".join(f"{x:.4f}" for x in values.reshape(-1).tolist())


def _table(title: str, steps: dict[str, torch.Tensor]) -> Table:
    """A line per step, a column per query."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for i in range(len(Q)):
        table.add_column(f"query {i}", justify="right")
    for name, values in steps.items():
        table.add_row(name, *map(_numbers, values))
    return table


def online_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, console: Console):
    """Attention of q (rows, dim) over k (keys, dim), v (keys, dim_v), `block` keys at a time.

    Returns out (rows, dim_v) and lse (rows,). Milakov & Gimelshein, "Online normalizer calculation
    for softmax" (2018); Dao et al., "FlashAttention" (2022).
    """
    scale = 1 / math.sqrt(q.shape[-1])
    row_max = torch.full((len(q),), -math.inf)
    row_sum = torch.zeros(len(q))
    acc = torch.zeros(len(q), v.shape[-1])
    for begin in range(0, len(k), block):
        keys = slice(begin, begin + block)
        scores = q @ k[keys].T * scale
        new_max = torch.maximum(row_max, scores.amax(dim=1))
        rescale = torch.exp(row_max - new_max)
        p = torch.exp(scores - new_max[:, None])
        row_sum = row_sum * rescale + p.sum(dim=1)
        acc = acc * rescale[:, None] + p @ v[keys]
        steps = {
            "scores = q·k / √2": scores,
            "maximum so far, before": row_max,
            "maximum so far, now": new_max,
            "rescale = exp(before - now)": rescale,
            "p = exp(scores - maximum)": p,
            "sum = sum · rescale + Σ p": row_sum,
            "acc = acc · rescale + p·V": acc,
        }
        console.print(_table(f"keys {begin} to {begin + len(v[keys]) - 1}", steps))
        row_max = new_max
    return acc / row_sum[:, None], row_max + torch.log(row_sum)


def run(console: Console) -> None:
    """Prints the worked example; raises AssertionError if the three results differ."""
    console.print("queries  " + "   ".join(f"q{i} = ({_numbers(row)})" for i, row in enumerate(Q)))
    console.print("keys     " + "   ".join(f"k{i} = ({_numbers(row)})" for i, row in enumerate(K)))
    console.print("values   " + "   ".join(f"v{i} = ({_numbers(row)})" for i, row in enumerate(V)))
    online, lse = online_attention(Q, K, V, BLOCK, console)

    scores = Q @ K.T / math.sqrt(Q.shape[-1])
    weights = torch.softmax(scores, dim=-1)
    direct = weights @ V
    ours, ours_lse = flash_attention(Q, K, V, return_lse=True)

    results = {
        "all scores at once": scores,
        "their softmax": weights,
        "direct: softmax·V": direct,
        "online: acc / sum": online,
        "flash_attention": ours,
        "lse = maximum + ln(sum)": lse,
        "flash_attention's lse": ours_lse,
    }
    console.print(_table("results", results))
    largest = max((online - direct).abs().max().item(), (ours - direct).abs().max().item())
    torch.testing.assert_close(online, direct)
    torch.testing.assert_close(ours, direct)
    torch.testing.assert_close(ours_lse, torch.logsumexp(scores, dim=-1))
    console.print(f"largest difference between the three: {largest:.1e}")
