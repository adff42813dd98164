"""Wrong values of what the extended operators take: found by the validator before anything is written."""

from __future__ import annotations

import pytest
import torch
from test_errors import ANY, Wrong, expect, valid, zeros

import flash_attn_ext as fae
from flash_attn_ext.masks import BlockSparseMask


def blocks(*shape, block_q=2, block_kv=4):
    return BlockSparseMask(zeros(*shape, dtype=torch.bool), block_q, block_kv)


WRONG = [
    Wrong("slopes-shape", dict(alibi_slopes=zeros(3)), argument="alibi_slopes", contains=["(3,)", "(4,)"]),
    Wrong("slopes-batch", dict(alibi_slopes=zeros(3, 4)), argument="alibi_slopes", contains=["(3, 4)"]),
    Wrong("slopes-0d", dict(alibi_slopes=zeros()), argument="alibi_slopes", contains=["()"]),
    Wrong("slopes-rank", dict(alibi_slopes=zeros(2, 4, 1)), argument="alibi_slopes", contains=["(2, 4, 1)"]),
    Wrong("slopes-int", dict(alibi_slopes=zeros(4, dtype=torch.int64)), TypeError, "alibi_slopes", ["int64"]),
    Wrong("slopes-complex", dict(alibi_slopes=zeros(4, dtype=torch.complex64)), TypeError, "alibi_slopes", ["complex64"]),
    Wrong("slopes-list", dict(alibi_slopes=[1.0]), TypeError, "alibi_slopes", ["list"]),
    Wrong("slopes-meta", dict(alibi_slopes=zeros(4, device="meta")), ANY, "alibi_slopes", ["meta"]),
    Wrong("sinks-shape", dict(sinks=zeros(2)), argument="sinks", contains=["(2,)", "(4,)"]),
    Wrong("sinks-batch", dict(sinks=zeros(2, 4)), argument="sinks", contains=["(2, 4)"]),
    Wrong("sinks-0d", dict(sinks=zeros()), argument="sinks", contains=["()"]),
    Wrong("sinks-int", dict(sinks=zeros(4, dtype=torch.int32)), TypeError, "sinks", ["int32"]),
    Wrong("sinks-float", dict(sinks=0.5), TypeError, "sinks", ["float"]),
    Wrong("sinks-meta", dict(sinks=zeros(4, device="meta")), ANY, "sinks", ["meta"]),
    Wrong("blocks-keys", dict(mask=blocks(3, 3)), argument="mask", contains=["(3, 3)"]),
    Wrong("blocks-queries", dict(mask=blocks(2, 2)), argument="mask", contains=["(2, 2)"]),
    Wrong("blocks-elements", dict(mask=blocks(5, 7)), argument="mask", contains=["(5, 7)"]),
    Wrong("blocks-heads", dict(mask=blocks(3, 3, 2)), argument="mask", contains=["(3, 3, 2)"]),
    Wrong("with-wrong-k", dict(sinks=zeros(4), k=zeros(2, 7, 3, 8)), argument=("q", "k"), contains=["(2, 7, 3, 8)"]),
    Wrong("with-wrong-bias", dict(sinks=zeros(4), bias=zeros(4, 7)), argument="bias", contains=["(4, 7)"]),
    Wrong("with-wrong-scale", dict(sinks=zeros(4), scale=float("nan")), argument="scale", contains=["nan"]),
    Wrong("with-scale-with-gradient", dict(sinks=zeros(4), scale=torch.ones((), requires_grad=True)), TypeError, "scale", ["constant"]),
    Wrong("with-wrong-window", dict(sinks=zeros(4), window=(-2, 0)), argument="window", contains=["-2"]),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.name)
def test_wrong_input(wrong, backend):
    arguments = {**valid(), **wrong.changes}
    expect(wrong, lambda: fae.flash_attention(**arguments, backend=backend))
    out = zeros(2, 5, 4, 6).fill_(3.0)
    expect(wrong, lambda: fae.flash_attention(**arguments, out=out, backend=backend))
    assert torch.equal(out, torch.full_like(out, 3.0)), "written before raising"
    expect(wrong, lambda: fae.explain(**arguments, backend=backend))


