"""A torch model, unchanged, run with this package: `use_flash_attention()` swaps SDPA inside.

The model is torch's own nn.TransformerEncoder beside a hand-written block that calls
F.scaled_dot_product_attention; both are run and differentiated with and without the swap.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn_ext import use_flash_attention


class Block(nn.Module):
    """Causal self-attention and an MLP, as a user would write them for torch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, width)
        batch, seq, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).view(batch, seq, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, seq, width))
        return x + self.mlp(x)


def output_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def main() -> None:
    torch.manual_seed(0)
    width, heads = 256, 8
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    models = {
        "nn.TransformerEncoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        "hand-written causal blocks": nn.Sequential(Block(width, heads), Block(width, heads)),
    }
    x = torch.randn(4, 300, width)
    for name, model in models.items():
        expected = output_and_gradients(model, x)
        with use_flash_attention(strict=True):
            ours = output_and_gradients(model, x)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        largest = max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))
        print(f"{name}: output and {len(ours) - 1} gradients agree, largest difference {largest:.1e}")


if __name__ == "__main__":
    main()
