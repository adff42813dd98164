"""The extended operators in torch's machinery: opcheck, compile, autocast, functorch, backend choice."""

from __future__ import annotations

import pytest
import torch
from cases import Case, build

import flash_attn_ext as fae
from flash_attn_ext import _extended
from flash_attn_ext._options import EXTENDED_TENSORS, Options

SMALL = dict(batch=2, heads=(4, 2), seq=(9, 13), dim=(8, 6))
CASES = [
    Case("plain", **SMALL),
    Case("all", **SMALL, layout="bhsd", causal=True, window=(5, 2), softcap=3.0, scale=0.3, bias="1hqk", lengths=(5, 13),
         alibi="bh", sinks="float32", dropout_p=0.3, typed=("documents", "prefixes", "blocks")),
    Case("sinks", **SMALL, sinks="float64", mask="b1qk"),
    Case("alibi", **SMALL, alibi="h", alibi_dtype="bfloat16"),
    Case("rank2", heads=(1, 1), seq=(9, 13), dim=(8, 6), rank=2, dropout_p=0.5, alibi="h", typed=("tree",)),
    Case("empty", batch=2, heads=(4, 2), seq=(9, 0), dim=(8, 6), sinks="same"),
    Case("packed", heads=(4, 2), seq=(9, 13), dim=(8, 6), rank=3, causal=True, alibi="h", sinks="same", dropout_p=0.2),
]  # fmt: skip


