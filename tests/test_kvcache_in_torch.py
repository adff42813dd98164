"""Calls on caches in torch's machinery: writes that autograd hears of, compiled loops of decoding."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import flash_attn_ext as fae


@pytest.fixture(params=["auto", "portable"])
def backend(request):
    fae.set_backend(request.param)
    yield request.param
    fae.set_backend("auto")


def cache() -> list[torch.Tensor]:
    """Keys and values, one new key and value."""
    return [torch.randn(1, n, 2, 4) for n in (8, 8, 1, 1)]


def test_backward_hears_of_appended_keys(backend):
    k_cache, v_cache, k, v = cache()
    factor = torch.randn(1, 8, 2, 4, requires_grad=True)
    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    saved = [
        (factor * k_cache).sum(),
        (factor * v_cache).sum(),
        fae.flash_attention(q, k_cache, v_cache).sum(),
    ]
    fae.flash_attention_with_kvcache(k, k_cache, v_cache, k, v, cache_lengths=0)
    for result in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def test_reading_a_cache_is_no_write(backend):
    k_cache, v_cache, k, _ = cache()
    result = (torch.randn(1, 8, 2, 4, requires_grad=True) * k_cache).sum()
    fae.flash_attention_with_kvcache(k, k_cache, v_cache, cache_lengths=3)
    result.backward()


def test_inference_mode(backend):
    k_cache, v_cache, k, v = cache()
    with torch.inference_mode():
        inside = [t.clone() for t in (k_cache, v_cache)]
        got = fae.flash_attention_with_kvcache(k, *inside, k, v, cache_lengths=5)
    want = fae.flash_attention_with_kvcache(k, k_cache, v_cache, k, v, cache_lengths=5)
    assert torch.equal(got, want) and torch.equal(inside[0], k_cache) and torch.equal(inside[1], v_cache)


@pytest.mark.parametrize("which", [0, 1])
def test_a_lazy_clone_is_written_and_not_its_original(which, backend):
    originals, caches = cache()[:2], cache()[:2]
    q = torch.randn(1, 1, 2, 4)
    for n, x in enumerate(originals):
        caches[n] = torch._lazy_clone(x) if n == which else x.clone()
    before = [x.clone() for x in originals]
    plain = [x.clone() for x in originals]
    got = fae.flash_attention_with_kvcache(q, *caches, q, q, cache_lengths=5)
    want = fae.flash_attention_with_kvcache(q, *plain, q, q, cache_lengths=5)
    assert all(map(torch.equal, originals, before))
    assert torch.equal(got, want) and all(map(torch.equal, caches, plain))


@pytest.mark.parametrize("which", [0, 1])
def test_a_cache_that_requires_grad_is_written_without_grad_only(which, backend):
    k_cache, v_cache, k, v = cache()
    caches = [k_cache, v_cache]
    before = caches[which].requires_grad_().detach().clone()
    with pytest.raises(ValueError, match=["k_cache", "v_cache"][which]):
        fae.flash_attention_with_kvcache(k, *caches, k, v, cache_lengths=0)
    assert torch.equal(caches[which], before)
    fae.flash_attention_with_kvcache(k, *caches, cache_lengths=2)
    with torch.no_grad():
        fae.flash_attention_with_kvcache(k, *caches, k, v, cache_lengths=0)
    assert torch.equal(caches[which][:, :1], [k, v][which])


def test_lengths_that_are_numbers_do_not_compile_again(backend):
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k_cache, v_cache, length):
        return fae.flash_attention_with_kvcache(q, k_cache, v_cache, q, q, cache_lengths=length)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    ours, theirs = torch.zeros(2, 2, 1, 16, 2, 4)
    for length in range(12):
        q = torch.randn(1, 1, 2, 4)
        assert torch.equal(compiled(q, *ours, length), step(q, *theirs, length))
        assert torch.equal(ours, theirs)
    assert counter.frame_count <= 3
    with pytest.raises(Exception, match="cache_lengths"):
        compiled(q, *ours, 16)


def test_longest_sequences_that_are_numbers_do_not_compile_again():
    counter = CompileCounterWithBackend("aot_eager")

    def packed(x, starts, longest):
        return fae.flash_attention_varlen(x, x, x, starts, starts, longest, longest, causal=True)

    compiled = torch.compile(packed, fullgraph=True, backend=counter)
    for n in range(4, 16):
        arguments = (torch.randn(n + 4, 2, 8), torch.tensor([0, 4, 4 + n]), n)
        assert torch.equal(compiled(*arguments), packed(*arguments))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "cache_lengths", "cache_batch_idx"])
def test_some_tensors_without_data(name):
    """The dispatcher would take the call for one that is traced, and give what nobody computed."""
    tensors = dict(
        q=torch.randn(1, 1, 2, 8), k_cache=torch.zeros(1, 4, 2, 8), v_cache=torch.zeros(1, 4, 2, 8),
        k=torch.randn(1, 1, 2, 8), v=torch.randn(1, 1, 2, 8), cache_lengths=torch.tensor([1]),
        cache_batch_idx=torch.tensor([0]),
    )  # fmt: skip
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match="is on device (meta, but q is on cpu|cpu, but q is on meta)"):
        fae.flash_attention_with_kvcache(**tensors)
    every = {name: t.to("meta") for name, t in tensors.items()}
    assert fae.flash_attention_with_kvcache(**every).is_meta
