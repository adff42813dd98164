"""transformers' models with this package's attention against their own eager one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import flash_attn_ext as fae

pytest.importorskip("transformers", minversion="5.0")

import hf_models as models

from flash_attn_ext.integrations import transformers as integration

integration.register()
MODELS = (*models.DECODERS, *models.OTHERS)
PADDED = [
    (name, side) for name in MODELS for side in (None, "left", "right") if name != "vit" or side is None
]
# Logits have a standard deviation of about 2.
FP32 = {"atol": 3e-5, "rtol": 1e-5}


def run(name: str, attention: str, arguments: dict, dtype: torch.dtype = torch.float32, **options):
    """The rows that are not padding."""
    cast = {key: t.to(dtype) if t.is_floating_point() else t for key, t in arguments.items()}
    result = models.output(models.model(name, attention, dtype)(**cast, **options))
    return models.given(arguments, result)


@pytest.mark.parametrize(("name", "side"), PADDED)
@torch.no_grad()
def test_logits(name, side):
    arguments = models.inputs(name, side)
    eager, ours = (run(name, attention, arguments) for attention in ("eager", "fae"))
    torch.testing.assert_close(ours, eager, **FP32)


@pytest.mark.parametrize("side", [None, "none", "left", "right"])
@pytest.mark.parametrize("name", models.REFUSING)
@torch.no_grad()
def test_logits_of_models_that_refuse_sdpa(name, side):
    """Their layers may say that they are causal where they are not, and the other way round."""
    arguments = models.inputs(name, None if side == "none" else side)
    if side == "none" and "input_ids" in arguments:
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    eager, ours = (run(name, attention, arguments) for attention in ("eager", "fae"))
    torch.testing.assert_close(ours, eager, **FP32)


@pytest.mark.parametrize("name", ["bigbird_pegasus", "nllb_moe", "pegasus_x"])
@pytest.mark.parametrize("way", ["greedy", "beam"])
def test_generate_of_models_that_refuse_sdpa(name, way):
    eager, ours = (generate(name, attention, **WAYS[way]) for attention in ("eager", "fae"))
    assert ours.tolist() == eager.tolist()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_in_bfloat16(name):
    arguments = models.inputs(name, None if name == "vit" else "left")
    exact = run(name, "eager", arguments)
    errors = [
        (run(name, attention, arguments, torch.bfloat16).float() - exact).square().mean().sqrt().item()
        for attention in ("eager", "fae")
    ]
    # The rest of the model rounds as much, so that the two differ by chance.
    assert errors[1] <= 1.25 * errors[0] + 1e-3, errors


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    arguments = models.inputs(name, None if name == "vit" else "left")
    gradients = []
    for attention in ("eager", "fae"):
        model = models.model(name, attention).train()
        model.zero_grad(set_to_none=True)
        models.given(arguments, models.output(model(**arguments))).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    eager, ours = gradients
    assert eager.keys() == ours.keys()
    if name == "t5":
        assert any("relative_attention_bias" in key for key in ours)
    if name == "gpt_oss":
        assert any("sinks" in key for key in ours)
    for key, expected in eager.items():
        tolerance = 1e-4 * max(expected.abs().max().item(), 1e-2)
        torch.testing.assert_close(
            ours[key], expected, atol=tolerance, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def generate(name: str, attention: str, **options) -> torch.Tensor:
    model = models.model(name, attention)
    arguments = models.inputs(name, "left")
    for key in ("decoder_input_ids", "decoder_attention_mask"):
        arguments.pop(key, None)
    common = dict(max_new_tokens=9, do_sample=False, disable_compile=True, pad_token_id=0)
    if name == "whisper":  # its own generate is about timestamps and fallbacks
        return super(type(model), model).generate(**arguments, **common, **options)
    return model.generate(**arguments, **common, **options)


_STATIC = {"cache_implementation": "static"}
WAYS = {"greedy": {}, "beam": {"num_beams": 3}, "static": _STATIC, "beam-static": {"num_beams": 3, **_STATIC}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*models.DECODERS, "t5", "whisper"])
def test_generate(name, way):
    eager, ours = (generate(name, attention, **WAYS[way]) for attention in ("eager", "fae"))
    assert ours.tolist() == eager.tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
@torch.no_grad()
def test_prefill_in_chunks(name, cache):
    """Queries that come after keys of a cache, some of them padding."""
    from transformers import DynamicCache, StaticCache

    ids, mask = models.tokens(length=16), models.padding("left", length=16)
    pieces = {}
    for attention in ("eager", "fae"):
        model = models.model(name, attention)
        kept = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, 24)
        pieces[attention] = [
            model(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=torch.arange(begin, end)[None],
                past_key_values=kept,
            ).logits
            for begin, end in ((0, 5), (5, 12), (12, 13), (13, 16))
        ]
    eager, ours = (torch.cat(pieces[attention], 1)[mask.bool()] for attention in ("eager", "fae"))
    torch.testing.assert_close(ours, eager, **FP32)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
@torch.no_grad()
def test_packed_sequences(name):
    """transformers knows them by position ids that start again."""
    lengths = (8, 4, 9)
    ids = models.tokens(batch=1, length=sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model = models.model(name, "fae")
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    apart = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), **FP32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@torch.no_grad()
def test_masks_of_the_caller(name, dtype):
    generator = torch.Generator().manual_seed(5)
    seen = (torch.rand(2, 1, 13, 13, generator=generator) > 0.4) | torch.eye(13, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    arguments = models.inputs(name)
    eager = run(name, "eager", {**arguments, "attention_mask": added}) if name != "t5" else None
    if name == "t5":  # the mask of its encoder goes to its decoder as well
        encoders = [models.model(name, attention).encoder for attention in ("eager", "fae")]
        eager = encoders[0](arguments["input_ids"], attention_mask=added).last_hidden_state
        models.model(name, "fae")
        ours = encoders[1](arguments["input_ids"], attention_mask=seen if dtype == torch.bool else added)
        torch.testing.assert_close(ours.last_hidden_state, eager, **FP32)
        return
    ours = run(name, "fae", {**arguments, "attention_mask": seen if dtype == torch.bool else added})
    torch.testing.assert_close(ours, eager, **FP32)


@pytest.mark.parametrize("name", ["gemma2", "t5"])
@torch.no_grad()
def test_compile(name):
    arguments = models.inputs(name, "left") | {"use_cache": False}
    model = models.model(name, "fae")
    expected = models.output(model(**arguments))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = models.output(compiled(**arguments))
    torch.testing.assert_close(models.given(arguments, result), models.given(arguments, expected), **FP32)


@torch.no_grad()
def test_compile_for_any_length():
    """Shorter than the window and longer; without padding, where transformers looks for packed sequences."""
    model = models.model("gpt_oss", "fae")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (models.WINDOW - 1, 13, 20):
        arguments = {"input_ids": models.tokens(length=length), "use_cache": False}
        torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits, **FP32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_compile_with_a_static_cache():
    """Where the place of the queries is a tensor; then one query, twice by one graph."""
    from transformers import StaticCache

    ids, mask = models.tokens(length=12), models.padding("left", length=12)
    model = models.model("llama", "fae")
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        cache = StaticCache(model.config, 20)
        cache.early_initialization(2, 2, 8, torch.float32, ids.device)
        results.append(
            torch.cat(
                [
                    forward(
                        input_ids=ids[:, begin:end],
                        attention_mask=torch.nn.functional.pad(mask[:, :end], (0, 20 - end)),
                        position_ids=torch.arange(begin, end)[None],
                        past_key_values=cache,
                    ).logits
                    for begin, end in ((0, 5), (5, 10), (10, 11), (11, 12))
                ],
                1,
            )[mask.bool()]
        )
    torch.testing.assert_close(results[1], results[0], **FP32)


def test_dropout():
    model = models.model("bert", "fae").train()
    layer = model.encoder.layer[0].attention.self
    layer.dropout.p = 0.5
    try:
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(models.output(model(**models.inputs("bert"))))
    finally:
        layer.dropout.p = 0.0
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
    q, k, v = (torch.randn(2, 4, 7, 8) for _ in range(3))
    torch.manual_seed(4)
    ours, weights = integration.attention(layer, q, k, v, dropout=0.3)
    torch.manual_seed(4)
    assert weights is None
    assert torch.equal(ours.transpose(1, 2), fae.flash_attention(q, k, v, layout="bhsd", dropout_p=0.3))


def test_rows_that_see_nothing_are_0():
    mask = models.padding("left").bool()
    compact = integration.attention_mask(2, 13, 13, attention_mask=mask)
    q, k, v = (torch.randn(2, 4, 13, 8) for _ in range(3))
    out, _ = integration.attention(torch.nn.Module(), q, k, v, compact)
    assert (out[~mask] == 0).all()
    assert (out[mask] != 0).any(-1).all()


@torch.no_grad()
def test_weights_cannot_be_had():
    model = models.model("llama", "fae")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    for name in ("llama", "bert", "t5"):
        with pytest.raises(ValueError, match='output_attentions must be False.*"eager"'):
            models.model(name, "fae")(**models.inputs(name), output_attentions=True)


def test_errors():
    q = torch.randn(1, 2, 3, 8)
    layer = torch.nn.Module()
    for name in ("cache", "indices"):
        with pytest.raises(NotImplementedError, match=f"{name} must be None"):
            integration.attention(layer, q, q, q, **{name: object()})
    compact = integration.attention_mask(1, 3, 5, q_offset=2)
    with pytest.raises(ValueError, match="3 queries and 5 keys, got 3 and 3"):
        integration.attention(layer, q, q, q, compact)
    for name in ("flash", "my_sdpa", "eager", "a/b", "paged|fae", "flex_attention"):
        with pytest.raises(ValueError, match="name must not contain"):
            integration.register(name)
    with pytest.raises(ValueError, match="name must be a text"):
        integration.register("")


def test_the_package_does_not_import_transformers():
    code = "import sys, flash_attn_ext, flash_attn_ext.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
