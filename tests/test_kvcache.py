"""Attention over a cache: appended, turned, paged, padded, and nothing else of the cache read or written."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import EXTENDED_TARGETS
from kvcache_cases import draw, results, rotated
from reference import complaint, largest, relative_error, ulp

import flash_attn_ext as fae

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN = float("nan")


@pytest.fixture
def serving(extended_target):
    """Calls without a backend argument go to the target."""
    fae.set_backend(extended_target.backend)
    yield extended_target
    fae.set_backend("auto")


@pytest.fixture
def emulated(emulator):
    """Calls without a backend argument go to the CUDA kernels."""
    fae.set_backend("cuda_emulated")
    yield
    fae.set_backend("auto")


def attend(call, **more):
    return fae.flash_attention_with_kvcache(**call.arguments, return_lse=True, **more)


def check(call, out, lse):
    exact, plain = results(call)
    for b, (want, other) in enumerate(zip(exact, plain, strict=True)):
        for name, got in (("out", out[b : b + 1]), ("lse", lse[b : b + 1])):
            wanted, unfused = getattr(want, name), getattr(other, name).double()
            # One small tensor: the unfused computation of others of its kind may be worse.
            error = max(relative_error(unfused, wanted), 2 * torch.finfo(got.dtype).eps)
            # Probabilities of this type that are all but 0 are as coarse as its smallest number.
            error = max(error, 4 * ulp(0, out.dtype) / (largest(wanted) or 1))
            found = complaint(name, got, wanted, error, input_dtype=out.dtype)
            assert found is None, f"sequence {b}: {found}"


@pytest.mark.parametrize("seed", range(120))
def test_random_calls(seed, serving):
    dtype = DTYPES[seed % len(DTYPES)]
    check_random_call(draw(seed, dtype), dtype)


@pytest.mark.parametrize("seed", range(24))
def test_random_calls_on_the_cuda_kernels(seed, emulated):
    dtype = DTYPES[seed % 3]
    call = draw(seed, dtype)
    fae.testing.set_emulator_seed(seed)
    check_random_call(call, dtype)


def test_the_last_of_those_that_share_a_place_stays(emulated):
    """As on the CPU: of sequences with one entry or page, whatever order they are worked on in."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(3, 1, 2, 8), torch.randn(2, 3, 5, 1, 8)
    lengths = torch.tensor([1, 3, 2])
    shared = {
        "entries": (torch.zeros(2, 8, 1, 8), {"cache_batch_idx": torch.tensor([1, 1, 0])}),
        "pages": (torch.zeros(4, 4, 1, 8), {"block_table": torch.tensor([[0, 1], [1, 2], [1, 3]])}),
    }
    for empty, options in shared.values():
        caches = {}
        for backend in ("cpu", "cuda_emulated"):
            fae.set_backend(backend)
            caches[backend] = (empty.clone(), empty.clone())
            fae.flash_attention_with_kvcache(q, *caches[backend], k, v, cache_lengths=lengths, **options)
        assert all(map(torch.equal, *caches.values()))


def check_random_call(call, dtype):
    before = copy.deepcopy(call.arguments)
    # What no sequence has may hold anything.
    for name in ("k_cache", "v_cache"):
        cache = call.arguments[name]
        held = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for b in range(len(call.lengths)):
            held_rows = torch.zeros_like(held)
            index = call.rows[b]
            positions = torch.arange(held_rows[index].numel())
            held_rows[index] = (positions >= call.pads[b]) & (positions < call.lengths[b])
            held |= held_rows
        cache.masked_fill_((~held)[..., None, None], NAN)
        before[name] = cache.clone()
    out, lse = attend(call)
    check(call, out, lse)

    a = call.arguments
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and not name.endswith("_cache"):
            assert torch.equal(a[name], value), f"{name} was changed"
    for name in ("k_cache", "v_cache"):
        kept = call.untouched(a[name])
        assert torch.equal(a[name][kept].nan_to_num(7), before[name][kept].nan_to_num(7)), name
    for b in range(len(call.lengths) if call.added else 0):
        start = call.lengths[b]
        new_k = a["k_cache"][call.rows[b]][start : start + call.added]
        new_v = a["v_cache"][call.rows[b]][start : start + call.added]
        assert torch.equal(new_v, a["v"][b])
        if "rotary_cos" in a:
            positions = [start + i for i in range(call.added)]
            tables = (a["rotary_cos"], a["rotary_sin"])
            exact = rotated(a["k"][b], *tables, positions, a["rotary_interleaved"])
            size = float(a["k"][b].abs().max()) * 1.5
            assert (new_k.double() - exact).abs().max() <= ulp(size, dtype)
        else:
            assert torch.equal(new_k, a["k"][b])


