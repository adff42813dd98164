"""Multi-head attention with its projections: torch's module over this package's attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, reference
from ._extended import check_dropout
from ._options import Options
from ._philox import draw_state
from .functional import flash_attention

_MAX_DIM = 1024  # of a head


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, with the same parameters and results, in linear memory.

    A state dict goes from either module to the other, and the same seed initialises both alike.

    Args:
        embed_dim: width of the queries and of the result; num_heads divides it.
        dropout: the probability in [0, 1] with which an attention weight is dropped in training, by
            this package's generator; see `flash_attention`.
        bias: whether the projections have biases.
        add_bias_kv, add_zero_attn: one more key with a learned value, and one of zeros, that all
            queries see. A dense `attn_mask` is then copied with as many columns more.
        kdim, vdim: widths of keys and values; embed_dim when None.
        batch_first: (batch, seq, width) instead of (seq, batch, width).

    Differs from torch's in what is undefined there, or refused:
        - a query that sees no key gives 0 (then projected) and weights of 0, not NaN;
        - nested tensors, jagged ones too, may require gradients and may be three different ones;
        - masks may have any floating dtype, and their types need not match;
        - `nn.TransformerEncoderLayer` always calls this module, where it would otherwise compute
          the layer with an operator that reads the parameters, in evaluation without gradients.

    Example:
        >>> attention = MultiheadAttention(512, 8, batch_first=True)
        >>> x = torch.randn(2, 1024, 512)
        >>> attention(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 1024, 512])

    Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype,
        )  # fmt: skip
        self.register_forward_pre_hook(_be_called)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the projected queries over the projected keys and values.

        Args:
            query: (seq_q, batch, embed_dim), or with `batch_first` (batch, seq_q, embed_dim), or
                without batch (seq_q, embed_dim); or a nested tensor, with `batch_first` alone.
            key: (seq_kv, batch, kdim); value: (seq_kv, batch, vdim); likewise.
            key_padding_mask: (batch, seq_kv), or (seq_kv,): bool with True = *not* to be seen, or
                floating, added to the scores. It is never expanded to seq_q x seq_kv.
            need_weights: also return the weights. These take O(seq_q * seq_kv) memory, for all
                heads at once; nothing does so without them.
            attn_mask: (seq_q, seq_kv) or (batch * num_heads, seq_q, seq_kv): bool with True = *not*
                to be seen, or floating, added to the scores.
            average_attn_weights: whether weights are averaged over heads.
            is_causal: a hint that `attn_mask`, which must be given, is the causal mask. It is then
                not read, except for weights, with additional keys, and together with a
                `key_padding_mask` when seq_q and seq_kv differ.

        Returns:
            out, shaped like query, and the weights or None: (batch, seq_q, seq_kv), or
            (batch, num_heads, seq_q, seq_kv) if not averaged, each without batch if the query is;
            of nested tensors padded with zeros. Both are differentiable.

        Raises:
            AssertionError, RuntimeError: wrong shapes or types, as torch raises; the message names
                the argument. ValueError: a dropout outside [0, 1].
        """
        if query.is_nested or key.is_nested or value.is_nested:
            masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            return self._nested(query, key, value, need_weights, average_attn_weights, is_causal, masks)
        self._check(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask must be given with is_causal=True, which says that it is causal")
        is_batched = query.dim() == 3
        sequence_first = is_batched and not self.batch_first

        def batch_first(t: Tensor) -> Tensor:
            return t.transpose(0, 1) if sequence_first else t if is_batched else t[None]

        q, k, v = (batch_first(t.unflatten(-1, self._heads)) for t in self._project(query, key, value))
        k, v, more = self._with_more_keys(k, v)
        seq_q, seq_kv = q.shape[1], k.shape[1] - more
        hinted = is_causal and not need_weights and not more
        if hinted and (key_padding_mask is None or seq_q == seq_kv):
            attn_mask, causal = None, "top_left"
        else:
            causal = False
        attn_mask = self._scores(attn_mask, q.shape[0], seq_q, seq_kv, more)
        if key_padding_mask is not None:
            key_padding_mask = F.pad(key_padding_mask, (0, more)).view(q.shape[0], 1, 1, -1)
        if need_weights:
            out, weights = self._with_weights(q, k, v, attn_mask, key_padding_mask)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights[0]
        else:
            out, weights = self._attend(q, k, v, causal, attn_mask, key_padding_mask), None
        out = out.transpose(0, 1) if sequence_first else out if is_batched else out[0]
        return self.out_proj(out.flatten(-2)), weights

    @property
    def _heads(self) -> tuple[int, int]:
        return self.num_heads, self.head_dim

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each with width embed_dim; leading axes as they are."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _with_more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v, (batch, seq_kv, heads, dim), with those of add_bias_kv and add_zero_attn at their ends."""
        one = (k.shape[0], 1, *self._heads)
        keys, values = [k], [v]
        if self.bias_k is not None:
            keys.append(self.bias_k.view(1, 1, *self._heads).to(k.dtype).expand(one))
            values.append(self.bias_v.view(1, 1, *self._heads).to(v.dtype).expand(one))
        if self.add_zero_attn:
            keys.append(k.new_zeros(one))
            values.append(v.new_zeros(one))
        more = len(keys) - 1
        return (torch.cat(keys, 1), torch.cat(values, 1), more) if more else (k, v, 0)

    def _scores(
        self, attn_mask: Tensor | None, batch: int, seq_q: int, seq_kv: int, more: int
    ) -> Tensor | None:
        """`attn_mask` such that it broadcasts to (batch, heads, seq_q, seq_kv + more)."""
        if attn_mask is None:
            return None
        shape = (seq_q, seq_kv) if attn_mask.dim() == 2 else (batch * self.num_heads, seq_q, seq_kv)
        if tuple(attn_mask.shape) != shape:
            raise RuntimeError(f"attn_mask has shape {tuple(attn_mask.shape)}, expected {shape}")
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        return F.pad(attn_mask, (0, more)) if more else attn_mask

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool | str = False,
        attn_mask: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(batch, seq_q, heads, dim). attn_mask broadcasts to the scores; padding: (batch, 1, 1, seq_kv)."""
        options, scale = {}, None
        masks = [m for m in (attn_mask, padding) if m is not None]
        if len(masks) == 2 and attn_mask.dtype != torch.bool and padding.dtype != torch.bool:
            # Their sum would have a row of scores for each query of each batch.
            if q.shape[-1] + 2 > _MAX_DIM:  # one batch after the other, then
                each = zip(*(t.split(1) for t in (q, k, v, padding)), strict=True)
                own = attn_mask.split(1) if attn_mask.dim() == 4 else [attn_mask] * len(q)
                return torch.cat(
                    [self._attend(*qkv, causal, m + p) for (*qkv, p), m in zip(each, own, strict=True)]
                )
            q, k, scale = _with_scores_of_keys(q, k, padding[:, 0, 0])
            masks[1] = padding == -math.inf
        for m in masks:
            if m.dtype != torch.bool:
                options["bias"] = m
            elif "mask" not in options:
                options["mask"] = ~m
            else:  # both are bool, and a bias of -inf hides as well
                options["bias"] = q.new_zeros(m.shape).masked_fill_(m, -math.inf)
        p = self.dropout if self.training else 0.0
        out = flash_attention(q, k, v, causal, scale=scale, dropout_p=0.0 if p == 1 else p, **options)
        return 0.0 * out if p == 1 else out

    def _with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(batch, seq_q, heads, dim), and the weights (batch, heads, seq_q, seq_kv) after dropout."""
        weights_dtype = q.dtype
        if torch._C._is_any_autocast_enabled():
            q, k, v = autograd.autocast(q, k, v)
            # On other devices than the CPU, autocast's softmax is float32.
            weights_dtype = q.dtype if q.is_cpu else torch.promote_types(q.dtype, torch.float32)
        mask = bias = None
        for m in (attn_mask, padding):
            if m is None:
                continue
            if m.dtype == torch.bool:
                mask = ~m if mask is None else mask & ~m
            else:
                bias = m if bias is None else bias + m
        p = self.dropout if self.training else 0.0
        kept = check_dropout(0.0 if p == 1 else p)
        state = draw_state(q.device) if kept else None
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        options = Options(mask=mask, bias=bias, rng_state=state, dropout_p=kept)
        out, weights = reference.with_weights(q.to(wide), k.to(wide), v.to(wide), options)
        out, weights = out.to(dtype), weights.to(weights_dtype)
        return (0.0 * out, 0.0 * weights) if p == 1 else (out, weights)

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
        masks: dict[str, Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """Of nested tensors (batch, seq, width), in the layout of the query."""
        named = {"query": query, "key": key, "value": value}
        for name, t in named.items():
            if not t.is_nested or t.dim() != 3:
                given = f"a nested one of rank {t.dim()}" if t.is_nested else "a dense one"
                raise AssertionError(
                    f"{name} must be nested like the others of query, key and value, of rank 3, got {given}"
                )
        for name, mask in masks.items():
            if mask is not None:
                raise AssertionError(f"{name} must be None for nested tensors, got shape {tuple(mask.shape)}")
        if not self.batch_first or self.bias_k is not None or self.add_zero_attn or is_causal:
            raise AssertionError(
                "nested tensors need batch_first=True, add_bias_kv=False, add_zero_attn=False and "
                f"is_causal=False, got {self.batch_first}, {self.bias_k is not None}, {self.add_zero_attn} "
                f"and {is_causal}"
            )
        if need_weights:
            parts = zip(*(t.unbind() for t in named.values()), strict=True)
            outs, weights = zip(
                *(self.forward(*p, average_attn_weights=average_attn_weights) for p in parts), strict=True
            )
            longest = [max(w.shape[axis] for w in weights) for axis in (-2, -1)]
            padded = [F.pad(w, (0, longest[1] - w.shape[-1], 0, longest[0] - w.shape[-2])) for w in weights]
            return torch.nested.as_nested_tensor(list(outs), layout=query.layout), torch.stack(padded)
        layout, jagged = query.layout, {}
        for t in named.values():
            if id(t) not in jagged:
                jagged[id(t)] = t if t.layout == torch.jagged else _in_layout(t, torch.jagged)
        q, k, v = self._project(*(jagged[id(t)] for t in named.values()))
        out = self._attend(*(t.unflatten(-1, self._heads) for t in (q, k, v)))
        out = self.out_proj(out.flatten(-2))
        return out if layout == torch.jagged else _in_layout(out, layout), None

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        """Raises for shapes and types that torch's module refuses, by the classes of its exceptions."""
        rank = query.dim()
        if rank not in (2, 3):
            raise AssertionError(f"query must have rank 2 or 3, got shape {tuple(query.shape)}")
        ranks = {"key": (key, (rank,)), "value": (value, (rank,)), "attn_mask": (attn_mask, (2, 3))}
        ranks["key_padding_mask"] = key_padding_mask, (rank - 1,)
        for name, (t, allowed) in ranks.items():
            if t is not None and t.dim() not in allowed:
                expected = " or ".join(map(str, allowed))
                raise AssertionError(
                    f"{name} must have rank {expected} for a query of rank {rank}, got shape {tuple(t.shape)}"
                )
        for name in ("key_padding_mask", "attn_mask"):
            t = ranks[name][0]
            if t is not None and t.dtype != torch.bool and not t.is_floating_point():
                raise AssertionError(f"{name} must be bool or floating, got {t.dtype}")
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"query has shape {tuple(query.shape)}, expected embed_dim {self.embed_dim} as its last size"
            )
        same = slice(None) if self._qkv_same_embed_dim else slice(-1)
        if key.shape[same] != value.shape[same]:
            raise AssertionError(
                f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}, which must be equal"
                + ("" if self._qkv_same_embed_dim else " up to their last sizes")
            )
        for name, t, width in (("key", key, self.kdim), ("value", value, self.vdim)):
            if t.shape[-1] != width:
                raise RuntimeError(f"{name} has shape {tuple(t.shape)}, expected {width} as its last size")
        axis = 0 if self.batch_first else 1
        if rank == 3 and key.shape[axis] != query.shape[axis]:
            raise RuntimeError(
                f"key has shape {tuple(key.shape)} and query {tuple(query.shape)}, with batch sizes "
                f"{key.shape[axis]} and {query.shape[axis]} at axis {axis}, which must be equal"
            )
        if key_padding_mask is not None:
            seq_kv = key.shape[1 - axis] if rank == 3 else key.shape[0]
            shape = (query.shape[axis], seq_kv) if rank == 3 else (seq_kv,)
            if tuple(key_padding_mask.shape) != shape:
                raise AssertionError(
                    f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected {shape}"
                )
        if not torch._C._is_any_autocast_enabled():
            weight = self.out_proj.weight
            for name, t in (("query", query), ("key", key), ("value", value)):
                if t.dtype != weight.dtype and weight.is_floating_point():
                    raise RuntimeError(f"{name} has dtype {t.dtype}, the module's parameters {weight.dtype}")


