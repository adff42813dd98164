"""flash_attn's interface: signatures, results, LSE shapes, raw functions, and the package's name."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import flash_attn_ext as fae
from flash_attn_ext.compat import flash_attn as compat
from flash_attn_ext.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

SCORES = [
    {},
    {"causal": True},
    {"window_size": (5, 2)},
    {"causal": True, "softcap": 2.0, "softmax_scale": 0.3},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "causal": True, "window_size": (9, -1)},
]


def tensors(seq_q=9, seq_k=13, heads_kv=2, dtype=torch.float32) -> list[Tensor]:
    shapes = [(2, seq_q, 4, 16), (2, seq_k, heads_kv, 16), (2, seq_k, heads_kv, 16)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def ours(scores: dict) -> dict:
    """The same in the words of `flash_attention`."""
    names = {"window_size": "window", "softmax_scale": "scale"}
    return {names.get(name, name): value for name, value in scores.items()}


@pytest.mark.parametrize("scores", SCORES, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_func_is_flash_attention(scores, dtype):
    q, k, v = tensors(dtype=dtype)
    expected = fae.flash_attention(q, k, v, **ours(scores))
    got = flash_attn_func(q, k, v, **scores)
    assert torch.equal(got, expected)
    dout = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout), strict=True
    ):
        assert torch.equal(a, b)
    positional = (0.0, scores.get("softmax_scale"), scores.get("causal", False))
    rest = (scores.get("window_size", (-1, -1)), scores.get("softcap", 0.0), scores.get("alibi_slopes"))
    kv, same = torch.stack((k, v), 2), (*positional, *rest, True)
    assert torch.equal(compat.flash_attn_kvpacked_func(q, kv, *same), expected)
    qkv = torch.stack((q, q, q), 2)
    assert torch.equal(compat.flash_attn_qkvpacked_func(qkv, *same), flash_attn_func(q, q, q, *same))


@pytest.mark.parametrize("scores", SCORES, ids=lambda s: "-".join(s) or "plain")
def test_varlen_is_each_sequence_alone(scores):
    lengths = [(3, 5), (0, 4), (6, 0), (9, 9)]
    cu = [torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0).int() for i in (0, 1)]
    q, k, v = (torch.randn(int(cu[min(i, 1)][-1]), 4 if i == 0 else 2, 16) for i in range(3))
    got = flash_attn_varlen_func(q, k, v, *cu, 9, 9, **scores)
    kv = torch.stack((k, v), 1)
    assert torch.equal(compat.flash_attn_varlen_kvpacked_func(q, kv, *cu, 9, 9, **scores), got)
    qkv = torch.stack((q, q, q), 1)
    own = flash_attn_varlen_func(q, q, q, cu[0], cu[0], 9, 9, **scores)
    assert torch.equal(compat.flash_attn_varlen_qkvpacked_func(qkv, cu[0], 9, **scores), own)
    for b in range(len(lengths)):
        rows, keys = (slice(int(c[b]), int(c[b + 1])) for c in cu)
        alone = flash_attn_func(q[None, rows], k[None, keys], v[None, keys], **scores)[0]
        torch.testing.assert_close(got[rows], alone)


@pytest.mark.parametrize("scores", SCORES, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_probabilities_on_request(scores, packed):
    with torch.no_grad():
        q, k, v = tensors(seq_q=9, seq_k=9)
        call, lse_shape = (lambda **o: flash_attn_func(q, k, v, **scores, **o)), (2, 4, 9)
        if packed:
            cu = torch.tensor([0, 9, 18], dtype=torch.int32)
            flat = [t.flatten(0, 1) for t in (q, k, v)]
            call, lse_shape = (
                (lambda **o: flash_attn_varlen_func(*flat, cu, cu, 9, 9, **scores, **o)),
                (4, 18),
            )
        out, lse, nothing = call(return_attn_probs=True)
        assert lse.shape == lse_shape and lse.dtype == torch.float32 and nothing.numel() == 0
        out, lse, signed = call(dropout_p=0.4, return_attn_probs=True)
        assert signed.shape == (2, 4, 9, 9) and (signed < 0).any() and (signed > 0).any()
        values = v.repeat_interleave(2, 2).transpose(1, 2)
        torch.testing.assert_close(signed.abs().amax(-1), torch.ones(2, 4, 9))
        probabilities = signed / signed.abs().sum(-1, keepdim=True)
        kept = (probabilities.clamp(min=0) / 0.6 @ values).transpose(1, 2)
        torch.testing.assert_close(kept.reshape(out.shape), out)


def test_errors_are_also_what_flash_attn_raises():
    q, k, v = tensors(seq_q=9, seq_k=9)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    for error, match, call in (
        (ValueError, "head", lambda: flash_attn_func(q, k[:, :, :1].expand(-1, -1, 3, -1), v)),
        (TypeError, "dtype", lambda: flash_attn_func(q, k.double(), v)),
        (ValueError, "dropout_p", lambda: flash_attn_func(q, k, v, dropout_p=1.5)),
        (TypeError, "softmax_scale is a constant", lambda: flash_attn_func(q, k, v, 0.0, torch.ones((), requires_grad=True))),
        (ValueError, "cu_seqlens", lambda: flash_attn_varlen_func(q[0], k[0], v[0], cu[:0], cu, 9, 9)),
        (ValueError, "cache_lengths", lambda: compat.flash_attn_with_kvcache(q, k, v, cache_seqlens=10)),
        (ValueError, "rng_state", lambda: compat._flash_attn_backward(
            q, q, k, v, q, torch.zeros(2, 4, 9), None, None, None, 0.3, None, False)),
    ):  # fmt: skip
        for kind in (error, RuntimeError):
            with pytest.raises(kind, match=match):
                call()


@pytest.mark.parametrize("scores", SCORES, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_raw_functions_agree_with_autograd(scores, dropout_p, packed):
    q, k, v = tensors(seq_q=9, seq_k=9)
    names = ("softmax_scale", "causal", "window_size", "softcap", "alibi_slopes")
    scale, causal, window, softcap, slopes = (
        scores.get(name, default)
        for name, default in zip(names, (None, False, (-1, -1), 0.0, None), strict=True)
    )
    taken, packing = (q, k, v), ()
    if packed:
        cu = torch.tensor([0, 9, 18], dtype=torch.int32)
        taken, packing = tuple(t.flatten(0, 1) for t in taken), (cu, cu, 9, 9)
    forward = compat._flash_attn_varlen_forward if packed else compat._flash_attn_forward
    backward = compat._flash_attn_varlen_backward if packed else compat._flash_attn_backward
    options = (dropout_p, scale, causal, *window, softcap, slopes)

    torch.manual_seed(3)
    expected = (flash_attn_varlen_func if packed else flash_attn_func)(*taken, *packing, dropout_p, **scores)
    dout = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, taken, dout)
    torch.manual_seed(3)
    plain = [t.detach() for t in taken]
    out, lse, _, rng_state = forward(*plain, *packing, *options)
    assert torch.equal(out, expected) and not out.requires_grad
    assert lse.dtype == torch.float32 and lse.shape == ((4, 18) if packed else (2, 4, 9))
    written = [torch.full_like(t, float("nan")) for t in plain]
    delta = backward(dout, *plain, out, lse, *written, *packing, *options, True, rng_state)
    torch.testing.assert_close(delta, (dout * out).sum(-1).mT)
    for got, want in zip(written, grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_dropout_needs_its_state_for_gradients():
    q, k, v = (t.detach() for t in tensors())
    out, lse, *_ = compat._flash_attn_forward(q, k, v, 0.3, None, False)
    with pytest.raises(ValueError, match="rng_state"):
        compat._flash_attn_backward(out, q, k, v, out, lse, None, None, None, 0.3, None, False)


def test_sinks_of_forks():
    q, k, v = tensors()
    sinks = torch.randn(4, requires_grad=True)
    got = flash_attn_func(q, k, v, causal=True, sinks=sinks)
    assert torch.equal(got, fae.flash_attention(q, k, v, causal=True, sinks=sinks))
    assert torch.autograd.grad(got.sum(), sinks)[0].abs().sum() > 0


def paged(k: torch.Tensor, lengths: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed keys (total, heads, dim) in pages of a pool, and their table."""
    pages = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(pages) + 1)
    pool = torch.full((sum(pages) + 1, size, *k.shape[1:]), float("nan"))
    table = torch.full((len(lengths), max(pages)), -1, dtype=torch.int32)
    first = used = 0
    for b, length in enumerate(lengths):
        own = order[used : used + pages[b]]
        table[b, : pages[b]] = own
        rows = torch.arange(length)
        pool[own[rows // size], rows % size] = k[first : first + length]
        first, used = first + length, used + pages[b]
    return pool, table


def test_packed_queries_on_keys_in_pages():
    lengths_q, lengths_k = [3, 0, 5], [9, 4, 20]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    torch.manual_seed(0)
    q, k, v = torch.randn(8, 4, 16), torch.randn(33, 2, 16), torch.randn(33, 2, 8)
    options = dict(causal=True, window_size=(7, 0), softcap=3.0, return_attn_probs=True)
    want = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 20, **options)
    torch.manual_seed(1)
    k_pool, table = paged(k, lengths_k, 4)
    torch.manual_seed(1)
    v_pool, _ = paged(v, lengths_k, 4)
    got = flash_attn_varlen_func(q, k_pool, v_pool, cu_q, cu_k, 5, 20, block_table=table, **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    raw = compat._flash_attn_varlen_forward(
        q, k_pool, v_pool, cu_q, cu_k, 5, 20, 0.0, None, True, 7, 0, 3.0, block_table=table
    )
    assert torch.equal(raw[0], got[0]) and torch.equal(raw[1], got[1])
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flash_attn_varlen_func(q, k_pool, v_pool, cu_q, cu_k, 5, 20, dropout_p=0.1, block_table=table)


@pytest.mark.parametrize("leftpad", [None, [2, 0]])
@pytest.mark.parametrize("used", [None, [4, 1]])
def test_packed_keys_used_in_part(leftpad, used):
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 16), torch.randn(13, 2, 16), torch.randn(13, 2, 16)
    cu_q, cu_k = torch.tensor([0, 2, 5]).int(), torch.tensor([0, 7, 13]).int()
    given = {"leftpad_k": leftpad, "seqused_k": used}
    out, lse, *_ = compat._flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, 3, 7, 0.0, None, True,
        **{name: value and torch.tensor(value, dtype=torch.int32) for name, value in given.items()},
    )  # fmt: skip
    for b in range(2):
        end = int(cu_k[b]) + used[b] if used else int(cu_k[b + 1])
        first = int(cu_k[b]) + (leftpad[b] if leftpad else 0)
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        tensors = (q[None, rows], k[None, first:end], v[None, first:end])
        want, want_lse = fae.flash_attention(*tensors, causal=True, return_lse=True)
        torch.testing.assert_close(out[rows], want[0])
        torch.testing.assert_close(lse[:, rows], want_lse[0])


