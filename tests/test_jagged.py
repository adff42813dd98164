"""Nested tensors of layout torch.jagged: packed sequences that know where they begin and end."""

from __future__ import annotations

import pytest
import torch

import flash_attn_ext as fae


class TestJagged:
    """Nested tensors of layout torch.jagged, (batch, seq, heads, dim) or transposed."""

    def leaves(self, lengths=(5, 0, 9)):
        return [
            torch.nested.nested_tensor(
                [torch.randn(n, h, 8) for n in lengths], layout=torch.jagged, requires_grad=True
            )
            for h in (4, 2, 2)
        ]

    @pytest.mark.parametrize("layout", ["bshd", "bhsd"])
    def test_results_and_gradients_are_the_packed_ones(self, layout, extended_target):
        leaves = self.leaves()
        given = leaves if layout == "bshd" else [t.transpose(1, 2) for t in leaves]
        options = dict(causal=True, sinks=torch.randn(4), backend=extended_target.backend, return_lse=True)
        out, lse = fae.flash_attention(*given, layout=layout, **options)
        assert out.layout == torch.jagged and lse.layout == torch.jagged
        values = [t.values().detach().requires_grad_() for t in leaves]
        offsets = leaves[0].offsets()
        flat, flat_lse = fae.flash_attention_varlen(*values, offsets, leaves[1].offsets(), **options)
        out_values = out.values() if layout == "bshd" else out.transpose(1, 2).values()
        assert torch.equal(out_values, flat) and torch.equal(lse.transpose(1, 2).values().mT, flat_lse)
        assert out.shape == given[0].shape
        (out_values.square().sum() + lse.values().sum()).backward()
        for leaf, grad in zip(
            leaves, torch.autograd.grad(flat.square().sum() + flat_lse.sum(), values), strict=True
        ):
            assert torch.equal(leaf.grad.values(), grad)

    def test_the_result_goes_together_with_the_query(self):
        q, k, v = self.leaves()
        assert (fae.flash_attention(q, k, v) + q).shape == q.shape

    def test_wrong_input(self):
        q, k, v = (t.detach() for t in self.leaves())
        dense = torch.randn(3, 9, 2, 8)
        holes = torch.nested.narrow(
            torch.randn(3, 9, 2, 8),
            1,
            torch.zeros(3, dtype=torch.int64),
            torch.tensor([5, 0, 9]),
            layout=torch.jagged,
        )
        other = self.leaves((4, 1, 9))[1].detach()
        for arguments, pattern in [
            ((q, dense, v), "k must be a jagged"), ((q, k, other), "v.*lengths"), ((q, k, holes), "v.*contiguous|holes"),
            ((q.transpose(1, 2), k, v), "q.*axis 1"), ((q, k, v.flatten(2)), "v.*rank 4"), ((dense, k, v), "k.*dense"),
        ]:  # fmt: skip
            with pytest.raises((TypeError, ValueError), match=pattern):
                fae.flash_attention(*arguments)
        with pytest.raises(ValueError, match="out"):
            fae.flash_attention(q, k, v, out=q)

    @pytest.mark.parametrize("backward", [False, True])
    def test_compiled(self, backward):
        """With and without the lengths that a nested tensor may know of its sequences."""
        calls = torch.compile(
            lambda q, k, v: fae.flash_attention(q, k, v, True), fullgraph=True, backend="aot_eager"
        )
        for leaves in (self.leaves(), self.leaves((2, 7, 1))):
            given = [t if backward else t.detach() for t in leaves]
            got, want = calls(*given), fae.flash_attention(*given, True)
            assert torch.equal(got.values(), want.values())
            if backward:
                first, second = (torch.autograd.grad(t.values().square().sum(), leaves) for t in (got, want))
                assert all(torch.equal(a.values(), b.values()) for a, b in zip(first, second, strict=True))
        other = self.leaves((7, 2, 1))[2].detach()  # as many keys in all
        with pytest.raises(RuntimeError, match="v must have the same sequence lengths"):
            calls(*given[:2], other)
