"""A small GPT learns Python from the standard library's own sources, with two attentions at once.

    python examples/train_gpt.py --steps 300

Models that start from the same seed take the same batches in lockstep: one attends with torch's SDPA,
one with flash_attn_ext, and one, the control, with torch's unfused kernel. No two implementations
round alike, and training amplifies rounding; the control shows how far two of torch's own drift apart.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_ext import use_flash_attention

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 256, 8, 128, 4, 4
VOCABULARY = 256  # bytes
LEARNING_RATE, WARMUP_STEPS = 1e-3, 20
# Losses of the first steps agree to this, relatively; later ones to what the control shows.
EARLY_STEPS, EARLY_TOLERANCE = 20, 1e-5

ATTENTIONS = {
    "torch SDPA": contextlib.nullcontext,
    "flash_attn_ext": lambda: use_flash_attention(strict=True),
    "control (torch, unfused)": lambda: sdpa_kernel(SDPBackend.MATH),
}


def standard_library_text(limit: int = 4_000_000) -> Tensor:
    """The bytes of the standard library's modules, (bytes,) int64, in alphabetical order."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(path.read_bytes() for path in sources)[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, WIDTH)
        batch, seq, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, seq, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, HEADS, seq, head dim) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, seq, WIDTH))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:  # (batch, seq) -> (batch, seq, VOCABULARY)
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Trainer:
    """One model with one attention; `step` returns its loss."""

    def __init__(self, attention: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.context = ATTENTIONS[attention]
        self.model = GPT()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: Tensor, total: int) -> None:
        """One update on ids (BATCH, CONTEXT + 1): linear warm-up, then a cosine down to a tenth."""
        done = len(self.losses)
        decay = 0.55 + 0.45 * math.cos(math.pi * done / total)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (done + 1) / WARMUP_STEPS) * decay
        start = time.perf_counter()
        with self.context():
            logits = self.model(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def tokens_per_second(self) -> float:
        """By the median step."""
        return BATCH * CONTEXT / statistics.median(self.seconds)


def drift(a: Trainer, b: Trainer) -> list[float]:
    """Relative difference of the losses, step by step."""
    return [abs(x - y) / y for x, y in zip(a.losses, b.losses, strict=True)]


def save_plot(trainers: dict[str, Trainer], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, drifts) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    styles = {
        "torch SDPA": {"color": "#c9a66b", "linewidth": 3.0},
        "flash_attn_ext": {"color": "#1f6f8b", "linewidth": 1.2},
        "control (torch, unfused)": {"color": "0.35", "linewidth": 1.0, "linestyle": ":"},
    }
    base = trainers["torch SDPA"]
    for (name, trainer), marker in zip(trainers.items(), ("", "o", "x"), strict=True):
        curves.plot(trainer.losses, label=name, **styles[name])
        if trainer is not base:
            apart = [(step, d) for step, d in enumerate(drift(trainer, base)) if d]
            equal = len(base.losses) - len(apart)
            label = f"{name} (equal in {equal} steps)"
            steps, distances = zip(*apart, strict=True) if apart else ((), ())
            drifts.plot(steps, distances, marker, color=styles[name]["color"], markersize=4, label=label)
    curves.set(xlabel="step", ylabel="loss (nats per byte)", title="training loss")
    drifts.set(xlabel="step", yscale="log", title="relative difference of the loss from torch SDPA's")
    curves.legend(frameon=False)
    drifts.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1, fontsize=8)
    for axis in (curves, drifts):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT with torch's attention and with ours.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "examples", help="where the plot goes")
    options = parser.parse_args()

    text = standard_library_text()
    trainers = {name: Trainer(name, options.seed) for name in ATTENTIONS}
    base, ours, control = trainers.values()
    parameters = sum(p.numel() for p in base.model.parameters())
    sizes = f"{len(text) / 1e6:.1f} MB of Python, {parameters / 1e6:.2f} M parameters"
    print(f"{sizes}, {BATCH} x {CONTEXT} bytes a step")
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        ids = torch.stack([text[i : i + CONTEXT + 1] for i in starts.tolist()])
        for trainer in trainers.values():
            trainer.step(ids, options.steps)
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step:4}  loss {base.losses[-1]:.6f} torch  {ours.losses[-1]:.6f} ours  "
                  f"{control.losses[-1]:.6f} control", flush=True)  # fmt: skip

    early = max(drift(ours, base)[:EARLY_STEPS])
    print(f"largest relative difference from torch SDPA: {early:.1e} in the first {EARLY_STEPS} steps, "
          f"{max(drift(ours, base)):.1e} in all (control: {max(drift(control, base)):.1e})")  # fmt: skip
    for name, trainer in trainers.items():
        print(f"{name:26} {trainer.tokens_per_second():8.0f} tokens/s")
    assert early <= EARLY_TOLERANCE, f"the losses drift apart from the start: {early:.1e}"
    options.out.mkdir(parents=True, exist_ok=True)
    save_plot(trainers, options.out / "train_gpt.png")
    print(f"plot: {options.out / 'train_gpt.png'}")


if __name__ == "__main__":
    main()