def test_a_window_may_be_a_tensor():
    q, k, v = tensors()
    got = flash_attn_func(q, k, v, window_size=torch.tensor([3, 1]))
    assert torch.equal(got, flash_attn_func(q, k, v, window_size=(3, 1)))


def test_kvcache():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    caches, lengths = torch.randn(2, 2, 20, 2, 16), torch.tensor([3, 11], dtype=torch.int32)
    cos, sin = torch.rand(20, 8), torch.rand(20, 8)
    ours_, theirs = caches.clone(), caches.clone()
    want, want_lse = fae.flash_attention_with_kvcache(
        q, *ours_, k, v, cache_lengths=lengths, causal=False, rotary_cos=cos, rotary_sin=sin,
        rotary_interleaved=True, return_lse=True,
    )  # fmt: skip
    out, lse = compat.flash_attn_with_kvcache(q, *theirs, k, v, cos, sin, lengths, return_softmax_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse) and torch.equal(ours_, theirs)
    full = compat.flash_attn_with_kvcache(q, *caches)
    assert torch.equal(full, fae.flash_attention_with_kvcache(q, *caches, cache_lengths=20, causal=False))
    with pytest.raises(ValueError, match="cache_seqlens"):
        compat.flash_attn_with_kvcache(q, *caches, k, v)


