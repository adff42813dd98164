"""What dropout leaves, by the definition: Philox4x32 with 7 rounds in NumPy's unsigned integers."""

from __future__ import annotations

import math

import numpy as np
import torch

ROUNDS = 7


def philox(counter, key):
    """Four uint64 arrays below 2^32 for counters (x0, x1, x2, x3) under the key (k0, k1)."""
    word, low, half = np.uint64, np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = (np.asarray(x, word) for x in counter)
    k0, k1 = (word(k) for k in key)
    for _ in range(ROUNDS):
        product0, product1 = word(0xD2511F53) * x0, word(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (product1 >> half) ^ x1 ^ k0,
            product1 & low,
            (product0 >> half) ^ x3 ^ k1,
            product0 & low,
        )
        k0, k1 = (k0 + word(0x9E3779B9)) & low, (k1 + word(0xBB67AE85)) & low
    return x0, x1, x2, x3


def keep_mask(rng_state, batch: int, heads: int, seq_q: int, seq_kv: int, dropout_p: float) -> torch.Tensor:
    """bool (batch, heads, seq_q, seq_kv)."""
    seed, offset = (int(word) % 2**64 for word in rng_state)
    call_key = philox((offset % 2**32, offset >> 32, 0, 0), (seed % 2**32, seed >> 32))[:2]
    b, h, i, j = np.ogrid[:batch, :heads, :seq_q, :seq_kv]
    shape = (batch, heads, seq_q, seq_kv)
    words = np.stack([np.broadcast_to(w, shape) for w in philox((j // 4, i, h, b), call_key)])
    mine = np.take_along_axis(words, np.broadcast_to(j % 4, shape)[None], 0)[0]
    return torch.from_numpy(mine >= np.uint64(min(2**32 - 1, math.floor(dropout_p * 2**32))))
