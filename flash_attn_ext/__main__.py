"""`python -m flash_attn_ext`: is this installation well? `... bench`: how fast is it here?"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from . import _bench, build_info, dispatch, flash_attention
from .reference import attention_fp64

# Units in the last place, at the result's size, that rounding alone may add to an error.
_ULPS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4, torch.float64: 16}


def _results(function, inputs: list[torch.Tensor], dout: torch.Tensor, **options) -> list[torch.Tensor]:
    """[out, dq, dk, dv] in float64."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, causal=True, **options)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(dout.to(out.dtype))
    return [t.detach().double() for t in (out, *(leaf.grad for leaf in leaves))]


def _dtypes(backend: str) -> list[torch.dtype]:
    return [dtype for dtype in _ULPS if backend != "cuda" or dtype != torch.float64]


def self_test(backend: str, dtype: torch.dtype) -> float:
    """The largest error against float64 of a causal attention and its gradients, as a multiple of
    what is allowed: the error of the unfused computation in `dtype`, doubled for gradients."""
    random = torch.Generator().manual_seed(0)
    shapes = (2, 77, 4, 40), (2, 93, 2, 40), (2, 93, 2, 24), (2, 77, 4, 24)
    *inputs, dout = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)
    exact = _results(attention_fp64, inputs, dout)
    unfused = _results(flash_attention, inputs, dout, backend="standard")
    device = "cuda" if backend == "cuda" else "cpu"
    there = [t.to(device) for t in inputs]
    given = [t.cpu() for t in _results(flash_attention, there, dout.to(device), backend=backend)]
    worst = 0.0
    for i, (e, u, g) in enumerate(zip(exact, unfused, given, strict=True)):
        ulps = _ULPS[dtype] * torch.finfo(dtype).eps * e.abs().max().item()
        allowed = (u - e).abs().max().item() * (1 if i == 0 else 2) + ulps
        error = (g - e).abs().max().item()
        worst = max(worst, error / allowed if error == error else float("inf"))
    return worst


def _report_self_test(name: str, backend: str) -> int:
    """One line; the exit status."""
    try:
        errors = {str(dtype).removeprefix("torch."): self_test(backend, dtype) for dtype in _dtypes(backend)}
    except Exception as error:  # a doctor reports whatever it meets
        print(f"self-test  {name:<16} FAILED: {type(error).__name__}: {error}")
        return 1
    well = all(error <= 1 for error in errors.values())
    numbers = ", ".join(f"{dtype} {error:.2f}" for dtype, error in errors.items())
    verdict = "ok" if well else "FAILED"
    print(f"self-test  {name:<16} {verdict}: error as a share of what is allowed: {numbers}")
    return 0 if well else 1


def _doctor() -> int:
    info = build_info()
    threads = torch.get_num_threads()
    print(f"package    flash_attn_ext {info['version']}, torch {info['torch']}, {threads} threads")
    print(f"build      {info['compiler']}, {info['flags']}")
    here, built = ", ".join(info["cpu_isas"]), ", ".join(info["isas"])
    print(f"isa        {info['active_isa']} in use; here: {here}; built: {built}")
    if info["cuda"]:
        archs = ", ".join(f"sm_{arch}" for arch in info["cuda_archs"])
        dims = ", ".join(map(str, info["cuda_head_dims"]))
        print(f"cuda       {archs} and PTX, head dims {dims}; {info['cuda_note']}")
    missing = "".join(f"; no {name}: {reason}" for name, reason in dispatch.unavailable().items())
    print(f"backends   {', '.join(info['backends'])}{missing}", flush=True)
    failures = 0
    for isa in info["cpu_isas"]:
        # The instruction set is chosen once per process.
        command = [sys.executable, "-m", "flash_attn_ext", "self-test", isa]
        environment = {**os.environ, "FLASH_ATTN_EXT_CPU_ISA": isa, "FLASH_ATTN_EXT_BACKEND": "auto"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        died = f"self-test  cpu/{isa:<12} FAILED: exit status {run.returncode}\n{run.stderr}"
        print(run.stdout.strip() or died, flush=True)
        failures += run.returncode != 0
    failures += _report_self_test("portable", "portable")
    if "cuda" in info["backends"]:
        failures += _report_self_test("cuda", "cuda")
    print("all well" if not failures else f"{failures} self-test(s) failed")
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flash_attn_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("doctor", help="build, instruction sets, backends, self-test (the default)")
    bench = commands.add_parser("bench", help="time causal attention: unfused, torch's SDPA and this package")
    _bench.add_arguments(bench)
    test = commands.add_parser("self-test", help="the self-test of the CPU backend with one instruction set")
    test.add_argument("isa")
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return _bench.run(options)
    if options.command == "self-test":
        return _report_self_test(f"cpu/{options.isa}", "cpu")
    try:
        return _doctor()
    except ValueError as error:  # an environment variable that cannot be followed
        print(f"flash_attn_ext: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
