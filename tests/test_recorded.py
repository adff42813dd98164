"""Calls that torch.jit.trace, make_fx and symbolic traces record, to run them again on other tensors."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import flash_attn_ext as fae

CALLS = {
    "sdpa": lambda x: fae.scaled_dot_product_attention(x, x, x),
    "sdpa causal": lambda x: fae.scaled_dot_product_attention(x, x, x, is_causal=True),
    "plain": lambda x: fae.flash_attention(x, x, x),
    "window": lambda x: fae.flash_attention(x, x, x, window=(2, 1)),
    "sinks": lambda x: fae.flash_attention(x, x, x, sinks=torch.zeros(x.shape[2])),
    "with lse": lambda x: torch.cat([t.flatten() for t in fae.flash_attention(x, x, x, return_lse=True)]),
}


def saved_and_loaded(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


def jit(call, example):
    return saved_and_loaded(torch.jit.trace(call, (example,)))


def fx(call, example):
    return make_fx(call)(example)


@pytest.mark.filterwarnings("ignore")  # of sizes that become constants, and that torch.jit is old
@pytest.mark.parametrize(
    ("record", "example_with_grad", "backend"),
    [(jit, False, "auto"), (jit, True, "auto"), (fx, False, "auto"), (fx, False, "portable")],
)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_recorded_has_gradients(name, record, example_with_grad, backend):
    fae.set_backend(backend)
    try:
        call = CALLS[name]
        recorded = record(call, torch.randn(2, 6, 6, 8, requires_grad=example_with_grad))
        results = []
        x = torch.randn(2, 6, 6, 8)
        for function in (call, recorded):
            given = x.clone().requires_grad_()
            out = function(given)
            results.append((out, *torch.autograd.grad(out.square().sum(), given)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
        with torch.no_grad():
            torch.testing.assert_close(recorded(x), results[0][0])
    finally:
        fae.set_backend("auto")


def test_a_joint_graph_of_forward_and_backward():
    def step(x):
        return torch.autograd.grad(CALLS["plain"](x).square().sum(), x)[0]

    example, x = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(make_fx(step)(example)(x), step(x))


class Module(torch.nn.Module):
    def forward(self, x, mask):
        return F.scaled_dot_product_attention(x, x, x, mask)


def test_a_symbolic_trace_keeps_torchs_call():
    with fae.use_flash_attention():
        traced = torch.fx.symbolic_trace(Module())
        assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [
            F.scaled_dot_product_attention
        ]
        x, mask = torch.randn(1, 2, 5, 8), torch.rand(5, 5) > 0.3
        assert torch.equal(traced(x, mask), fae.scaled_dot_product_attention(x, x, x, mask))