def calls_of_every_function() -> dict:
    """With options of the scores; each returns out."""
    q, k, v = (t.detach()[:, :9] for t in tensors(heads_kv=4))
    kv, qkv, cu = torch.stack((k, v), 2), torch.stack((q, k, v), 2), torch.tensor([0, 9, 18]).int()
    flat, flat_kv, flat_qkv = [t.flatten(0, 1) for t in (q, k, v)], kv.flatten(0, 1), qkv.flatten(0, 1)

    def raw(forward, *tensors, window_size, softcap, **more):
        return forward(*tensors, 0.0, None, False, *window_size, softcap, **more)[0]

    packing = (cu, cu, 9, 9)
    varlen = compat._flash_attn_varlen_forward
    return {
        "func": lambda **o: flash_attn_func(q, k, v, **o),
        "kvpacked": lambda **o: compat.flash_attn_kvpacked_func(q, kv, **o),
        "qkvpacked": lambda **o: compat.flash_attn_qkvpacked_func(qkv, **o),
        "varlen": lambda **o: flash_attn_varlen_func(*flat, *packing, **o),
        "varlen-kvpacked": lambda **o: compat.flash_attn_varlen_kvpacked_func(
            flat[0], flat_kv, *packing, **o
        ),
        "varlen-qkvpacked": lambda **o: compat.flash_attn_varlen_qkvpacked_func(flat_qkv, cu, 9, **o),
        "kvcache": lambda **o: compat.flash_attn_with_kvcache(q, k, v, **o),
        "raw": lambda **o: raw(compat._flash_attn_forward, q, k, v, **o),
        "raw-varlen": lambda **o: raw(varlen, *flat, *packing, **o),
        "raw-in-part": lambda **o: raw(varlen, *flat, *packing, seqused_k=cu[1:] * 0 + 9, **o),
        "probabilities": lambda **o: compat._flash_attn_forward(
            q, k, v, 1e-9, None, False, *o["window_size"], o["softcap"], return_softmax=True
        )[2],
    }


