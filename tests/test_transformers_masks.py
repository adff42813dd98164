"""The masks that transformers' models get from this package: exact, and never dense where a few numbers do."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_ext import flash_attention
from flash_attn_ext.masks import CausalMask, PaddingMask, WindowMask

pytest.importorskip("transformers", minversion="5.0")

import hf_models as models
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from flash_attn_ext.integrations import transformers as integration
from flash_attn_ext.integrations._compact import CompactMask

integration.register()
BATCH = 2


def packed(base, seq: int):
    positions = torch.cat([torch.arange(seq // 2), torch.arange(seq - seq // 2)])[None].expand(BATCH, -1)
    documents = masking_utils.find_packed_sequence_indices(positions)
    return masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(base, positions),
        masking_utils.packed_sequence_mask_function(documents),
    )


# By name: from a window and the padding, a mask function.
FUNCTIONS = {
    "causal": lambda n, padding: masking_utils.causal_mask_function,
    "window": lambda n, padding: masking_utils.sliding_window_causal_mask_function(n),
    "both ways": lambda n, padding: masking_utils.bidirectional_mask_function,
    "window both ways": lambda n, padding: masking_utils.sliding_window_bidirectional_mask_function(n),
    "chunks": lambda n, padding: masking_utils.chunked_causal_mask_function(n, left_padding(padding)),
    "odd": lambda n, padding: masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < n),
    "other chunks": lambda n, padding: masking_utils.chunked_causal_mask_function(n, torch.tensor([1, 2])),
}  # fmt: skip


def left_padding(padding: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(BATCH, dtype=torch.long) if padding is None else (padding.cumsum(-1) == 0).sum(-1)


def draw_padding(tokens: int, kind: str) -> torch.Tensor | None:
    place = torch.arange(tokens)
    own = torch.tensor([[0], [random.randrange(4)]])
    return {
        "none": None,
        "all there": torch.ones(BATCH, tokens, dtype=torch.bool),
        "left": place >= own,
        "right": place < tokens - own,
        "holes": torch.rand(BATCH, tokens) > 0.3,
    }[kind]


def drawn(mask: torch.Tensor | CompactMask | None, sizes: dict, causal: bool) -> torch.Tensor:
    """A mask as a dense tensor, None by what `attention` makes of it."""
    if isinstance(mask, CompactMask):
        return mask.dense()
    if mask is not None:
        return mask
    seen = torch.ones(BATCH, 1, sizes["q_length"], sizes["kv_length"], dtype=torch.bool)
    if causal:
        assert sizes["q_length"] in (1, sizes["kv_length"])
        seen = seen.tril(sizes["kv_length"] - sizes["q_length"])
    return seen


@pytest.mark.parametrize("padded", ["none", "all there", "left", "right", "holes"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_are_exact(name, padded):
    """Against the dense masks of transformers, with caches of all kinds."""
    random.seed(f"{name} {padded}")
    torch.manual_seed(random.randrange(1000))
    for _ in range(200):
        q_length, q_offset = random.choice([1, 2, 5, 7]), random.choice([0, 0, 3, 6])
        kv_offset = random.choice([0, min(q_offset, 2)])
        used = q_offset + q_length - kv_offset
        sizes = dict(q_length=q_length, kv_length=used + random.choice([0, 0, 4]))
        padding = draw_padding(kv_offset + random.choice([used, sizes["kv_length"]]), padded)
        function = FUNCTIONS[name](random.randint(1, 9), padding)
        arguments = sizes | dict(
            batch_size=BATCH, q_offset=random.choice([q_offset, torch.tensor(q_offset)]), kv_offset=kv_offset,
            mask_function=function, attention_mask=padding,
        )  # fmt: skip
        expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        ours = integration.attention_mask(
            **arguments, allow_is_causal_skip=name != "odd", allow_is_bidirectional_skip="both" in name
        )
        result = drawn(ours, sizes, "both" not in name)
        assert torch.equal(result, expected.expand_as(result)), (arguments, ours)


@pytest.mark.parametrize("name", ["causal", "window", "chunks"])
@pytest.mark.parametrize("seq", [2, 7, 12])
def test_masks_of_packed_sequences_are_exact(name, seq):
    function = packed(FUNCTIONS[name](3, None), seq)
    sizes = dict(batch_size=BATCH, q_length=seq, kv_length=seq, mask_function=function)
    ours = integration.attention_mask(**sizes, allow_is_causal_skip=False)
    assert isinstance(ours, CompactMask)
    assert torch.equal(ours.dense(), masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False))


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gave."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("padded", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["causal", "window", "both ways", "window both ways", "chunks", "packed"])
def test_masks_take_linear_memory(name, padded):
    seq = 2048
    padding = draw_padding(seq, padded) if name != "packed" else None
    function = (
        packed(FUNCTIONS["window"](64, None), seq) if name == "packed" else FUNCTIONS[name](64, padding)
    )
    with LargestStorage() as largest:
        integration.attention_mask(
            BATCH, seq, seq, mask_function=function, attention_mask=padding,
            allow_is_causal_skip=name != "packed",
        )  # fmt: skip
        assert largest.bytes <= 2 * BATCH * seq * 8  # an interval of int64 per key


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4"])
@pytest.mark.parametrize("cache", ["none", "static"])
@torch.no_grad()
def test_models_take_linear_memory(name, cache):
    """Nothing of the size of the scores, in bytes at one each, comes up in a forward pass."""
    from transformers import StaticCache

    seq = 1500
    model = models.model(name, "fae")
    mask = torch.ones(BATCH, seq, dtype=torch.long)
    mask[1, :5] = 0
    kept = StaticCache(model.config, seq + 7) if cache == "static" else None
    with LargestStorage() as largest:
        model(
            models.tokens(length=seq), attention_mask=mask, past_key_values=kept, use_cache=cache == "static"
        )
    assert largest.bytes < seq * seq


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", [*models.DECODERS, *models.OTHERS])
@torch.no_grad()
def test_what_attention_is_given(name, side):
    received = []

    def spy(module, query, key, value, attention_mask=None, **kwargs):
        received.append((attention_mask, key.shape))
        return integration.attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", integration.attention_mask)
    models.model(name, "spy")(**models.inputs(name, side))
    assert received
    for mask, (batch, _, seq_kv, _) in received:
        if isinstance(mask, torch.Tensor):
            assert mask.untyped_storage().nbytes() <= 2 * batch * seq_kv


def test_a_plain_causal_mask_is_none_and_padding_a_row():
    assert integration.attention_mask(2, 9, 9) is None
    assert integration.attention_mask(2, 1, 9, q_offset=8) is None
    continued = integration.attention_mask(2, 3, 9, q_offset=6)
    assert isinstance(continued.seen, CausalMask)
    static = integration.attention_mask(2, 3, 20, q_offset=torch.tensor(6))
    assert static.keys == 9
    padding = models.padding("left").bool()
    both = masking_utils.bidirectional_mask_function
    row = integration.attention_mask(
        2, 5, 13, mask_function=both, attention_mask=padding, allow_is_causal_skip=False
    )
    assert row.shape == (2, 1, 5, 13)
    assert row.stride(2) == 0
    right = integration.attention_mask(
        2, 5, 13, mask_function=both, attention_mask=padding.flip(1), allow_is_causal_skip=False
    )
    assert isinstance(right.seen, PaddingMask)
    assert torch.equal(right.dense(), row.flip(3))


def test_a_decoder_that_is_not_causal():
    """Its layers take None for causal, so they must not get it."""
    ids = models.tokens()
    model = models.model("llama", "fae")
    model.config.is_causal = False
    try:
        with torch.no_grad():
            ours = model(ids, use_cache=False).logits
            expected = models.model("llama", "eager")(ids, use_cache=False).logits
    finally:
        del model.config.is_causal
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=1e-5)


def test_what_None_says_is_known():
    """Of models that refuse "sdpa" layers are not asked whether they are causal, so None never is."""
    import transformers as hf

    class OfNobody(hf.PretrainedConfig):
        pass

    both = masking_utils.bidirectional_mask_function
    for config, is_known in ((hf.LlamaConfig(), True), (hf.Gemma2Config(), False), (OfNobody(), False)):
        causal = integration.attention_mask(2, 9, 9, config=config)
        assert causal is None if is_known else isinstance(causal.seen, CausalMask)
        assert integration.attention_mask(2, 1, 9, q_offset=8, config=config) is None
        everything = integration.attention_mask(
            2, 9, 9, mask_function=both, allow_is_bidirectional_skip=True, config=config
        )
        assert everything is None or bool(everything.dense().all())
    q = torch.randn(1, 2, 5, 8)
    for name, is_causal in (("llama", True), ("gemma2", False)):
        layer = models.model(name, "fae").model.layers[0].self_attn
        out, _ = integration.attention(layer, q, q, q)
        assert torch.equal(out, flash_attention(*(q.transpose(1, 2),) * 3, is_causal))


def test_masks_for_models_that_know_only_those_of_eager():
    """They turn into those where a layer computes with them."""
    config = models.model("gemma2", "fae").config
    both = masking_utils.bidirectional_mask_function
    for function in (masking_utils.causal_mask_function, both):
        for padding in (models.padding("left").bool(), models.padding("right").bool()):
            arguments = dict(
                batch_size=2, mask_function=function, attention_mask=padding, dtype=torch.float32
            )
            for sizes in (dict(q_length=13, kv_length=13), dict(q_length=1, kv_length=13, q_offset=12)):
                expected = masking_utils.eager_mask(**arguments, **sizes)
                ours = integration.attention_mask(**arguments, **sizes, config=config)
                assert isinstance(ours, CompactMask) and ours.dtype == torch.float32
                assert torch.equal(torch.ones(()) + ours, 1.0 + expected)
                assert torch.equal(ours.to("cpu")[:, :, :, :7], expected[:, :, :, :7])


@pytest.mark.parametrize("kind", ["Bloom", "XGLM"])
@torch.no_grad()
def test_models_that_compute_attention_themselves(kind, caplog):
    """They add the mask to their scores, and to them None means that all keys are seen."""
    import transformers as hf

    sizes = dict(
        Bloom=dict(hidden_size=32, n_layer=2, n_head=4),
        XGLM=dict(
            d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64, dropout=0.0
        ),
    )[kind]
    config = getattr(hf, f"{kind}Config")(vocab_size=models.VOCAB, **sizes)
    integration._ASKS.clear()
    integration.log_once.__globals__["_logged"].clear()
    results = []
    for attention in ("eager", "fae"):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        results += [
            model(models.tokens(), attention_mask=models.padding(side)).logits for side in (None, "left")
        ]
    for eager, ours in zip(results[:2], results[2:], strict=True):
        assert torch.equal(eager, ours)
    assert f"models of {kind}Config compute attention themselves" in caplog.text


def test_compact_masks_are_tensors_where_they_must():
    mask = CompactMask(CausalMask() & WindowMask(2, None), (2, 1, 3, 6), 5, "cpu")
    dense = mask.dense()
    assert dense.shape == (2, 1, 3, 6)
    assert not dense[..., 5].any()
    assert (mask.shape, mask.size(), mask.size(-1), mask.dim(), mask.ndim) == ((2, 1, 3, 6),) * 2 + (6, 4, 4)
    assert mask.dtype == torch.bool and mask.device.type == "cpu" and len(mask) == 2
    assert torch.equal(mask[:, :, :, :4], dense[..., :4])
    assert torch.equal(mask & dense, dense) and torch.equal(mask | dense, dense)
    assert torch.equal(~mask, ~dense)
    assert torch.equal(torch.where(mask, 1.0, 0.0), dense.float())
    assert torch.equal(torch.cat([mask, dense]), torch.cat([dense, dense]))
    assert torch.equal(mask.sum(-1), dense.sum(-1))
    assert isinstance(mask.to("cpu"), CompactMask)
    assert torch.equal(mask.to("cpu").dense(), dense)
    assert torch.equal(mask.to(torch.float32), dense.float())
    assert torch.equal(mask.to(device="cpu", dtype=torch.int), dense.int())
    assert "CausalMask" in repr(mask)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mask.nonsense


def test_masks_made_beforehand_come_back():
    """As `generate` makes them for static caches."""
    from transformers import StaticCache

    model = models.model("gemma3", "fae")
    cache = StaticCache(model.config, 20)
    embeds = torch.randn(2, 13, 32)
    arguments = dict(inputs_embeds=embeds, attention_mask=models.padding("left"), past_key_values=cache)
    made = masking_utils.create_masks_for_generate(model.config, **arguments)
    assert set(made) == {"full_attention", "sliding_attention"}
    for mask in made.values():
        again = masking_utils.create_causal_mask(model.config, **arguments | {"attention_mask": mask})
        assert again is mask


@torch.no_grad()
def test_mask_functions_of_the_caller():
    """Dense, and exact: here pairs of tokens see each other."""
    model = models.model("llama", "fae")
    embeds = torch.zeros(2, 13, 32)
    mask = masking_utils.create_causal_mask(
        model.config,
        embeds,
        models.padding("right"),
        None,
        or_mask_function=lambda b, h, q, k: q // 2 == k // 2,
    )
    i, j = torch.arange(13)[:, None], torch.arange(13)
    seen = ((j <= i) | (i // 2 == j // 2)) & models.padding("right").bool()[:, None, None]
    assert torch.equal(mask, seen)
