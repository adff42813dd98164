"""Every case, on every instruction set and on the portable backend: forward, LSE and all gradients."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DTYPES, FEW, Case, build
from conftest import PORTABLE, STANDARD, TARGETS
from harness import complaints, expectations, prepared, run
from reference import allowance, attend, complaint, largest, relative_error

import flash_attn_ext as fae


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward_and_gradients(case: Case, dtype, target):
    inputs, exact, errors = prepared(case, dtype)
    for options in target.schedules():
        found = complaints(run(inputs, target.backend, **options), inputs, exact, errors)
        assert not found, "\n".join([str(case), str(options), *found])


def test_errors_are_those_of_the_unfused_computation(monkeypatch):
    """The rule of the contract over many problems at once, where luck evens out: fp32 forward and gradients."""
    ratios: dict[str, list[float]] = {t.name: [] for t in TARGETS}
    for case in CASES[::3]:
        inputs, exact, errors = prepared(case, torch.float32)
        for target in TARGETS:
            monkeypatch.setenv("FLASH_ATTN_EXT_CPU_ISA", target.isa or "")
            for name, value in run(inputs, target.backend).items():
                want, term = getattr(exact, name), exact.terms.get(name, 0.0)
                allowed = allowance(name, value.dtype, want, errors[name], term, torch.float32)
                ratios[target.name].append(relative_error(value, want) * largest(want) / allowed)
    for name, found in ratios.items():
        found = torch.tensor(found)
        assert (found > 1).float().mean() < 0.01, (
            f"{name}: {int((found > 1).sum())} of {len(found)} results break the rule"
        )
        assert found.quantile(0.9) < 0.8 and found.median() < 0.5, (
            f"{name}: {found.quantile(0.9):.2f} {found.median():.2f}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c.name)
def test_portable_in_small_blocks(case: Case, dtype):
    """Most cases fit one of its own tiles; here they are many, with edges everywhere."""
    rows, keys = (16, 24) if max(case.seq) > 64 else (5, 3)
    inputs, exact, errors = prepared(case, dtype)
    config = fae.AttentionConfig(block_q=rows, block_kv=keys)
    found = complaints(run(inputs, PORTABLE.backend, config=config), inputs, exact, errors)
    assert not found, "\n".join([str(case), *found])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "case", [*FEW, *(c for c in CASES if c.name.startswith("zero") and c not in FEW)], ids=lambda c: c.name
)
def test_standard_backend(case: Case, dtype):
    """The baseline that a user asks for: its scores are rounded to the inputs' dtype, and so its LSE is."""
    inputs = build(case, dtype)
    exact, errors = expectations([inputs, build(case, dtype, 1)], lse_dtype=dtype)
    found = complaints(run(inputs, STANDARD.backend), inputs, exact, errors)
    assert not found, "\n".join([str(case), *found])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_every_way_to_call_gives_the_same_bits(case: Case, dtype, target):
    """With and without grad, with and without LSE, and into `out`: one result."""
    inputs = build(case, dtype).to(target.device)
    args, kwargs = (inputs.q, inputs.k, inputs.v), {**inputs.kwargs(), "backend": target.backend}
    out, lse = fae.flash_attention(*args, return_lse=True, **kwargs)
    alone = fae.flash_attention(*args, **kwargs)
    given = torch.full_like(alone, float("nan"))
    same = fae.flash_attention(*args, out=given, **kwargs)
    into, into_lse = fae.flash_attention(*args, out=torch.empty_like(alone), return_lse=True, **kwargs)
    with_grad = fae.flash_attention(inputs.q.detach().requires_grad_(), *args[1:], **kwargs)
    assert same.data_ptr() == given.data_ptr()
    for other in (alone, given, into, with_grad):
        assert torch.equal(out, other)
    assert torch.equal(lse, into_lse)
    assert out.is_contiguous() and lse.is_contiguous()
    assert not out.requires_grad and with_grad.requires_grad


@pytest.mark.cuda
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_inputs_are_only_read(case: Case, target):
    inputs = build(case, torch.float32)
    tensors = [
        t
        for t in (inputs.q, inputs.k, inputs.v, inputs.mask, inputs.bias, inputs.kv_lengths)
        if t is not None
    ]
    before = [t.clone() for t in tensors]
    run(inputs, target.backend)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "wanted", [["q"], ["k"], ["v"], ["bias"], ["q", "k"], ["k", "v"], ["v", "bias"]], ids="-".join
)
def test_gradients_of_some_inputs(wanted, target):
    """Asking for fewer gradients changes none of them."""
    inputs = build(Case("some", heads=(4, 2), seq=(37, 70), causal=True, bias="1hqk"), torch.float32)
    inputs, options = inputs.to(target.device), {"backend": target.backend, **target.repeatable}
    all_of_them = run(inputs, **options)
    leaves = {n: getattr(inputs, n).detach().requires_grad_(n in wanted) for n in ("q", "k", "v", "bias")}
    out, lse = fae.flash_attention(**leaves, causal=True, return_lse=True, **options)
    grads = torch.autograd.grad((out, lse), [leaves[n] for n in wanted], (inputs.dout, inputs.dlse))
    for n, g in zip(wanted, grads, strict=True):
        assert torch.equal(g.cpu(), all_of_them["d" + n]), n


@pytest.mark.cuda
def test_a_missing_lse_gradient_is_zero(target):
    inputs = build(Case("lse", heads=(4, 2), seq=(37, 70), causal=True), torch.float32).to(target.device)
    options = {"backend": target.backend, **target.repeatable}
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, lse = fae.flash_attention(*leaves, causal=True, return_lse=True, **options)
    implicit = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
    explicit = torch.autograd.grad((out, lse), leaves, (inputs.dout, torch.zeros_like(lse)))
    assert all(torch.equal(a, b) for a, b in zip(implicit, explicit, strict=True))


def test_gradient_through_the_lse_alone(target):
    """d lse / d q_i = scale * sum_j p_ij k_j, d lse / d k_j = scale * sum_i p_ij q_i, and v has no part in it."""
    inputs = build(Case("lse-only", heads=(2, 2), seq=(37, 70)), torch.float64)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    _, lse = fae.flash_attention(*leaves, return_lse=True, backend=target.backend)
    grads = torch.autograd.grad(lse, leaves, inputs.dlse)
    zero = torch.zeros_like(inputs.dout)
    exact = attend(inputs.q, inputs.k, inputs.v, dout=zero, dlse=inputs.dlse)
    for name, got in zip(("dq", "dk", "dv"), grads, strict=True):
        assert not complaint(name, got, getattr(exact, name))


@pytest.mark.cuda
def test_huge_and_tiny_scores(target):
    """Scores far outside exp's range: the maximum is taken out before it is used."""
    for size in (1e-20, 30.0, 1e4, 1e30):
        draws = [build(Case("huge", seq=(33, 129), heads=(2, 1)), torch.float32, n) for n in range(4)]
        for inputs in draws:
            inputs.q = inputs.q * size
        assert not complaints(run(draws[0], target.backend), draws[0], *expectations(draws)), size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("seq", [(700, 700), (1, 5000), (1030, 257), (2048, 2048)], ids=str)
def test_long_sequences(seq, dtype, target):
    for layout, causal in (("bshd", False), ("bhsd", True)):
        case = Case(f"long-{seq}", heads=(4, 2), seq=seq, dim=(64, 64), layout=layout, causal=causal)
        inputs, exact, errors = prepared(case, dtype)
        found = complaints(run(inputs, target.backend), inputs, exact, errors)
        assert not found, "\n".join([str(case), *found])
