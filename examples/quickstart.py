"""Ten lines to a first result, and a few more to what else the function does."""

import torch

from flash_attn_ext import estimate_memory, explain, flash_attention

batch, seq, heads, dim = 2, 1000, 8, 64
q, k, v = (torch.randn(batch, seq, heads, dim, requires_grad=True) for _ in range(3))

# Causal attention, differentiable as any torch operation.
out = flash_attention(q, k, v, causal=True)  # (batch, seq, heads, dim)
out.square().mean().backward()
print("output", tuple(out.shape), "gradient of q", tuple(q.grad.shape))

# The same by torch, which wants heads before the sequence.
expected = torch.nn.functional.scaled_dot_product_attention(
    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
)
print("largest difference from torch", (out.transpose(1, 2) - expected).abs().max().item())

# Two key heads for eight query heads, a sliding window, and sequences of different lengths.
with torch.no_grad():
    few = k[:, :, :2], v[:, :, :2]
    lengths = torch.tensor([1000, 300])
    windowed = flash_attention(q, *few, causal=True, window=(128, 0), kv_lengths=lengths)
print("grouped heads, window, lengths:", tuple(windowed.shape))

# What will run, and what it saves.
print(explain(q, k, v, causal=True))
memory = estimate_memory(batch, heads, 16384, 16384, dim, torch.float32)
print(f"at 16384 tokens: {memory.standard_bytes / 2**30:.1f} GiB unfused, "
      f"{memory.flash_bytes / 2**20:.1f} MiB here")  # fmt: skip
