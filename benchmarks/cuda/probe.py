"""Small problems of every kind through the CUDA kernels, against float64: what a sanitizer watches.

python -m benchmarks.cuda.probe [--backend cuda_emulated] [--few]
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

import flash_attn_ext as fae

TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def problems(few: bool):
    """(dtype, keyword arguments of build) of each problem."""
    dims = [(64, 64), (128, 128), (96, 40), (256, 256), (300, 20), (7, 5)]
    features = [{}, {"causal": True}, {"window": (9, 3)}, {"mask": True}, {"bias": True}, {"lengths": True},
                {"softcap": 5.0, "causal": True}]  # fmt: skip
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    every = list(itertools.product(dtypes, dims, features))
    return every[:: 9 if few else 1]


def check(dtype: torch.dtype, dims: tuple[int, int], options: dict, backend: str, device: str) -> list[str]:
    """What is wrong with out and gradients of one problem; deterministic and not."""
    generator = torch.Generator().manual_seed(0)
    seq_q, seq_kv, heads, heads_kv = 75, 140, 4, 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, k = normal(2, seq_q, heads, dims[0]), normal(2, seq_kv, heads_kv, dims[0])
    v, dout = normal(2, seq_kv, heads_kv, dims[1]), normal(2, seq_q, heads, dims[1])
    kwargs = dict(options)
    if kwargs.pop("mask", False):
        kwargs["mask"] = torch.rand((2, 1, seq_q, seq_kv), generator=generator) < 0.7
    if kwargs.pop("bias", False):
        kwargs["bias"] = normal(1, heads, seq_q, seq_kv)
    if kwargs.pop("lengths", False):
        kwargs["kv_lengths"] = torch.tensor([0, 77])

    def run(convert, **more):
        leaves = [convert(t).requires_grad_() for t in (q, k, v)]
        moved = {n: convert(x) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        out = fae.flash_attention(*leaves, **moved, **more)
        return [out.detach(), *torch.autograd.grad(out, leaves, convert(dout))]

    def exact(t: torch.Tensor) -> torch.Tensor:
        return t.double() if t.is_floating_point() else t.clone()

    want = run(exact, backend="cpu")
    wrong = []
    for deterministic in (False, True):
        got = run(lambda t: t.clone().to(device), backend=backend, deterministic=deterministic)
        for name, mine, right in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            error = float((mine.cpu().double() - right).abs().max() / right.abs().max().clamp(min=1e-6))
            if not error <= TOLERANCE[dtype]:
                wrong.append(f"{dtype} {dims} {options} {name}: off by {error:.1e}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--few", action="store_true", help="a ninth of the problems")
    options = parser.parse_args()
    if options.backend == "cuda_emulated":
        fae.testing.load_emulator()
    device = "cuda" if options.backend == "cuda" else "cpu"
    every = problems(options.few)
    wrong = [
        line for dtype, dims, kwargs in every for line in check(dtype, dims, kwargs, options.backend, device)
    ]
    print("\n".join([*wrong, f"{len(every)} problems, {len(wrong)} results failed"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