def registered_operators() -> list[str]:
    """Those of the extended family, but of the emulated kernels, which do not know all of it: they are there once
    another test has loaded them."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(
        n for n in names if n.startswith("flash_attn_ext::") and "_extended" in n and "emulated" not in n
    )


def options_of(case: Case, x) -> Options:
    arguments = _extended.Arguments(**x.kwargs())
    packing = None
    if case.name == "packed":
        packing = _extended.Packing(torch.tensor([0, 4, 4, 8]), torch.tensor([0, 3, 5, 13]), 5, -1)
    return _extended.options_of(x.q, x.k, arguments, fae.AttentionConfig(), packing)


def op_arguments(name: str, case: Case, dtype=torch.float32, grad=False) -> tuple:
    """Arguments of the operator `name` for `case`."""
    x = build(case, dtype)
    if grad:
        for field in ("q", "k", "v", "bias", "alibi_slopes", "sinks"):
            if getattr(x, field) is not None:
                setattr(x, field, getattr(x, field).detach().requires_grad_())
    qkv, options = (x.q, x.k, x.v), tuple(options_of(case, x))
    name = name.split("::")[1].split(".")[0]
    if name.endswith("_forward_out"):
        return (*qkv, torch.empty_like(x.dout), *options, True)
    if not name.endswith("_backward"):
        return (*qkv, *options, True)
    with torch.no_grad():
        out, lse = getattr(torch.ops.flash_attn_ext, name.replace("backward", "forward"))(
            *qkv, *options, True
        )
    needs = [getattr(x, owner) is not None for owner in ("bias", "alibi_slopes", "sinks")]
    return (x.dout, torch.ones_like(lse), *qkv, out, lse, *options, *needs)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("name", registered_operators())
def test_opcheck(name, case):
    op = getattr(torch.ops.flash_attn_ext, name.split("::")[1].split(".")[0]).default
    torch.library.opcheck(op, op_arguments(name, case))
    if name.endswith("_extended"):
        torch.library.opcheck(op, op_arguments(name, case, grad=True))


def test_the_schema_is_the_options():
    """In their order, tensors first: C++ and Python agree by it."""
    for name in registered_operators():
        op = getattr(torch.ops.flash_attn_ext, name.split("::")[1].split(".")[0]).default
        names = [argument.name for argument in op._schema.arguments]
        start = names.index("mask")
        assert tuple(names[start : start + len(Options._fields)]) == Options._fields, name
        kinds = [str(argument.type) for argument in op._schema.arguments[start:]]
        assert kinds[: len(EXTENDED_TENSORS)] == ["Optional[Tensor]"] * len(EXTENDED_TENSORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fake_kernels_predict_the_real_results(case, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name in registered_operators():
        op = getattr(torch.ops.flash_attn_ext, name.split("::")[1].split(".")[0])
        arguments = op_arguments(name, case, dtype)
        real = op(*arguments)
        mode = FakeTensorMode()
        with mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        real, fake = ([x] if isinstance(x, torch.Tensor) else x for x in (real, fake))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.device, r.stride()) == (f.shape, f.dtype, f.device, f.stride()), name


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "empty"], ids=lambda c: c.name)
@pytest.mark.parametrize("name", [n for n in registered_operators() if n.endswith("_extended")])
def test_gradients_without_a_saved_lse(name, case):
    op = getattr(torch.ops.flash_attn_ext, name.split("::")[1])
    results = []
    for return_lse in (True, False):
        arguments = op_arguments(name, case, grad=True)
        options = arguments[3:-1]
        if options[5] is not None:
            options = (*options[:5], torch.tensor([1, 2]), *options[6:])
        leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
        out, _ = op(*arguments[:3], *options, return_lse)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for with_lse, without in zip(*results, strict=True):
        assert torch.equal(with_lse, without)


def leaves(seq_q=9, seq_kv=13, grad=True):
    g = torch.Generator().manual_seed(seq_q)
    shapes = [(2, seq_q, 4, 8), (2, seq_kv, 2, 8), (2, seq_kv, 2, 6), (2, 4), (4,)]
    return [torch.randn(s, generator=g).requires_grad_(grad) for s in shapes]


def model(q, k, v, slopes, sinks, backend="auto"):
    out, lse = fae.flash_attention(
        q * 1.5,
        k,
        v,
        causal=True,
        softcap=4.0,
        alibi_slopes=slopes,
        sinks=sinks,
        return_lse=True,
        backend=backend,
    )
    return out.sin().sum() + lse.square().sum()


@pytest.mark.parametrize("engine", ["eager", "aot_eager", "inductor"])
def test_compile_with_dynamic_shapes_equals_eager(engine):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=engine)
    for sizes in [(9, 13), (21, 8), (33, 40)]:
        inputs = leaves(*sizes)
        results = []
        for fn in (model, compiled):
            total = fn(*inputs)
            results.append([total, *torch.autograd.grad(total, inputs)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled for a new length"


@pytest.mark.parametrize("backend", ["auto", "portable", "standard"])
def test_functorch_grad_and_vmap(backend):
    inputs = leaves()
    expected = torch.autograd.grad(model(*inputs, backend), inputs)
    plain = [x.detach() for x in inputs]
    gradient = torch.func.grad(lambda *x: model(*x, backend), argnums=tuple(range(5)))
    for a, b in zip(gradient(*plain), expected, strict=True):
        torch.testing.assert_close(a, b)
    many = torch.randn(3, 4)
    per_sink = torch.func.vmap(gradient, in_dims=(None, None, None, None, 0))(*plain[:4], many)
    for i in range(3):
        for a, b in zip(per_sink, gradient(*plain[:4], many[i]), strict=True):
            torch.testing.assert_close(a[i], b)


def test_autocast(extended_target):
    """q, k and v are cast; slopes and sinks keep their dtype, and so do all gradients."""
    inputs = leaves()
    q, k, v, slopes, sinks = inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fae.flash_attention(q, k, v, alibi_slopes=slopes, sinks=sinks, backend=extended_target.backend)
    half = [t.bfloat16() for t in (q, k, v)]
    expected = fae.flash_attention(*half, alibi_slopes=slopes, sinks=sinks, backend=extended_target.backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), inputs)] == [torch.float32] * 5


@pytest.mark.parametrize("wanted", [[0], [3], [4], [1, 4], [2, 3]], ids=str)
def test_gradients_of_some_inputs(wanted, extended_target):
    """Asking for fewer gradients changes none of them."""
    inputs = leaves()
    every = torch.autograd.grad(model(*inputs, extended_target.backend), inputs)
    some = [x.detach().requires_grad_(n in wanted) for n, x in enumerate(inputs)]
    grads = torch.autograd.grad(model(*some, extended_target.backend), [some[n] for n in wanted])
    for n, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, every[n])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_out_and_grad_and_changes(name, extended_target):
    q, k, v = (t.detach() for t in leaves()[:3])
    option = {name: torch.rand(4, requires_grad=True)}
    out = torch.full((2, 9, 4, 6), 7.0)
    with pytest.raises(ValueError, match=r"\bout\b"):
        fae.flash_attention(q, k, v, out=out, backend=extended_target.backend, **option)
    version = out._version
    assert torch.equal(out, torch.full_like(out, 7.0))
    with torch.no_grad():
        expected = fae.flash_attention(q, k, v, backend=extended_target.backend, **option)
        assert fae.flash_attention(q, k, v, out=out, backend=extended_target.backend, **option) is out
    assert torch.equal(out, expected) and out._version > version
    changed = option[name] * 1.0
    out = fae.flash_attention(q, k, v, backend=extended_target.backend, **{name: changed})
    changed.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_extended():
    assert not Options(mask=torch.empty(0), bias=torch.empty(0), kv_lengths=torch.empty(0)).is_extended()
    assert not Options(causal=1, softcap=2.0).is_extended()
    for name in ("alibi_slopes", "sinks", "rng_state", "row_labels", "cu_seqlens_q"):
        assert Options(**{name: torch.empty(0)}).is_extended()
    assert Options(mask_block_q=2).is_extended()


def test_explain(extended_target):
    q, k, v, slopes, sinks = (t.detach() for t in leaves())
    options = dict(
        alibi_slopes=slopes,
        sinks=sinks,
        dropout_p=0.3,
        mask=fae.masks.DocumentMask(torch.arange(9), torch.arange(13)),
    )
    plan = fae.explain(q, k, v, backend=extended_target.backend, **options)
    assert plan.backend == extended_target.backend and plan.flops > 0
    assert fae.explain(q.to("meta"), k.to("meta"), v.to("meta"), sinks=sinks.to("meta")).flops > 0
