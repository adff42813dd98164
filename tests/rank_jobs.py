"""What the processes of a `RankPool` are asked to do."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

import flash_attn_ext as fae
from flash_attn_ext import distributed


class LargestResult(TorchFunctionMode):
    """The most elements that a result of a call of torch inside has had, expanded ones apart. harness.py has one
    that sees more, and for which torch loads half of itself: here, in every process."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and 0 not in t.stride():
                self.elements = max(self.elements, t.numel())
        return result


LEAVES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def group_of(ranks: tuple[int, ...] | None) -> dist.ProcessGroup | None:
    """Made once; every process has to ask for it."""
    if ranks is None:
        return None
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks))
    return _groups[ranks]


def attend(
    kind: str, tensors: dict, options: dict, seed: int = 0, group: tuple[int, ...] | None = None
) -> dict:
    """{kind}_attention and its gradients. `tensors`: q, k, v, dout and dlse, and what else of `LEAVES`."""
    process_group = group_of(group)
    if group is not None and dist.get_rank() not in group:
        return {}
    leaves = {n: tensors[n].detach().requires_grad_() for n in LEAVES if n in tensors}
    torch.manual_seed(seed)
    call = getattr(distributed, f"{kind}_attention")
    out, lse = call(**leaves, **options, return_lse=True, group=process_group)
    heads = [(t, tensors[n]) for t, n in ((out, "dout"), (lse, "dlse")) if tensors.get(n) is not None]
    grads = torch.autograd.grad([t for t, _ in heads], list(leaves.values()), [g for _, g in heads])
    assert out.is_contiguous()
    return {"out": out.detach(), "lse": lse.detach()} | {
        f"d{n}": g for n, g in zip(leaves, grads, strict=True)
    }


def strided(kind: str, tensors: dict, options: dict) -> dict:
    """As `attend`, of tensors that are not contiguous."""
    odd = {}
    for name, t in tensors.items():
        if name in ("q", "k", "v", "dout"):
            wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
            wide[..., ::2] = t
            t = wide[..., ::2]
        odd[name] = t
    return attend(kind, odd, options)


def alone(tensors: dict, options: dict) -> bool:
    """Whether a group of one process is the plain call, bit by bit."""
    mine = None
    for rank in range(dist.get_world_size()):
        made = dist.new_group([rank])
        mine = made if rank == dist.get_rank() else mine
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    expected = fae.flash_attention(q, k, v, return_lse=True, **options)
    return all(
        torch.equal(a, b)
        for call in (distributed.ring_attention, distributed.ulysses_attention, distributed.head_parallel_attention)
        for a, b in zip(call(q, k, v, return_lse=True, group=mine, **options), expected, strict=True)
    )  # fmt: skip


def weights(tensors: dict, options: dict, seed: int, places: Tensor) -> Tensor:
    """The weights of ring_attention as its output where value j is the j-th unit vector. `places`: of this
    rank's keys."""
    total = int(places.max()) + 1
    everybody = torch.tensor([total])
    dist.all_reduce(everybody, dist.ReduceOp.MAX)
    units = torch.eye(int(everybody), dtype=tensors["q"].dtype)[places]
    k = tensors["k"]
    v = units[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    torch.manual_seed(seed)
    return distributed.ring_attention(tensors["q"], k, v, **options)


def memory(kind: str, tensors: dict, options: dict) -> dict:
    """What a call keeps for its backward pass, and the most elements of any tensor on the way."""
    leaves = {n: tensors[n].detach().requires_grad_() for n in LEAVES if n in tensors}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    mode = LargestResult()
    with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = getattr(distributed, f"{kind}_attention")(**leaves, **options)
        torch.autograd.grad(out, list(leaves.values()), tensors["dout"])
    pointers = {t.data_ptr() for t in leaves.values()}
    others = sorted(t.numel() for t in kept if t.data_ptr() not in pointers)
    return {"largest": mode.elements, "kept": others}


def events(tensors: dict, options: dict) -> list[str]:
    """What ring_attention does, in its order: "send", "compute" and "wait"."""
    from flash_attn_ext.distributed import _group, _kernels

    log: list[str] = []

    def logged(name, function):
        def call(*arguments, **more):
            log.append(name)
            return function(*arguments, **more)

        return call

    patches = [(_group.Ranks, "start_shift", "send"), (_kernels.Kernels, "forward", "compute"),
               (_group, "wait", "wait")]  # fmt: skip
    saved = [getattr(owner, attribute) for owner, attribute, _ in patches]
    try:
        for (owner, attribute, name), function in zip(patches, saved, strict=True):
            setattr(owner, attribute, logged(name, function))
        distributed.ring_attention(tensors["q"], tensors["k"], tensors["v"], **options)
    finally:
        for (owner, attribute, _), function in zip(patches, saved, strict=True):
            setattr(owner, attribute, function)
    return log


def shard_and_gather(x: Tensor, dim: int, placement: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The part, the whole made of the parts, and the gradient of x when the whole is weighted by 0, 1, 2, ..."""
    x = x.requires_grad_(x.is_floating_point())
    part = distributed.shard_sequence(x, dim, placement=placement)
    whole = distributed.gather_sequence(part, dim, placement=placement)
    grad = None
    if x.requires_grad:
        weight = torch.arange(x.numel(), dtype=x.dtype).view(x.shape)
        (grad,) = torch.autograd.grad(whole, x, weight)
    return part.detach(), whole.detach(), grad


def autocast(tensors: dict) -> dict[str, list[torch.dtype]]:
    """dtypes of out and dq under autocast, of each function."""
    found = {}
    for kind in ("ring", "ulysses", "head_parallel"):
        q, k, v = (tensors[n].float().requires_grad_() for n in ("q", "k", "v"))
        with torch.autocast("cpu", torch.bfloat16):
            out = getattr(distributed, f"{kind}_attention")(q, k, v, causal=True)
        found[kind] = [out.dtype, torch.autograd.grad(out.float().sum(), q)[0].dtype]
    return found


def second_derivatives(kind: str, tensors: dict, options: dict) -> dict[str, Tensor]:
    """Of q, k and v: the gradients of the sum of the squares of their gradients."""
    leaves = {n: tensors[n].detach().requires_grad_() for n in ("q", "k", "v")}
    out = getattr(distributed, f"{kind}_attention")(**leaves, **options)
    first = torch.autograd.grad(out, list(leaves.values()), tensors["dout"], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))
    return {f"d{n}": g for n, g in zip(leaves, second, strict=True)}


def compiled(tensors: dict) -> bool:
    """Whether a compiled function with the call in it gives the same."""
    q, k, v = (tensors[n] for n in ("q", "k", "v"))

    def block(q, k, v):
        return distributed.ring_attention(q * 2, k, v, causal=True) + 1

    return torch.allclose(torch.compile(block, backend="eager")(q, k, v), block(q, k, v))


def transfers(tensors: dict, options: dict) -> list[tuple[int, str]]:
    """Elements and dtype of every tensor that ring_attention sends, forward and backward."""
    from flash_attn_ext.distributed import _group

    sizes: list[tuple[int, str]] = []
    start = _group.Ranks.start_shift

    def logged(self, sent, received, by):
        sizes.extend((t.numel(), str(t.dtype)) for t in sent)
        return start(self, sent, received, by)

    _group.Ranks.start_shift = logged
    try:
        attend("ring", tensors, options)
    finally:
        _group.Ranks.start_shift = start
    return sizes
