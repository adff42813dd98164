"""Attention as modules: `MultiheadAttention` in the place of torch's, and `Attention` from a config."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import AttentionConfig
from .functional import flash_attention
from .multihead import MultiheadAttention, replace_multihead_attention

__all__ = ["Attention", "MultiheadAttention", "create_attention", "replace_multihead_attention"]


class Attention(nn.Module):
    """softmax(scale q k^T) v as a module without parameters; see `create_attention`."""

    def __init__(self, config: AttentionConfig | None = None):
        super().__init__()
        if config is not None and not isinstance(config, AttentionConfig):
            raise TypeError(f"config must be an AttentionConfig or None, got {type(config).__name__}")
        self.config = config or AttentionConfig()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool | str = False
    ) -> Tensor:
        """Attention of q (batch, seq_q, heads_q, dim) over k (batch, seq_kv, heads_kv, dim) and
        v (batch, seq_kv, heads_kv, dim_v).

        Args:
            mask: broadcastable to (batch, heads_q, seq_q, seq_kv); bool with True = may attend,
                or floating, added to the scores.
            causal: as in `flash_attention`, whose errors these are too.

        Returns: (batch, seq_q, heads_q, dim_v).
        """
        is_additive = isinstance(mask, Tensor) and mask.dtype != torch.bool
        if is_additive and not mask.is_floating_point():
            raise TypeError(f"mask must be bool or floating, got {mask.dtype}")
        return flash_attention(
            q,
            k,
            v,
            causal,
            mask=None if is_additive else mask,
            bias=mask if is_additive else None,
            config=self.config,
        )

    def extra_repr(self) -> str:
        return repr(self.config)


def create_attention(config: AttentionConfig | None = None) -> Attention:
    """A module that carries out attention as `config` says.

    Example:
        >>> attention = create_attention(AttentionConfig.for_device("cpu"))
        >>> x = torch.randn(2, 128, 8, 64)
        >>> attention(x, x, x, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    return Attention(config)