@pytest.mark.parametrize("name", calls_of_every_function())
def test_what_is_negative_is_not_there(name):
    """Any window side below 0, and any softcap."""
    call = calls_of_every_function()[name]
    torch.manual_seed(0)
    want = call(window_size=(-1, -1), softcap=0.0)
    torch.manual_seed(0)
    assert torch.equal(call(window_size=(-7, -2), softcap=-1.5), want)
    torch.manual_seed(0)
    one_side = call(window_size=(2, -1), softcap=0.0)
    assert not torch.equal(one_side, want)
    torch.manual_seed(0)
    assert torch.equal(call(window_size=(2, -9), softcap=-3), one_side)


def test_gradients_without_what_is_negative():
    q, k, v = (t.detach() for t in tensors())
    out, lse, *_ = compat._flash_attn_forward(q, k, v, 0.0, None, False)
    grads = [[torch.empty_like(t) for t in (q, k, v)] for _ in range(2)]
    for written, options in zip(grads, ((-1, -1, 0.0), (-7, -2, -1.5)), strict=True):
        compat._flash_attn_backward(out, q, k, v, out, lse, *written, 0.0, None, False, *options)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"softcap": "1"}, "softcap must be a number"),
        ({"softcap": float("nan")}, "softcap"),
        ({"window_size": 3}, "window must be"),
        ({"window_size": (-1.0, 2)}, "window must hold ints"),
    ],
    ids=["softcap-str", "softcap-nan", "window-int", "window-float"],
)
def test_what_makes_no_scores(wrong, match):
    with pytest.raises((TypeError, ValueError), match=match):
        flash_attn_func(*tensors(), **wrong)


SHARED = (
    "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs sinks"
)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (flash_attn_func, "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
         "return_attn_probs sinks"),
        (flash_attn_varlen_func, "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale "
         "causal window_size softcap alibi_slopes deterministic return_attn_probs block_table sinks"),
        (compat._flash_attn_forward, "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap "
         "alibi_slopes return_softmax"),
        (compat.flash_attn_with_kvcache, "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
         "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
         "return_softmax_lse sinks"),
        (compat.flash_attn_kvpacked_func, f"q kv {SHARED}"),
        (compat.flash_attn_qkvpacked_func, f"qkv {SHARED}"),
        (compat.flash_attn_varlen_kvpacked_func,
         f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {SHARED}"),
        (compat.flash_attn_varlen_qkvpacked_func, f"qkv cu_seqlens max_seqlen {SHARED}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_signatures(function, names):
    """Callers look at them to learn what there is."""
    assert list(inspect.signature(function).parameters) == names.split()
    known = inspect.getfullargspec(function)
    assert known.args + known.kwonlyargs == names.split()


INSTALLED = """
import importlib.metadata, importlib.util, sys
from flash_attn_ext.compat import flash_attn as compat
from flash_attn_ext.compat import rotary
compat.install()
compat.install()
import flash_attn
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_forward, _get_block_size_n, flash_attn_varlen_func
from flash_attn.bert_padding import pad_input, unpad_input, index_first_axis
from flash_attn.layers.rotary import apply_rotary_emb
assert flash_attn_func is compat.flash_attn_func
assert importlib.util.find_spec("flash_attn") is not None
assert importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn") == flash_attn.__version__
assert importlib.metadata.version("torch")
assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash_attn"]
for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding", "flash_attn.layers",
             "flash_attn.layers.rotary"):
    module = sys.modules[name]
    assert importlib.util.find_spec(name) is module.__spec__ and module.__spec__.name == name
    assert importlib.reload(module) is module
assert importlib.util.find_spec("flash_attn.ops") is None
assert flash_attn.flash_attn_func is compat.flash_attn_func and not hasattr(flash_attn, "install")
assert flash_attn.layers.rotary.apply_rotary_emb is apply_rotary_emb is rotary.apply_rotary_emb
compat.install()
"""
TOO_LATE = """
import sys, types
sys.modules["flash_attn"] = types.ModuleType("flash_attn")
from flash_attn_ext.compat.flash_attn import install
try:
    install()
except ImportError as error:
    assert "flash_attn" in str(error)
else:
    sys.exit("installed over another one")
"""


@pytest.mark.parametrize("program", [INSTALLED, TOO_LATE], ids=["installed", "too-late"])
def test_install(program):
    subprocess.run([sys.executable, "-c", program], check=True)
