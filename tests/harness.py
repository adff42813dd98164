"""Running a case through the package and holding the result against the oracle."""

from __future__ import annotations

import functools

import torch
from cases import Case, Inputs, build
from reference import Result, attend, complaint, relative_error, to_bhsd, unfused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_ext as fae

# How often the unfused computation is tried, each time on other values of the same problem. The largest error in
# one small tensor is a matter of luck; the largest of several draws is what this arithmetic does to this problem.
DRAWS = {torch.float32: 4, torch.float64: 2}
NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks")
OPTION_GRADS = ("bias", "alibi_slopes", "sinks")


@functools.lru_cache(maxsize=16)
def prepared(case: Case, dtype: torch.dtype) -> tuple[Inputs, Result, dict[str, float]]:
    """The inputs of a case, their fp64 reference, and the unfused same-dtype errors relative to each result's size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products: a second thread only gets in the way
    draws = [build(case, dtype, draw) for draw in range(DRAWS.get(dtype, 1))]
    exact, errors = expectations(draws)
    torch.set_num_threads(threads)
    return draws[0], exact, errors


def expectations(draws: list[Inputs], **how) -> tuple[Result, dict[str, float]]:
    """The fp64 reference of the first draw, and the unfused same-dtype errors over all of them."""
    first, errors = None, dict.fromkeys(NAMES, 0.0)
    for inputs in draws:
        arguments = (inputs.q, inputs.k, inputs.v)
        kwargs = {"dout": inputs.dout, "dlse": inputs.dlse, **inputs.oracle()}
        exact = attend(*arguments, **kwargs)
        for formulation in (False, True):
            plain = unfused(*arguments, **kwargs, other=formulation, **how)
            for name in NAMES:
                if getattr(exact, name) is not None:
                    errors[name] = max(
                        errors[name], relative_error(getattr(plain, name), getattr(exact, name))
                    )
        first = first or exact
    return first, errors


def run(inputs: Inputs, backend: str, **options) -> dict[str, Tensor]:
    """Forward, LSE and all gradients as the package computes them; `options` go to flash_attention as well.
    Results come back to the CPU."""
    if backend == "cuda":
        inputs = inputs.to("cuda")
    leaves = {n: getattr(inputs, n).detach().requires_grad_() for n in ("q", "k", "v")}
    for name in OPTION_GRADS:
        if getattr(inputs, name) is not None:
            leaves[name] = getattr(inputs, name).detach().requires_grad_()
    kwargs = {**inputs.kwargs(), **options, **{n: t for n, t in leaves.items() if n in OPTION_GRADS}}
    torch.manual_seed(inputs.seed)
    out, lse = fae.flash_attention(
        leaves["q"], leaves["k"], leaves["v"], return_lse=True, backend=backend, **kwargs
    )
    heads, grads = (out, lse), (inputs.dout, inputs.dlse)
    if inputs.dlse is None:
        heads, grads = heads[:1], grads[:1]
    got = dict(zip(leaves, torch.autograd.grad(heads, list(leaves.values()), grads), strict=True))
    results = {"out": out.detach(), "lse": lse.detach(), **{"d" + n: g for n, g in got.items()}}
    return {name: result.cpu() for name, result in results.items()}


def expected_dtype(name: str, inputs: Inputs) -> torch.dtype:
    if name == "lse":
        return torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    owner = name.removeprefix("d")
    return getattr(inputs, owner).dtype if owner in OPTION_GRADS else inputs.q.dtype


def complaints(got: dict[str, Tensor], inputs: Inputs, exact: Result, errors: dict[str, float]) -> list[str]:
    """Every way in which `got` differs from what the contract promises; empty when all is well."""
    found = []
    for name, value in got.items():
        if value.dtype != expected_dtype(name, inputs):
            found.append(f"{name}: dtype {value.dtype}, expected {expected_dtype(name, inputs)}")
        extra = {"term": exact.terms.get(name, 0.0), "input_dtype": inputs.q.dtype}
        found.append(complaint(name, value, getattr(exact, name), errors[name], **extra))
    # Rows and keys without a partner get exact zeros, not small numbers.
    unseen = ~exact.visible.any(-1)
    if unseen.any():
        for name in ("out", "dq"):
            if name in got and got[name].numel():
                rows = to_bhsd(got[name], inputs.case.layout)[unseen]
                if not torch.equal(rows, torch.zeros_like(rows)):
                    found.append(f"{name}: rows that see no key are not exactly 0")
    if exact.visible.numel():
        heads_kv = inputs.case.heads[1]
        seen_keys = exact.visible.any(-2).unflatten(1, (heads_kv, -1)).any(2)
        for name in ("dk", "dv"):
            if name in got:
                rows = to_bhsd(got[name], inputs.case.layout)[~seen_keys]
                if not torch.equal(rows, torch.zeros_like(rows)):
                    found.append(f"{name}: keys that no query sees are not exactly 0")
    if "dbias" in got and inputs.case.bias == "bhqk":
        hidden = got["dbias"][~exact.visible]
        if not torch.equal(hidden, torch.zeros_like(hidden)):
            found.append("dbias: hidden entries are not exactly 0")
    return [line for line in found if line]


class LargestResult(TorchDispatchMode):
    """The most elements that a result of an operation inside has had, views of stride 0 apart. What kernels take
    on their own account it cannot see."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and 0 not in t.stride():
                self.elements = max(self.elements, t.numel())
        return result