def _be_called(module: torch.nn.Module, args: tuple) -> None:
    """A hook that does nothing but be there: only where no module has hooks `nn.TransformerEncoderLayer`
    takes its fused operator, which reads the parameters of `self_attn` and does not call it."""


def _in_layout(t: Tensor, layout: torch.layout) -> Tensor:
    """A nested tensor in another layout, differentiable."""
    return torch.nested.as_nested_tensor(list(t.unbind()), layout=layout)


def _with_scores_of_keys(q: Tensor, k: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, float]:
    """q, k and their scale, with columns that add `scores` (batch, seq_kv) to all that a key gives.

    A factor that is a power of two stands in q, so that in k alone something is rounded; a half type's rest
    has a column of its own. What is -inf is 0 here. q, k: (batch, seq, heads, dim).
    """
    dim = q.shape[-1]
    factor = 2.0 ** math.ceil(math.log2(dim) / 2)
    limit = torch.finfo(k.dtype).max / factor  # products must stay finite
    column = scores.masked_fill(scores == -math.inf, 0).to(torch.promote_types(k.dtype, torch.float32))
    column = (column * (math.sqrt(dim) / factor)).clamp(-limit, limit)
    high = column.to(k.dtype)
    columns = torch.stack([high, (column - high).to(k.dtype)], -1)[:, :, None]
    k = torch.cat([k, columns.expand(*k.shape[:-1], 2)], -1)
    return torch.cat([q, q.new_full((*q.shape[:-1], 2), factor)], -1), k, 1 / math.sqrt(dim)


def replace_multihead_attention(model: torch.nn.Module) -> torch.nn.Module:
    """Turns every `torch.nn.MultiheadAttention` in `model`, itself included, into this package's, in place.

    Parameters stay the same objects, so that optimizers and state dicts go on as they were. Subclasses of
    torch's module are left alone.

    Returns: `model`.

    Example:
        >>> encoder = torch.nn.TransformerEncoderLayer(512, 8, batch_first=True)
        >>> replace_multihead_attention(encoder).self_attn
        MultiheadAttention(...)
    """
    for module in model.modules():
        if type(module) is torch.nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
            module.register_forward_pre_hook(_be_called)
    return model
