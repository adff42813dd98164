"""Tiny models of transformers with random weights: two layers, and every feature of attention that they are for."""

from __future__ import annotations

import functools
import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB = 61
# Heads of 8 or 16 in pairs that share a key head; the window is shorter than the sequences of the tests.
DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    attention_dropout=0.0,
)
GROUPED = DECODER | dict(num_key_value_heads=2)
WINDOW = 6
MIXED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
# Of an encoder and a decoder.
BOTH = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    dropout=0.0,
    attention_dropout=0.0,
)
TEXT = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
SEQ2SEQ = dict(**BOTH, **TEXT, max_position_embeddings=64)


def _configs() -> dict:
    import transformers as hf

    return {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
        "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=WINDOW)),
        "gemma2": (
            hf.Gemma2ForCausalLM,
            hf.Gemma2Config(
                **GROUPED, **MIXED, head_dim=16, attn_logit_softcapping=5.0, query_pre_attn_scalar=4
            ),
        ),
        "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GROUPED, **MIXED, head_dim=16)),
        "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=16)),
        "gpt_oss": (
            hf.GptOssForCausalLM,
            hf.GptOssConfig(
                **GROUPED,
                **MIXED,
                head_dim=16,
                num_local_experts=2,
                num_experts_per_tok=1,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            ),
        ),
        "phi": (hf.PhiForCausalLM, hf.PhiConfig(**DECODER, partial_rotary_factor=0.5)),
        "gpt2": (
            hf.GPT2LMHeadModel,
            hf.GPT2Config(
                vocab_size=VOCAB,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                bos_token_id=1,
                eos_token_id=None,
                pad_token_id=0,
            ),
        ),
        "llama4": (
            hf.Llama4ForCausalLM,
            hf.Llama4TextConfig(
                **GROUPED,
                head_dim=8,
                attention_chunk_size=WINDOW,
                intermediate_size_mlp=48,
                num_local_experts=1,
                layer_types=["chunked_attention", "full_attention"],
            ),
        ),
        "bert": (hf.BertModel, hf.BertConfig(**ENCODER)),
        "t5": (
            hf.T5ForConditionalGeneration,
            hf.T5Config(
                vocab_size=VOCAB,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                eos_token_id=None,
            ),
        ),
        "whisper": (
            hf.WhisperForConditionalGeneration,
            hf.WhisperConfig(
                **BOTH,
                **TEXT,
                num_mel_bins=8,
                max_source_positions=12,
                max_target_positions=64,
            ),
        ),
        "vit": (
            hf.ViTModel,
            hf.ViTConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=4,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
        ),
        "splinter": (hf.SplinterModel, hf.SplinterConfig(**ENCODER, question_token_id=1)),
        "clap": (hf.ClapTextModel, hf.ClapTextConfig(**ENCODER, pad_token_id=0)),
        "align": (hf.AlignTextModel, hf.AlignTextConfig(**ENCODER)),
        "bigbird_pegasus": (
            hf.BigBirdPegasusForConditionalGeneration,
            hf.BigBirdPegasusConfig(**SEQ2SEQ, attention_type="original_full"),
        ),
        "nllb_moe": (
            hf.NllbMoeForConditionalGeneration,
            hf.NllbMoeConfig(**SEQ2SEQ, num_experts=2, encoder_sparse_step=2, decoder_sparse_step=2),
        ),
        "pegasus_x": (
            hf.PegasusXForConditionalGeneration,
            hf.PegasusXConfig(**SEQ2SEQ, block_size=8, num_global_tokens=4),
        ),
        "informer": (
            hf.InformerModel,
            hf.InformerConfig(
                **BOTH,
                prediction_length=6,
                context_length=12,
                lags_sequence=[1, 2],
                num_time_features=1,
                attention_type="full",
            ),
        ),
    }


DECODERS = ("llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt_oss", "phi", "gpt2", "llama4")
OTHERS = ("bert", "t5", "whisper", "vit")
ENCODER_DECODERS = ("t5", "bigbird_pegasus", "nllb_moe", "pegasus_x")
# They refuse "sdpa", so that nobody has seen to what their layers call causal.
REFUSING = ("splinter", "clap", "align", "informer", *ENCODER_DECODERS[1:])


@functools.cache
def _model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Weights are large enough that attention is far from uniform: else a wrong mask would hardly show."""
    kind, config = _configs()[name]
    model = kind(config)
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if weight.dim() > 1 or "sinks" in parameter:
                weight.normal_(0, 2.0 * weight.shape[-1] ** -0.5, generator=generator)
            else:  # norms and biases
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())  # the same numbers in every dtype
    return model.to(dtype)


def model(name: str, attention: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model in evaluation mode, made once, with the attention of that name from now on."""
    found = _model(name, dtype).eval()
    found.set_attn_implementation(attention)
    return found


def tokens(batch: int = 2, length: int = 13, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str | None, length: int = 13, missing: int = 4) -> torch.Tensor | None:
    """(2, length), 0 at the padding of the second sequence."""
    if side is None:
        return None
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, missing) if side == "left" else slice(length - missing, None)] = 0
    return mask


def inputs(name: str, side: str | None = None) -> dict[str, torch.Tensor]:
    """What a forward pass of the model takes."""
    generator = torch.Generator().manual_seed(3)
    mask = {} if side is None else {"attention_mask": padding(side)}
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "whisper":
        features = torch.randn(2, 8, 24, generator=generator)
        own = {} if side is None else {"decoder_attention_mask": padding(side)}
        return {"input_features": features, "decoder_input_ids": tokens()} | own
    if name == "informer":
        past, future = (torch.randn(2, length, 2, generator=generator) for length in (14, 6))
        return {
            "past_values": past[..., 0],
            "past_time_features": past[..., 1:],
            "past_observed_mask": torch.ones(2, 14),
            "future_values": future[..., 0],
            "future_time_features": future[..., 1:],
        }
    if name in ENCODER_DECODERS:
        return {"input_ids": tokens(), "decoder_input_ids": tokens(length=9, seed=1)} | mask
    return {"input_ids": tokens()} | mask


def output(result) -> torch.Tensor:
    return result.logits if "logits" in result else result.last_hidden_state


def given(arguments: dict[str, torch.Tensor], result: torch.Tensor) -> torch.Tensor:
    """The rows of a result that are not of padding, which implementations may fill as they like."""
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = arguments.get(name)
        if mask is not None and mask.shape == result.shape[:2]:
            return result[mask.bool()]
    return result.flatten(0, 1)
