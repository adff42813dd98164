"""Packed sequences on the CUDA kernels, with products of all that they know."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import EMULATED
from test_varlen import compare, packed
from typed_masks import draw_typed

import flash_attn_ext as fae


def draw_masks(r: random.Random, lengths_q: list[int], lengths_k: list[int], heads: int) -> tuple[dict, dict]:
    """Options of any kind that the CUDA kernels know, and a typed mask with what it means to the oracle."""
    batch, seq_q, seq_kv = len(lengths_q), max(lengths_q), max(lengths_k)
    options = {
        "causal": r.choice([False, True, "top_left"]),
        "window": r.choice([None, None, (9, None), (20, 3)]),
        "softcap": r.choice([0.0, 2.0]),
    }
    if r.random() < 0.4:
        options["bias"] = torch.randn(
            r.choice([1, batch]), r.choice([1, heads]), seq_q, r.choice([1, seq_kv])
        )
    if r.random() < 0.3:
        options["kv_lengths"] = torch.tensor([r.randint(0, n + 2) for n in lengths_k])
    if r.random() < 0.4:
        options["alibi_slopes"] = torch.rand(*r.choice([(), (batch,)]), heads)
    if r.random() < 0.4:
        options["sinks"] = torch.randn(heads)
    kind = r.choice(["none", "mask", "scattered", "blocks", "head-blocks"])
    if kind == "mask":
        options["mask"] = torch.rand(batch, r.choice([1, heads]), seq_q, seq_kv) < 0.7
    if kind in ("none", "mask"):
        return options, {}
    return options, {"typed": draw_typed(kind, batch, heads, seq_q, seq_kv, torch.Generator().manual_seed(3))}


@pytest.mark.parametrize("seed", range(10))
def test_products_on_the_cuda_kernels(seed, emulator):
    """Everything that they know, in packed sequences, several tiles long."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads = r.randint(2, 4), r.choice([(2, 1), (3, 3), (6, 2)])
    lengths_q, lengths_k = ([r.choice([0, 1, 17, 64, 70]) for _ in range(batch)] for _ in range(2))
    lengths_q[0], lengths_k[-1] = 33, 90
    options, more = draw_masks(r, lengths_q, lengths_k, heads[0])
    typed = more.pop("typed", None)
    oracle = {"mask": typed.dense} if typed else {}
    if r.random() < 0.4:
        options["dropout_p"] = 0.3
        torch.manual_seed(seed)
        state = fae.testing.next_rng_state()
        oracle["keep"] = fae.testing.dropout_mask(state, batch, heads[0], max(lengths_q), max(lengths_k), 0.3)
    dtype = r.choice([torch.float32, torch.bfloat16])
    tensors = packed(
        lengths_q, lengths_k, heads, r.choice([(8, 8), (24, 6)]), dtype, beyond=(r.randint(0, 3), 2)
    )
    fae.testing.set_emulator_seed(seed)
    how = {"deterministic": seed % 2 == 0, **({"mask": typed.mask} if typed else {})}
    compare(tensors, lengths_q, lengths_k, EMULATED.backend, options, oracle, seed=seed, **how)
