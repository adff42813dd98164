"""The operators in torch's machinery: opcheck, compile, export, autocast, inference mode, functorch."""

from __future__ import annotations

import pytest
import torch
from cases import Case, build

import flash_attn_ext as fae

CASES = [
    Case("plain", heads=(4, 2), seq=(9, 13), dim=(8, 6)),
    Case("options", batch=2, heads=(4, 2), seq=(9, 13), dim=(8, 6), layout="bhsd", causal=True, window=(5, 2), softcap=3.0,
         scale=0.3, mask="b1qk", bias="1hqk", lengths=(5, 13)),
    Case("rank3", heads=(2, 1), seq=(9, 13), dim=(8, 6), rank=3),
    Case("rank2", heads=(1, 1), seq=(9, 13), dim=(8, 6), rank=2, layout="bhsd"),
    Case("strides", batch=2, heads=(4, 2), seq=(9, 13), dim=(8, 6), strides=("transposed", "d_slow", "padded")),
    Case("empty", batch=2, heads=(4, 2), seq=(9, 0), dim=(8, 6)),
]  # fmt: skip
LAYOUT = {"bshd": 0, "bhsd": 1}
CAUSAL = {False: 0, True: 1, "bottom_right": 1, "top_left": 2}


def registered_operators() -> list[str]:
    """Those of the plain family; the others are test_extended_ops.py's and test_kvcache.py's."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("flash_attn_ext::")]
    others = ("_kvcache", "::draw_dropout_state")
    return sorted(n for n in names if "_extended" not in n and not n.endswith(others))


def options(case: Case) -> tuple:
    left, right = case.window or (-1, -1)
    return (LAYOUT[case.layout], CAUSAL[case.causal], left, right, case.scale, case.softcap)


def op_arguments(name: str, case: Case, dtype=torch.float32, grad=False) -> tuple:
    """Arguments of the operator `name` for `case`; None for an operator that this test does not know."""
    x = build(case, dtype)
    if grad:
        x.q, x.k, x.v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    qkv, extras = (x.q, x.k, x.v), (x.mask, x.bias, x.kv_lengths)
    name = name.split("::")[1].split(".")[0]
    if name in ("attention_forward", "attention", "portable_forward", "portable"):
        return (*qkv, *extras, *options(case), True)
    if name == "attention_forward_out":
        return (*qkv, torch.empty_like(x.dout), *extras, *options(case), True)
    assert name in ("attention_backward", "portable_backward"), (
        f"no arguments for the operator {name}: add them here"
    )
    forward = getattr(torch.ops.flash_attn_ext, name.replace("backward", "forward"))
    with torch.no_grad():
        out, lse = forward(*qkv, *extras, *options(case), True)
    return (x.dout, torch.ones_like(lse), *qkv, out, lse, *extras, *options(case), x.bias is not None)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("name", registered_operators())
def test_opcheck(name, case):
    op = getattr(torch.ops.flash_attn_ext, name.split("::")[1].split(".")[0]).default
    torch.library.opcheck(op, op_arguments(name, case))
    if name in ("flash_attn_ext::attention", "flash_attn_ext::portable"):
        torch.library.opcheck(op, op_arguments(name, case, grad=True))


def test_opcheck_of_what_is_drawn():
    """No two results are alike, which the other checks of opcheck would compare."""
    op = torch.ops.flash_attn_ext.draw_dropout_state.default
    torch.library.opcheck(op, (torch.device("cpu"),), test_utils=("test_schema", "test_faketensor"))
    torch.manual_seed(3)
    first = op(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, op(torch.device("cpu"))) and not torch.equal(first, op(torch.device("cpu")))


def test_the_operators_are_the_ones_in_the_contract():
    names = {n.split("::")[1] for n in registered_operators()}
    assert {"attention_forward", "attention_forward_out", "attention_backward"} <= names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fake_kernels_predict_the_real_results(case, dtype):
    """Shape, dtype and strides of every output, as the compiler will believe them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name in ("attention_forward", "attention_backward", "attention_forward_out"):
        op = getattr(torch.ops.flash_attn_ext, name)
        arguments = op_arguments("flash_attn_ext::" + name, case, dtype)
        real = op(*arguments)
        mode = FakeTensorMode()
        with mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        real, fake = ([x] if isinstance(x, torch.Tensor) else x for x in (real, fake))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.device, r.stride()) == (f.shape, f.dtype, f.device, f.stride()), name


def model(q, k, v, bias):
    out, lse = fae.flash_attention(q * 1.5, k, v, causal=True, bias=bias, softcap=4.0, return_lse=True)
    return out.sin(), lse * 2