def packed() -> dict:
    """Two sequences, of 2 and 3 queries and 3 and 4 keys."""
    return dict(
        q=torch.randn(5, 4, 8), k=torch.randn(7, 2, 8), v=torch.randn(7, 2, 6),
        cu_seqlens_q=torch.tensor([0, 2, 5]), cu_seqlens_k=torch.tensor([0, 3, 7]),
    )  # fmt: skip


WRONG_PACKED = [
    Wrong("q-rank", dict(q=zeros(1, 5, 4, 8)), argument="q", contains=["(1, 5, 4, 8)"]),
    Wrong("k-rank", dict(k=zeros(7, 8)), argument="k", contains=["(7, 8)"]),
    Wrong("v-total", dict(v=zeros(6, 2, 6)), argument="v", contains=["(6, 2, 6)"]),
    Wrong("heads", dict(k=zeros(7, 3, 8), v=zeros(7, 3, 6)), argument=("q", "k"), contains=["(7, 3, 8)"]),
    Wrong("cu-rank", dict(cu_seqlens_q=zeros(1, 3, dtype=torch.int32)), argument="cu_seqlens_q", contains=["(1, 3)"]),
    Wrong("cu-empty", dict(cu_seqlens_k=zeros(0, dtype=torch.int32)), argument=("cu_seqlens_q", "cu_seqlens_k"), contains=["(0,)"]),
    Wrong("cu-batch", dict(cu_seqlens_k=torch.tensor([0, 7])), argument=("cu_seqlens_q", "cu_seqlens_k"), contains=["(2,)"]),
    Wrong("cu-float", dict(cu_seqlens_q=zeros(3)), TypeError, "cu_seqlens_q", ["float32"]),
    Wrong("cu-meta", dict(cu_seqlens_q=zeros(3, dtype=torch.int32, device="meta")), ANY, "cu_seqlens_q", ["meta"]),
    Wrong("slopes", dict(alibi_slopes=zeros(3, 4)), argument="alibi_slopes", contains=["(3, 4)"]),
    Wrong("softcap-with-gradient", dict(softcap=torch.ones((), requires_grad=True)), TypeError, "softcap", ["constant"]),
    Wrong("lengths", dict(kv_lengths=zeros(3, dtype=torch.int32)), argument="kv_lengths", contains=["(3,)"]),
    Wrong("mask", dict(mask=zeros(2, 1, 2, 4, dtype=torch.bool), max_seqlen_q=3, max_seqlen_k=4), argument="mask", contains=["(2, 1, 2, 4)"]),
    Wrong("bias", dict(bias=zeros(3, 4, 3, 4), max_seqlen_q=3, max_seqlen_k=4), argument="bias", contains=["(3, 4, 3, 4)"]),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_PACKED, ids=lambda w: w.name)
def test_wrong_packed_input(wrong, backend):
    arguments = {**packed(), **wrong.changes}
    expect(wrong, lambda: fae.flash_attention_varlen(**arguments, backend=backend))
    out = zeros(5, 4, 6).fill_(3.0)
    expect(wrong, lambda: fae.flash_attention_varlen(**arguments, out=out, backend=backend))
    assert torch.equal(out, torch.full_like(out, 3.0)), "written before raising"


def test_the_packed_call_is_valid(backend):
    assert fae.flash_attention_varlen(**packed(), backend=backend).shape == (5, 4, 6)


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_out_that_overlaps_an_option(name, backend):
    storage = torch.zeros(1000)
    with pytest.raises(ValueError, match=rf"\bout\b.*\b{name}\b"):
        fae.flash_attention(
            **valid(), **{name: storage[238:242]}, out=storage[:240].view(2, 5, 4, 6), backend=backend
        )
    assert not storage.any()
