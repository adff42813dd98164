"""Attention of models of Hugging Face's transformers 5, by name: `attn_implementation="fae"`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers import masking_utils as hf
    from transformers.utils.import_utils import is_tracing

    from ._compact import CompactMask, Pattern, Place, of_pattern, read
except ImportError as error:
    raise ImportError(
        f"flash_attn_ext.integrations.transformers needs transformers 5 (pip install transformers): {error}"
    ) from error

from .._compiling import constant_when_compiled
from ..dispatch import log_once
from ..functional import flash_attention
from ..masks import CausalMask, DenseMask, PaddingMask, WindowMask

# What transformers makes of a name: a kernel to download, a model's right to refuse, a prefix, a repository.
_RESERVED = ("flash", "sdpa", "flex_attention", "eager", "|", "/")


def register(name: str = "fae") -> str:
    """Makes `attn_implementation=name` known to transformers, for every model that chooses by name.

    Causal masks, sliding windows, chunks, packed sequences and padding are never made dense; other mask
    functions become bool tensors, and 4-D masks given by the caller stay what they are, as with "sdpa".
    Softcap (Gemma 2), sinks (GPT-OSS), T5's position bias with its gradient, dropout, static caches and
    `torch.compile(fullgraph=True)` work. Rows of padding, which see nothing, are 0. `output_attentions=True`
    raises: the weights never exist as a whole.

    Args:
        name: any, but for what transformers reads something else into: "flash", "sdpa", "flex_attention",
            "eager", "|" and "/" must not occur in it.

    Returns:
        The name.

    Raises:
        ValueError: such a name. ImportError, when this module is imported: there is no transformers 5.

    Example:
        >>> from flash_attn_ext.integrations.transformers import register
        >>> model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=register())
        >>> model.set_attn_implementation("fae")  # or a model that is there already
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a text that is not empty, got {name!r}")
    for part in _RESERVED:
        if part in name:
            raise ValueError(
                f"name must not contain {part!r}, which transformers gives a meaning; got {name!r}"
            )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)
    return name


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CompactMask | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: asked for `is_causal` where the argument is None, unless it is of a model that does not
            support "sdpa": transformers sets it for that alone, and None then hides nothing, as in "eager".
        query: (batch, heads_q, seq_q, dim); key: (batch, heads_kv, seq_kv, dim); value: (batch, heads_kv,
            seq_kv, dim_v). heads_q is a multiple of heads_kv, and a batch of 1 broadcasts.
        attention_mask: what `attention_mask` below returns; or bool, True = may attend, or floating, added
            to the scores, broadcastable to (batch, heads_q, seq_q, seq_kv). None: all keys, or where
            `is_causal` those up to the query's own place, counted from the ends of both.
        dropout: the probability with which a weight is dropped.
        scaling: factor of the scores; default 1 / sqrt(dim).
        softcap: scores become softcap * tanh(scores / softcap).
        sliding_window: a query sees so many keys, its own included; heeded where there is no mask and
            `is_causal` (a mask has the window in it).
        s_aux: (heads_q,), sinks.
        position_bias: floating, broadcastable to the scores and added to them; differentiable.

    Returns:
        (batch, seq_q, heads_q, dim_v); and None for the weights, which are never there as a whole.

    Raises:
        ValueError: `output_attentions`; a mask for another number of keys. NotImplementedError: arguments of
        sparse or paged attention. TypeError, ValueError: as `flash_attention`.
    """
    _refuse(kwargs)
    causal, window, mask, bias = False, None, None, position_bias
    if isinstance(attention_mask, CompactMask):
        if attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
            queries, keys = attention_mask.shape[2:]
            raise ValueError(
                f"attention_mask is for {queries} queries and {keys} keys, "
                f"got {query.shape[2]} and {key.shape[2]}"
            )
        mask = attention_mask.seen
        if attention_mask.keys != key.shape[2]:
            key, value = key[:, :, : attention_mask.keys], value[:, :, : attention_mask.keys]
            if bias is not None and bias.shape[-1] != 1:
                bias = bias[..., : attention_mask.keys]
        if isinstance(mask, CausalMask):
            causal, mask = mask.alignment, None
        elif isinstance(mask, DenseMask):
            mask = mask.seen
    elif attention_mask is None:
        if is_causal is None:
            refuses = _supports_sdpa(type(getattr(module, "config", module))) is False
            is_causal = not refuses and getattr(module, "is_causal", True)
        causal = bool(is_causal)
        if causal and sliding_window is not None:
            window = (sliding_window - 1, None)
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        mask = attention_mask
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        batch = torch.broadcast_shapes(*(t.shape[:1] for t in (query, key, value)))
        query, key, value = (t.expand(*batch, *t.shape[1:]) for t in (query, key, value))
    out = flash_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal,
        scale=scaling,
        mask=mask,
        bias=bias,
        window=window,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return out, None


def _refuse(kwargs: dict) -> None:
    """Raises for what would change the result, or for results that there are not."""
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False: the weights are never there as a whole; "
            'use attn_implementation="eager" to look at them'
        )
    for name, what in {"cache": "a paged cache", "indices": "sparse attention by indices"}.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name} must be None: {what} is not served by this implementation")


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = hf.causal_mask_function,
    attention_mask: Tensor | CompactMask | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | CompactMask | None:
    """The mask for models to hand to `attention`, in memory linear in the lengths where that is possible.

    Args:
        batch_size, q_length, kv_length: sizes of the mask.
        q_offset, kv_offset: the positions of the first query and key; the former may be a 0-d tensor.
        mask_function: of (batch, head, query, key) indices: True where the key is seen.
        attention_mask: bool (batch, tokens), False = padding; keys past its end are hidden, too. Or a mask
            made here before, which comes back as it is.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may stand for a mask that is only
            causal, or hides nothing.
        use_vmap: the function is the caller's own, for which there is only a dense mask.
        device: where the mask is to be.

    Returns:
        None, or bool (batch_size, 1, q_length, kv_length), or a `CompactMask` of that shape. None hides
        nothing, or is a causal mask of a model that supports "sdpa", whose layers know whether they are
        causal. The tensor is of stride 0 over the queries where only padding is hidden that is not all on
        the right, and dense where q_length is 1, for a function that is not known, and where the model
        forbids None and so will compute with its mask. Models that refuse "sdpa" get no tensors, but masks
        that turn into those of "eager" where a layer computes with them; and models whose layers do not ask
        for attention by name, and so compute it themselves, get the mask of "eager" at once.
    """
    if isinstance(attention_mask, CompactMask):
        return attention_mask
    config = kwargs.get("config")
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False,
        use_vmap=use_vmap, device=device, **kwargs,
    )  # fmt: skip
    if config is not None and not _asks_for_attention(type(config)):
        return hf.eager_mask(**arguments)
    supports_sdpa = True if config is None else _supports_sdpa(type(config))
    pattern = None if use_vmap else read(mask_function)
    if pattern is not None and not pattern.causal:
        # A decoder told not to be causal has layers that would take None for causal.
        may_skip = allow_is_bidirectional_skip and getattr(config, "is_causal", True)
    else:
        may_skip = allow_is_causal_skip
    if (
        pattern is None
        or (attention_mask is not None and attention_mask.dim() != 2)
        # Without documents, a causal mask that must not be None is one that the model computes with, or one
        # of a compiled decoding step, where a row of constant shape is best.
        or (pattern.causal and not may_skip and pattern.documents is None)
    ):
        mask = hf.sdpa_mask(**arguments)
    else:
        place = Place(batch_size, q_length, kv_length, q_offset, kv_offset, device)
        mask = _of_pattern(pattern, place, attention_mask, may_skip, supports_sdpa, arguments)
    if supports_sdpa is not False or mask is None:
        return mask
    if isinstance(mask, Tensor):
        mask = CompactMask(DenseMask(mask), tuple(mask.shape), kv_length, device)
    return mask.for_eager(kwargs.get("dtype", torch.float32))


def _of_pattern(
    pattern: Pattern,
    place: Place,
    attention_mask: Tensor | None,
    may_skip: bool,
    supports_sdpa: bool | None,
    arguments: dict,
) -> Tensor | CompactMask | None:
    """`attention_mask` of a known pattern. `supports_sdpa`: as `_supports_sdpa` has it; `arguments`: those of
    hf.sdpa_mask."""
    traced = is_tracing(place.q_offset if isinstance(place.q_offset, Tensor) else attention_mask)
    if isinstance(place.q_offset, Tensor) and not traced:
        place = replace(place, q_offset=int(place.q_offset))
    batch, seq_q, seq_kv, device = place.batch, place.seq_q, place.seq_kv, place.device
    padding = None if attention_mask is None else _padding(attention_mask.bool(), seq_kv, place.kv_offset)
    compact = of_pattern(pattern, place, padding, traced)
    if compact is None and may_skip:
        # What None says is known of one query, and of models that are known.
        if seq_q == 1 or supports_sdpa or (supports_sdpa is False and not pattern.causal):
            return None
        seen = CausalMask() if pattern.causal else WindowMask()
        return CompactMask(seen, (batch, 1, seq_q, seq_kv), seq_kv, device)
    if seq_q == 1 or (compact is None and pattern.causal):
        return hf.sdpa_mask(**arguments)
    if compact is None:
        return torch.ones((), dtype=torch.bool, device=device).expand(batch, 1, seq_q, seq_kv)
    if isinstance(compact.seen, DenseMask) and not pattern.causal:  # padding alone
        row = compact.seen.seen
        if not traced and bool((row[..., 1:] <= row[..., :-1]).all()):  # on the right: a length is enough
            lengths = PaddingMask(row.sum(-1).flatten().expand(batch))
            return CompactMask(lengths, compact.shape, compact.keys, device)
        return row.expand(batch, 1, seq_q, seq_kv)
    return compact


def _padding(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """(batch, kv_length): the keys that are there; False where `attention_mask` ends before."""
    missing = kv_offset + kv_length - attention_mask.shape[1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _models_of(kind: type, own: bool) -> list[type]:
    """The classes of models in the "modeling_" modules beside that of `kind`, and in this where `own`."""
    prefix = kind.__module__.rpartition(".")[0] + ".modeling_"
    return [
        found
        for name, module in list(sys.modules.items())
        if name.startswith(prefix) or (own and name == kind.__module__)
        for found in list(vars(module).values())
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.__module__ == name
    ]


_SUPPORTS: dict[type, bool | None] = {}


@constant_when_compiled
def _supports_sdpa(kind: type) -> bool | None:
    """Whether all models of such a config or layer support "sdpa"; None where no model is found."""
    if kind not in _SUPPORTS:
        models = _models_of(kind, own=True)
        _SUPPORTS[kind] = all(model._supports_sdpa is True for model in models) if models else None
    return _SUPPORTS[kind]


_ASKS: dict[type, bool] = {}


@constant_when_compiled
def _asks_for_attention(config: type) -> bool:
    """Whether models of such a config ask for attention by name, as transformers tells by their source.

    Some do not, and would add a mask of ours to their scores, or take None for no mask at all.
    """
    if config not in _ASKS:
        models = _models_of(config, own=False)
        _ASKS[config] = all(
            getattr(model, "_can_set_attn_implementation", lambda: True)() for model in models
        )
        if not _ASKS[config]:
            log_once(
                logging.WARNING,
                f"models of {config.__name__} compute attention themselves: it is transformers' own there",
            )
    return _ASKS[config]