def compiled_inputs(seq_q, seq_kv, grad=True, batch=2):
    g = torch.Generator().manual_seed(seq_q)
    shapes = [(batch, seq_q, 4, 8), (batch, seq_kv, 2, 8), (batch, seq_kv, 2, 6), (1, 4, seq_q, seq_kv)]
    return [torch.randn(s, generator=g).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize("engine", ["eager", "aot_eager", "inductor"])
def test_compile_with_dynamic_shapes_equals_eager(engine):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=engine)
    for sizes in [(9, 13), (21, 8), (33, 40)]:
        inputs = compiled_inputs(*sizes)
        results = []
        for fn in (model, compiled):
            out, lse = fn(*inputs)
            seen = torch.where(lse.isfinite(), lse, 0.0)
            results.append([out, lse, *torch.autograd.grad(out.square().sum() + seen.sum(), inputs)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled for a new length"


def test_compile_without_grad():
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in [(9, 13), (21, 8)]:
        inputs = compiled_inputs(*sizes, grad=False)
        for a, b in zip(model(*inputs), compiled(*inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_of_the_standard_backend():
    torch._dynamo.reset()

    def fn(q, k, v, bias):
        return fae.flash_attention(q, k, v, causal=True, bias=bias, backend="standard")

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    inputs = compiled_inputs(9, 13)
    for a, b in zip(*(torch.autograd.grad(f(*inputs).sum(), inputs) for f in (fn, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_of_the_sdpa_function():
    torch._dynamo.reset()

    def fn(q, k, v, mask):
        return fae.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 11):
        q, k, v = torch.randn(2, 4, n, 8), torch.randn(2, 2, n + 1, 8), torch.randn(2, 2, n + 1, 8)
        mask = torch.rand(n, n + 1) < 0.7
        torch.testing.assert_close(compiled(q, k, v, mask), fn(q, k, v, mask))


def test_export_with_a_dynamic_sequence():
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return fae.flash_attention(q, k, v, causal=True, window=(6, None))

    q, k, v, _ = compiled_inputs(9, 13, grad=False)
    sq, sk = torch.export.Dim("sq", min=2, max=512), torch.export.Dim("sk", min=2, max=512)
    program = torch.export.export(Block(), (q, k, v), dynamic_shapes=({1: sq}, {1: sk}, {1: sk}))
    assert any("flash_attn_ext" in str(node.target) for node in program.graph.nodes)
    for sizes in [(9, 13), (21, 30)]:
        q, k, v, _ = compiled_inputs(*sizes, grad=False)
        torch.testing.assert_close(program.module()(q, k, v), Block()(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Inputs are cast first, mixed ones too; gradients come back in the dtype of the leaves."""
    q, k, v, bias = compiled_inputs(9, 13)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = fae.flash_attention(q, k.to(dtype), v, bias=bias, return_lse=True)
        inside = fae.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
    assert out.dtype == dtype and inside.dtype == dtype and lse.dtype == torch.float32
    expected = fae.flash_attention(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(out.float().square().sum(), [q, k, v, bias])
    assert [g.dtype for g in grads] == [torch.float32] * 4
    with torch.autocast("cpu", dtype=dtype, enabled=False):
        assert fae.flash_attention(q, k, v).dtype == torch.float32


def test_autocast_leaves_float64_alone(backend):
    """As torch's own operators do; and a bias is no input of the products, so it keeps its dtype too."""
    q, k, v, bias = (x.detach().double() for x in compiled_inputs(9, 13))
    expected = fae.flash_attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fae.flash_attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        leaf = q.requires_grad_()
        (grad,) = torch.autograd.grad(fae.flash_attention(leaf, k, v, backend=backend).sum(), leaf)
    assert got[0].dtype == got[1].dtype == grad.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "empty"], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["attention", "portable"])
def test_gradients_without_a_saved_lse(name, case):
    """The raw operator called with return_lse=False: backward computes the LSE that it needs."""
    op = getattr(torch.ops.flash_attn_ext, name)
    results = []
    for return_lse in (True, False):
        inputs = build(case, torch.float32)
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        if inputs.bias is not None:
            leaves.append(inputs.bias.detach().requires_grad_())
        bias = leaves[3] if len(leaves) > 3 else None
        out, lse = op(*leaves[:3], inputs.mask, bias, inputs.kv_lengths, *options(case), return_lse)
        assert lse.numel() == (out[..., 0].numel() if return_lse else 0)
        results.append([out, *torch.autograd.grad(out, leaves, inputs.dout)])
    for with_lse, without in zip(*results, strict=True):
        assert torch.equal(with_lse, without)


def _functorch_call(backend):
    def fn(q, k, v, bias):
        out, lse = fae.flash_attention(
            q, k, v, causal=True, bias=bias, softcap=4.0, return_lse=True, backend=backend
        )
        return out.sin().sum() + lse.square().sum()

    return fn


@pytest.mark.parametrize("backend", ["cpu", "portable", "standard"])
def test_functorch_grad(backend):
    fn, inputs = _functorch_call(backend), compiled_inputs(9, 13)
    expected = torch.autograd.grad(fn(*inputs), inputs)
    got = torch.func.grad(fn, argnums=(0, 1, 2, 3))(*(x.detach() for x in inputs))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["cpu", "portable", "standard"])
def test_functorch_vmap(backend):
    """Over another axis, of some inputs only, and of a gradient: what a loop gives."""
    q, k, v, bias = compiled_inputs(9, 13, grad=False)
    many_q, many_bias = torch.randn(3, *q.shape), torch.randn(*bias.shape, 3)
    fn = _functorch_call(backend)

    def out_of(q, k, v, bias):
        return fae.flash_attention(q, k, v, bias=bias, return_lse=True, backend=backend)

    got = torch.func.vmap(out_of, in_dims=(0, None, None, -1))(many_q, k, v, many_bias)
    loop = [out_of(many_q[i], k, v, many_bias[..., i]) for i in range(3)]
    for a, *b in zip(got, *loop, strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    per_sample = torch.func.vmap(torch.func.grad(fn, argnums=(0, 3)), in_dims=(0, None, None, -1))
    got = per_sample(many_q, k, v, many_bias)
    for i in range(3):
        leaves = [many_q[i].clone().requires_grad_(), many_bias[..., i].clone().requires_grad_()]
        expected = torch.autograd.grad(fn(leaves[0], k, v, leaves[1]), leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_without_grad(mode, backend):
    q, k, v, bias = compiled_inputs(9, 13)
    expected = fae.flash_attention(q, k, v, bias=bias, backend=backend)
    with mode():
        out, lse = fae.flash_attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    assert not out.requires_grad and not lse.requires_grad and torch.equal(out, expected)
    assert out.is_inference() == (mode is torch.inference_mode)
    with torch.inference_mode():
        fresh = [torch.randn(1, 4, 2, 8) for _ in range(3)]
        assert fae.flash_attention(*fresh, backend=backend).is_inference()


def test_only_differentiable_inputs_get_a_graph(backend):
    q, k, v, bias = compiled_inputs(9, 13, grad=False)
    assert not fae.flash_attention(q, k, v, backend=backend).requires_grad
    out = fae.flash_attention(q, k, v, bias=bias.requires_grad_(), backend=backend)
    out.sum().backward()
    assert bias.grad.shape == bias.shape and q.grad is None


def test_backward_twice_and_retain_graph(backend):
    q, k, v, _ = compiled_inputs(9, 13)
    out = fae.flash_attention(q, k, v, backend=backend)
    first = torch.autograd.grad(out.sum(), [q, k, v], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), [q])


def test_second_derivatives_are_refused_or_right(backend):
    """A gradient of the gradient must not be silently zero."""
    q, k, v, _ = (x.detach().double().requires_grad_() for x in compiled_inputs(3, 4, batch=1))

    def fn(q, k, v):
        return fae.flash_attention(q, k, v, backend=backend)

    out = fn(q, k, v)
    try:
        (g,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        torch.autograd.grad(g.square().sum(), q)
    except RuntimeError:
        return
    assert torch.autograd.gradgradcheck(fn, (q, k, v))


def test_a_changed_input_is_noticed_before_backward(backend):
    q, k, v, _ = compiled_inputs(9, 13)
    inner = k * 1.0
    out = fae.flash_attention(q, inner, v, backend=backend)
    inner.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "portable", "standard"])
def test_writing_into_out_is_noticed_before_backward(backend):
    """`out` had been saved by another operation: its gradient must not be made of the new values."""
    q, k, v, _ = compiled_inputs(9, 13, grad=False)
    weight = torch.randn(2, 9, 4, 6, requires_grad=True)
    out = torch.randn(2, 9, 4, 6)
    product = weight * out
    version = out._version
    with torch.no_grad():
        fae.flash_attention(q, k, v, out=out, backend=backend)
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_the_raw_operator_counts_its_write():
    q, k, v, _ = compiled_inputs(9, 13, grad=False)
    out = torch.empty(2, 9, 4, 6)
    view = out[:, 2:]
    arguments = (q[:, 2:], k, v, view, None, None, None, 0, 0, -1, -1, None, 0.0, False)
    versions = [x._version for x in (q, k, v, out)]
    torch.ops.flash_attn_ext.attention_forward_out(*arguments)
    assert [x._version for x in (q, k, v)] == versions[:3]
    assert out._version > versions[3] and view._version == out._version
    with torch.inference_mode():  # such tensors have no version
        fresh = torch.empty(2, 9, 4, 6)
        fae.flash_attention(q, k, v, out=fresh)
    assert torch.equal(fresh[:, 2:], view)


def test_checkpoint(backend):
    from torch.utils.checkpoint import checkpoint

    q, k, v, _ = compiled_inputs(9, 13)

    def fn(q, k, v):
        return fae.flash_attention(q, k, v, causal=True, backend=backend)

    plain = torch.autograd.grad(fn(q, k, v).square().sum(), [q, k, v])
    again = torch.autograd.grad(checkpoint(fn, q, k, v, use_reentrant=False).square().sum(), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_graph_memory_is_released():
    """Nothing keeps a call's tensors alive: outputs, saved tensors, contexts."""
    import gc
    import weakref

    q, k, v, _ = compiled_inputs(9, 13)
    inner = k * 1.0
    out = fae.flash_attention(q, inner, v)
    refs = [weakref.ref(out), weakref.ref(inner)]
    out.sum().backward()
    del out, inner
    gc.collect()
    assert [r() for r in refs] == [None, None]
