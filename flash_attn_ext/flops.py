"""FLOP formulas of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

As torch counts its own attention: the matrix products of all pairs of a query and a key of one sequence,
masked or not, a multiply-add being two; backward computes the scores once more. The lengths of packed
sequences and of caches count as they are, and at their largest where a traced graph does not know them.

    forward   2 pairs heads_q (dim + dim_v)
    backward  2 pairs heads_q (3 dim + 2 dim_v)
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import operator
import sys
from importlib.machinery import ModuleSpec

from torch import Tensor

from . import _cache_call, ops
from ._options import Options
from ._problem import heads_first

_COUNTER = "torch.utils.flop_counter"


def _is_known(t: Tensor) -> bool:
    """Whether its values can be read."""
    return type(t) is Tensor and t.device.type != "meta"


def _lengths(ends: Tensor, longest: int, of: Tensor) -> list[int]:
    """Those of the packed sequences in `of`; longest: -1 where nobody said."""
    if _is_known(ends):
        return ends.diff().tolist()
    return [longest if longest >= 0 else of.shape[0]] * (ends.shape[0] - 1)


def _pairs_and_heads(q: Tensor, k: Tensor, options: Options) -> tuple[int, int]:
    if options.cu_seqlens_q is None:
        q, k = (heads_first(t, options.layout) for t in (q, k))
        return q.shape[0] * q.shape[2] * k.shape[2], q.shape[1]
    rows = _lengths(options.cu_seqlens_q, options.max_seqlen_q, q)
    keys = _lengths(options.cu_seqlens_k, options.max_seqlen_k, k)
    return sum(map(operator.mul, rows, keys)), q.shape[1]


def _of_attention(operators: ops.Operators) -> None:
    from torch.utils.flop_counter import register_flop_formula

    def forward(q, k, v, *arguments, out_val=None):
        pairs, heads = _pairs_and_heads(q, k, operators.family.read(arguments)[0])
        return 2 * pairs * heads * (q.shape[-1] + v.shape[-1])

    def forward_out(q, k, v, out, *arguments, out_val=None):
        return forward(q, k, v, *arguments)

    def backward(dout, dlse, q, k, v, out, lse, *arguments, out_val=None):
        pairs, heads = _pairs_and_heads(q, k, operators.family.read(arguments)[0])
        return 2 * pairs * heads * (3 * q.shape[-1] + 2 * v.shape[-1])

    of = {operators.attention: forward, operators.forward: forward, operators.backward: backward}
    if operators.forward_out is not None:
        of[operators.forward_out] = forward_out
    for each, formula in of.items():
        register_flop_formula(each.overloadpacket, get_raw=True)(formula)


def _of_cache(*arguments, out_val=None) -> int:
    call = _cache_call.CacheCall(*arguments)
    if call.cu_seqlens_q is None:
        rows = [call.q.shape[1]] * call.q.shape[0]
    else:
        rows = _lengths(call.cu_seqlens_q, call.max_seqlen_q, call.q)
    if call.cache_lengths is None:
        keys = [call.cache_length] * len(rows)
    elif _is_known(call.cache_lengths):
        keys = call.cache_lengths.tolist()
    else:
        pages = 1 if call.block_table is None else call.block_table.shape[1]
        keys = [pages * call.k_cache.shape[1]] * len(rows)
    appended = 0 if call.k is None else call.k.shape[1]
    padding = [0] * len(rows)
    if call.cache_leftpad is not None and _is_known(call.cache_leftpad):
        padding = call.cache_leftpad.tolist()
    pairs = sum(n * (m + appended - p) for n, m, p in zip(rows, keys, padding, strict=True))
    return 2 * pairs * call.q.shape[-2] * (call.q.shape[-1] + call.v_cache.shape[-1])


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for operators in (ops.KERNELS, ops.PORTABLE, ops.KERNELS_EXTENDED, ops.PORTABLE_EXTENDED):
        _of_attention(operators)
    for each in (_cache_call.KERNEL, _cache_call.PORTABLE):
        register_flop_formula(each.overloadpacket, get_raw=True)(_of_cache)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Adds the formulas to torch's registry once that is imported, which takes several times as long as this
    package: it is not for us to import it. A counter copies the registry when it is made."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register
        return spec


def register() -> None:
    """Have every `FlopCounterMode` that is made from now on count this package's operators."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())
