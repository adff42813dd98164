"""A Llama of transformers generates text, with several implementations of attention.

With random weights logits are close to each other, and rounding alone may decide between two tokens; so the
logits are compared as well, for as long as the tokens before them are the same.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import memory

from .scaling import Point, mebibytes_text, time_text

# Largest difference of logits from eager's, relative to the largest logit; 22 layers round many times.
LOGITS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}


@dataclass
class Generated:
    """What one implementation did with the prompt."""

    tokens: torch.Tensor  # (new tokens,)
    logits: torch.Tensor  # (new tokens, vocabulary) float32
    prefill_s: float
    tokens_per_s: float
    peak_bytes: int


class Clock:
    """A streamer that notes when tokens arrive; `generate` hands it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(options: argparse.Namespace):
    """The model in evaluation mode, of a folder or with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, options.dtype)
    if options.model is not None:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads, eos_token_id=None, pad_token_id=0,
        max_position_embeddings=max(2048, options.prompt + options.new_tokens),
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def generate(model, attention: str, prompt: torch.Tensor, new_tokens: int) -> Generated:
    """Greedy, with the cache that transformers takes by itself. prompt: (1, tokens)."""
    model.set_attn_implementation(attention)
    clock = Clock()

    def run(ids: torch.Tensor, count: int, streamer: Clock | None = None):
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, streamer=streamer, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

    run(prompt[:, :8], 2)  # what is made on first use is not the model's
    peak, result = memory.peak_growth(lambda: run(prompt, new_tokens, clock))
    start, first, *_ = clock.times  # the prompt, the first token
    last = clock.times[-1]
    return Generated(
        tokens=result.sequences[0, prompt.shape[1] :],
        logits=torch.cat(result.logits).float(),
        prefill_s=first - start,
        tokens_per_s=(new_tokens - 1) / (last - first) if new_tokens > 1 else float("nan"),
        peak_bytes=peak,
    )


def same_tokens(ours: Generated, theirs: Generated) -> int:
    """How many tokens are the same before the first that is not."""
    return int((ours.tokens == theirs.tokens).long().cumprod(0).sum())


def generation_table(results: dict[str, Generated], dtype: str) -> Table:
    """A line per implementation; raises AssertionError where logits differ by more than rounding."""
    table = Table(title=f"greedy generation ({dtype})", title_justify="left", title_style="bold",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    table.add_column("attention")
    for name in ("prefill", "tokens/s", "peak MiB", "same tokens\nas eager", "logits: largest\ndifference"):
        table.add_column(name, justify="right")
    eager = next(iter(results.values()))
    for name, result in results.items():
        same = same_tokens(result, eager)
        alike = slice(0, same + 1)  # the first other token has the same tokens before it
        difference = (result.logits[alike] - eager.logits[alike]).abs().max().item()
        largest = eager.logits[alike].abs().max().item()
        assert difference <= LOGITS_TOLERANCE[dtype] * largest, f"{name}: logits differ by {difference}"
        table.add_row(
            name, time_text(Point(result.prefill_s)), f"{result.tokens_per_s:.1f}",
            mebibytes_text(Point(extra_bytes=result.peak_bytes)), f"{same} of {len(eager.tokens)}",
            f"{difference:.1e}",
        )  # fmt: skip
    return table


def run(console: Console, options: argparse.Namespace, implementations: dict[str, str]) -> None:
    model = load(options)
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} query heads, "
        f"{config.num_key_value_heads} key heads, {parameters / 1e6:.0f} M parameters, "
        f"{'random weights' if options.model is None else options.model}; "
        f"prompt of {options.prompt} tokens, {options.new_tokens} new ones, {torch.get_num_threads()} threads"
    )
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, config.vocab_size, (1, options.prompt), generator=generator)
    results = {}
    for title, name in implementations.items():
        with console.status(f"{title} ..."), torch.inference_mode():
            results[title] = generate(model, name, prompt, options.new_tokens)
    console.print(generation_table(results, options.dtype))
