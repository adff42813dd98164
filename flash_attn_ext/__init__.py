"""Exact, memory-efficient attention for PyTorch.

Example:
    >>> import torch, flash_attn_ext
    >>> q = k = v = torch.randn(2, 1024, 8, 64)
    >>> out = flash_attn_ext.flash_attention(q, k, v, causal=True)
"""

from . import autograd, batching, dispatch, fake, flops, masks, nn, ops
from . import testing as testing
from ._C import build_info as _build_info
from .caches import KVCache, PagedKVCache
from .config import AttentionConfig
from .dispatch import available_backends, set_backend
from .functional import flash_attention, merge_states
from .introspect import MemoryEstimate, Plan, build_info, estimate_memory, explain
from .kvcache import flash_attention_with_kvcache
from .nn import Attention, create_attention
from .sdpa import scaled_dot_product_attention, use_flash_attention
from .stats import AttentionStats, attention_stats, plot_attention
from .varlen import flash_attention_varlen

__version__: str = _build_info()["version"]
__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionStats",
    "KVCache",
    "MemoryEstimate",
    "PagedKVCache",
    "Plan",
    "attention_stats",
    "available_backends",
    "build_info",
    "create_attention",
    "estimate_memory",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "flash_attention_with_kvcache",
    "masks",
    "merge_states",
    "nn",
    "plot_attention",
    "scaled_dot_product_attention",
    "set_backend",
    "use_flash_attention",
]

dispatch.configure_logging()
for _operators in (ops.KERNELS, ops.PORTABLE, ops.KERNELS_EXTENDED, ops.PORTABLE_EXTENDED):
    if _operators is not None:
        fake.register(_operators)
        autograd.register(_operators)
        batching.register(_operators)
flops.register()
