"""Which probabilities a dropout keeps: a function of the seed and of where the probability stands, alone.

Philox4x32 with 7 rounds (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) in plain
torch operations. `rng_state` is (seed, offset), two int64 read as unsigned. Encrypting the offset under the
seed gives the key of a call; under that, the counter (c, i, h, b) gives the words of keys 4 c .. 4 c + 3 of
query i, head h, batch b. A probability is kept where its word reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_WORDS = 4


def draw_state(device: torch.device | str) -> Tensor:
    """A new (seed, offset) from torch's generator of `device`: int64 (2,), any bits."""
    if torch.compiler.is_compiling():
        return torch.ops.flash_attn_ext.draw_dropout_state(torch.device(device))
    return _draw_now(device)


def no_state(device: torch.device) -> Tensor:
    """In the place of one: what is only described or checked draws nothing."""
    return torch.empty(2, dtype=torch.int64, device=device)


def _draw_now(device: torch.device) -> Tensor:
    return torch.randint(-(1 << 63), (1 << 63) - 1, (2,), dtype=torch.int64, device=device)


# In compiled graphs an operator of its own: torch's code generator would draw `randint` from other numbers
# than eager mode, and its partitioner draw it a second time for the backward pass where it is to save memory
# (an activation_memory_budget of 0.5; near 0 it does so with every operator, torch's own dropout included).
_library = torch.library.Library("flash_attn_ext", "FRAGMENT")
_library.define("draw_dropout_state(Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.impl("draw_dropout_state", _draw_now, "CompositeExplicitAutograd")
torch.library.register_fake(
    "flash_attn_ext::draw_dropout_state",
    lambda device: torch.empty(2, dtype=torch.int64, device=device),
    lib=_library,
)


def state_of(rng_state: Tensor, number: int) -> Tensor:
    """The state of one of several calls that share what was drawn: another offset for each `number`."""
    seed, offset = rng_state.unbind()
    return torch.stack([seed, offset + number])


def threshold(dropout_p: float) -> int:
    """A word below this is dropped."""
    return min(_LOW, int(dropout_p * 2.0**32))


def philox(counter: Iterable[Tensor], key: Iterable[Tensor]) -> list[Tensor]:
    """Four words for each counter. Words are int64 in [0, 2^32); counters and keys broadcast."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products of 64 bits wrap around, and the shift brings the sign along: the mask takes it off.
        a, b = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x2 = (b >> 32) & _LOW ^ x1 ^ k0, (a >> 32) & _LOW ^ x3 ^ k1
        x1, x3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return [x0, x1, x2, x3]


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x & _LOW, (x >> 32) & _LOW


def call_key(rng_state: Tensor) -> list[Tensor]:
    """The key of one attention call: two 0-d words."""
    seed, offset = rng_state.unbind()
    zero = torch.zeros_like(seed)
    return philox((*_halves(offset), zero, zero), _halves(seed))[:2]


def keep_tile(
    key: list[Tensor], dropout_p: float, batch: range, heads: range, queries: range, keys: range
) -> Tensor:
    """What is kept of a tile: bool (batch, heads, queries, keys). `key` is the `call_key`."""
    device = key[0].device
    first, end = keys.start // _WORDS, -(-keys.stop // _WORDS)
    axes = (batch, heads, queries, range(first, end))
    b, h, i, c = (
        torch.arange(axis.start, axis.stop, device=device).view(-1, *(1,) * (3 - place))
        for place, axis in enumerate(axes)
    )
    shape = tuple(map(len, axes))
    words = [word.expand(shape) for word in philox((c, i, h, b), key)]
    kept = torch.stack([word >= threshold(dropout_p) for word in words], -1).flatten(-2)
    return kept[..., keys.start - _WORDS * first : keys.stop - _WORDS * first]