@pytest.mark.parametrize("seed", range(0, 48, 4))
def test_standard_backend(seed):
    call = draw(seed, torch.float32)
    call.arguments.pop("batch_invariant", None)
    fae.set_backend("standard")
    try:
        check(call, *attend(call))
    finally:
        fae.set_backend("auto")


@pytest.mark.parametrize(
    "target", EXTENDED_TARGETS[:1] + EXTENDED_TARGETS[-1:], ids=lambda t: t.name, indirect=True
)
def test_a_long_cache_is_split(target):
    """Ranges of keys side by side, merged; more than one block, and pages that a block straddles."""
    fae.set_backend(target.backend)
    try:
        torch.manual_seed(3)
        q = torch.randn(1, 1, 8, 64)
        for size in (7, 128):
            pages = -(-9000 // size)
            table = torch.randperm(pages)[None].int()
            k_cache, v_cache = (torch.randn(pages, size, 2, 64) for _ in range(2))
            whole = [c[table[0].long()].flatten(0, 1)[None, :9000] for c in (k_cache, v_cache)]
            want = fae.flash_attention(q.double(), *(c.double() for c in whole), causal=True)
            for splits in (0, 1, 5):
                out = fae.flash_attention_with_kvcache(
                    q, k_cache, v_cache, cache_lengths=9000, block_table=table, num_splits=splits
                )
                assert (out - want).abs().max() < 1e-6
    finally:
        fae.set_backend("auto")


@pytest.mark.parametrize("target", EXTENDED_TARGETS, ids=lambda t: t.name, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 20, 33, 48, 64, 65, 200])
def test_pages_of_every_size_are_read_as_one_cache(target, dtype, size):
    """Whether they are gathered or read one by one: the same, to the bit on a CPU, and nothing of other pages,
    which hold NaN."""
    fae.set_backend(target.backend)
    try:
        torch.manual_seed(size)
        for group, dim, window, sinks in ((1, 64, None, None), (8, 80, (150, 0), None), (3, 33, None, True)):
            lengths = torch.tensor([301, 64, 5])
            q = torch.randn(3, 1, 2 * group, dim).to(dtype)
            need = -(-301 // size)
            table = torch.randperm(3 * need + 4)[: 3 * need].view(3, need).int()
            whole = [torch.randn(3, need * size, 2, dim).to(dtype) for _ in range(2)]
            pages = [torch.full((3 * need + 4, size, 2, dim), torch.nan, dtype=dtype) for _ in range(2)]
            for paged, cache in zip(pages, whole, strict=True):
                paged[table.flatten().long()] = cache.reshape(3 * need, size, 2, dim)
                for b, length in enumerate(lengths.tolist()):
                    cache[b, length:] = torch.nan
            options = {"cache_lengths": lengths, "window": window}
            if sinks:
                options["sinks"] = torch.randn(2 * group)
            out = fae.flash_attention_with_kvcache(q, *pages, block_table=table, **options)
            want = fae.flash_attention_with_kvcache(q, *whole, **options)
            if target.backend == "cpu":
                assert torch.equal(out, want)
            else:
                tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
                assert (out.double() - want.double()).abs().max() < tolerance
    finally:
        fae.set_backend("auto")


def test_batch_invariant():
    """Bitwise the same alone and in a batch, and whatever num_splits says."""
    torch.manual_seed(0)
    q, caches = torch.randn(3, 1, 8, 64), torch.randn(2, 3, 3000, 2, 64)
    lengths = torch.tensor([3000, 17, 2100])
    options = {"batch_invariant": True}
    whole = fae.flash_attention_with_kvcache(q, *caches, cache_lengths=lengths, **options)
    for b in range(3):
        alone = fae.flash_attention_with_kvcache(
            q[b : b + 1], *caches[:, b : b + 1], cache_lengths=lengths[b : b + 1], num_splits=b, **options
        )
        assert torch.equal(alone[0], whole[b])


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    q, caches = torch.randn(2, 1, 8, 64), torch.randn(2, 2, 5000, 2, 64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(fae.flash_attention_with_kvcache(q, *caches, cache_lengths=5000))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_decoding_step_by_step_is_the_whole():
    """A causal prompt in one go, and token by token over a cache."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 33, 8, 16), torch.randn(2, 2, 33, 2, 16)
    want = fae.flash_attention(q, k, v, causal=True)
    cache = fae.KVCache(2, 40, 2, 16)
    steps = [slice(0, 20), *(slice(i, i + 1) for i in range(20, 33))]
    got = torch.cat([cache.attend(q[:, s], k[:, s], v[:, s]) for s in steps], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_nothing_to_do():
    cache = torch.zeros(2, 0, 2, 8)
    out, lse = fae.flash_attention_with_kvcache(
        torch.randn(2, 3, 4, 8), cache, cache, cache_lengths=0, return_lse=True
    )
    assert out.eq(0).all() and lse.eq(-torch.inf).all() and out.shape == (2, 3, 4, 8)
    out = fae.flash_attention_with_kvcache(torch.randn(0, 3, 4, 8), cache[:0], cache[:0], cache_lengths=0)
    assert out.shape == (0, 3, 4, 8)
    # No queries: the cache is filled all the same.
    k_cache, k = torch.zeros(1, 4, 2, 8), torch.randn(1, 2, 2, 8)
    fae.flash_attention_with_kvcache(torch.randn(1, 0, 4, 8), k_cache, k_cache.clone(), k, k, cache_lengths=1)
    assert torch.equal(k_cache[:, 1:3], k)


def test_an_input_that_requires_grad_is_no_obstacle():
    q, caches = torch.randn(1, 1, 4, 8, requires_grad=True), torch.randn(2, 1, 9, 4, 8)
    assert not fae.flash_attention_with_kvcache(q, *caches, cache_lengths=9).requires_grad


def test_autocast():
    q, caches = torch.randn(1, 1, 4, 8), torch.randn(2, 1, 9, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fae.flash_attention_with_kvcache(q, *caches, cache_lengths=9).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_compiled(backend):
    fae.set_backend(backend)
    try:
        torch.manual_seed(0)
        caches = torch.randn(2, 2, 30, 2, 8)
        q, k, v = torch.randn(2, 1, 4, 8), *torch.randn(2, 2, 1, 2, 8)
        lengths = torch.tensor([3, 20])

        def step(q, k_cache, v_cache, k, v, lengths):
            return fae.flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_lengths=lengths) + 1

        eager, compiled = caches.clone(), caches.clone()
        want = step(q, *eager, k, v, lengths)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, *compiled, k, v, lengths)
        assert torch.equal(got, want) and torch.equal(eager, compiled)
    finally:
        fae.set_backend("auto")


CACHE_OPERATORS = {"attention_kvcache", "portable_kvcache"}


def test_these_are_all_operators_on_caches():
    names = [
        n.partition("::")[2]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("flash_attn_ext::")
    ]
    # Once another test has loaded them, those of the emulator are there, too.
    assert {n for n in names if n.endswith("_kvcache")} - {"emulated_kvcache"} == CACHE_OPERATORS


@pytest.mark.parametrize("name", sorted(CACHE_OPERATORS))
@pytest.mark.parametrize("options", ["plain", "paged", "rotary", "nothing-new"])
def test_operators_are_as_torch_wants_them(name, options):
    q, caches = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 9, 2, 8)
    new = torch.randn(2, 2, 1, 2, 8)
    call = fae._cache_call.CacheCall(q, *caches, *new, torch.tensor([3, 8]), return_lse=True)
    call = {
        "plain": call,
        "paged": call._replace(block_table=torch.tensor([[1], [0]], dtype=torch.int32), window_left=4),
        "rotary": call._replace(
            rotary_cos=torch.ones(12, 4), rotary_sin=torch.zeros(12, 4), sinks=torch.zeros(4)
        ),
        "nothing-new": call._replace(k=None, v=None, return_lse=False, causal=0, softcap=2.0),
    }[options]
    torch.library.opcheck(getattr(torch.ops.flash_attn_ext, name).default, tuple(call))


def plain_call(**changes) -> dict:
    call = {
        "q": torch.randn(2, 1, 4, 8),
        "k_cache": torch.zeros(2, 6, 2, 8),
        "v_cache": torch.zeros(2, 6, 2, 8),
        "k": torch.randn(2, 2, 2, 8),
        "v": torch.randn(2, 2, 2, 8),
        "cache_lengths": torch.tensor([1, 4]),
    }
    return {**call, **changes}


SHARED = torch.zeros(2, 6, 2, 8)
WRONG = {
    "too long": ({"cache_lengths": torch.tensor([1, 5])}, ValueError, "cache_lengths is 5 for sequence 1 and 2"),
    "negative length": ({"cache_lengths": torch.tensor([-1, 4])}, ValueError, "cache_lengths is -1"),
    "negative int": ({"cache_lengths": -3}, ValueError, "cache_lengths is -3"),
    "int too long": ({"cache_lengths": 5}, ValueError, "cache_lengths is 5"),
    "lengths of another batch": ({"cache_lengths": torch.tensor([1])}, ValueError, r"cache_lengths has shape \(1,\)"),
    "float lengths": ({"cache_lengths": torch.tensor([1.0, 2.0])}, TypeError, "cache_lengths has dtype float32"),
    "no number": ({"cache_lengths": "7"}, TypeError, "cache_lengths must be an int or a Tensor, got str"),
    "a bool": ({"cache_lengths": True}, TypeError, "cache_lengths must be"),
    "k without v": ({"v": None}, ValueError, "k was given without v"),
    "v without k": ({"k": None}, ValueError, "v was given without k"),
    "dtype of k": ({"k": torch.zeros(2, 2, 2, 8).half()}, TypeError, "k has dtype float16"),
    "dtype of the cache": ({"v_cache": torch.zeros(2, 6, 2, 8).double()}, TypeError, "v_cache has dtype float64"),
    "rank of q": ({"q": torch.zeros(1, 4, 8)}, ValueError, r"q has shape \(1, 4, 8\)"),
    "rank of k_cache": ({"k_cache": torch.zeros(6, 2, 8)}, ValueError, r"k_cache has shape \(6, 2, 8\)"),
    "dim of k_cache": ({"k_cache": torch.zeros(2, 6, 2, 7)}, ValueError, "k_cache has shape"),
    "v_cache is shorter": ({"v_cache": torch.zeros(2, 5, 2, 8)}, ValueError, "v_cache has shape"),
    "heads": ({"q": torch.zeros(2, 1, 3, 8)}, ValueError, "q has 3 heads"),
    "too few entries": ({"q": torch.zeros(3, 1, 4, 8), "k": None, "v": None, "cache_lengths": 2}, ValueError,
                        "k_cache has shape"),
    "no tensor": ({"k_cache": None}, TypeError, "k_cache must be a Tensor, got NoneType"),
    "overfull table": ({"block_table": torch.zeros(2, 0, dtype=torch.int32)}, RuntimeError, "block_table has shape"),
    "page of nothing": ({"block_table": torch.tensor([[0], [2]])}, ValueError, r"block_table has 2 at \(1, 0\)"),
    "negative page": ({"block_table": torch.tensor([[-1], [0]])}, ValueError, r"block_table has -1 at \(0, 0\)"),
    "table and entries": (
        {"block_table": torch.tensor([[0], [1]]), "cache_batch_idx": torch.tensor([0, 1])}, ValueError,
        "cache_batch_idx must be None together with block_table"),
    "float table": ({"block_table": torch.zeros(2, 1)}, TypeError, "block_table has dtype float32"),
    "entry of nothing": ({"cache_batch_idx": torch.tensor([0, 2])}, ValueError, "cache_batch_idx is 2"),
    "padding past the end": ({"cache_leftpad": torch.tensor([2, 0])}, ValueError, "cache_leftpad is 2 for sequence 0"),
    "negative padding": ({"cache_leftpad": torch.tensor([0, -1])}, ValueError, "cache_leftpad is -1"),
    "cos without sin": ({"rotary_cos": torch.zeros(9, 4)}, ValueError, "rotary_cos was given without rotary_sin"),
    "rotary without k": (
        {"k": None, "v": None, "rotary_cos": torch.zeros(9, 4), "rotary_sin": torch.zeros(9, 4)}, ValueError,
        "rotary_cos was given without k and v"),
    "rotary too wide": (
        {"rotary_cos": torch.zeros(9, 5), "rotary_sin": torch.zeros(9, 5)}, ValueError, "rotary_cos has shape"),
    "rotary too short": (
        {"rotary_cos": torch.zeros(5, 4), "rotary_sin": torch.zeros(5, 4)}, ValueError, "positions up to 5"),
    "sin of another shape": (
        {"rotary_cos": torch.zeros(9, 4), "rotary_sin": torch.zeros(9, 3)}, ValueError, "rotary_sin has shape"),
    "interleaved": ({"rotary_interleaved": 2}, TypeError, "rotary_interleaved must be a bool"),
    "window": ({"window": (-2, 0)}, ValueError, "window"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits must be at least 0, got -1"),
    "huge scale": ({"scale": 10**400}, ValueError, "scale must be finite"),
    "scale": ({"scale": NAN}, ValueError, "scale is nan"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "causal": ({"causal": "left"}, ValueError, "causal"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes has shape"),
    "sinks": ({"sinks": torch.zeros(2, 4)}, ValueError, "sinks has shape"),
    "caches overlap": ({"k_cache": SHARED, "v_cache": SHARED}, ValueError, "k_cache overlaps the memory of v_cache"),
    "an expanded cache": ({"k_cache": torch.zeros(1, 6, 2, 8).expand(2, -1, -1, -1)}, ValueError, "k_cache has shape"),
    "k lies in the cache": ({"k_cache": SHARED, "k": SHARED[:, :2]}, ValueError, "k_cache overlaps the memory of k"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "portable"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_write_nothing(name, backend):
    changes, kind, text = WRONG[name]
    call = plain_call(**changes)
    fae.set_backend(backend)
    try:
        with pytest.raises(kind, match=text):
            fae.flash_attention_with_kvcache(**call)
    finally:
        fae.set_backend("auto")
    for cache in (call["k_cache"], call["v_cache"]):
        assert cache is None or not cache.any()


def test_one_cache_for_keys_and_values():
    """Without anything to append, values may be a view of the keys, as in multi-head latent attention."""
    torch.manual_seed(0)
    q, cache = torch.randn(2, 1, 4, 24), torch.randn(2, 50, 1, 24)
    out = fae.flash_attention_with_kvcache(q, cache, cache[..., :16], cache_lengths=50)
    want = fae.flash_attention(q, cache, cache[..., :16], causal=True)
    assert torch.equal(out, want)
