"""Times this package against each of torch's SDPA backends on one card, in turn."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_ext as fae

from ..backends import TOLERANCE, additive, band_mask
from ..shapes import Case
from .cases import all_cases, small_cases

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MATH_BYTES = 24 << 30  # scores and probabilities that the math backend may build


class CudaProblem:
    """The tensors of a case, (batch, heads, seq, dim), on `device`."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.dtype = getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.dtype)

        self.q = normal(case.batch, case.heads, case.queries, case.dim)
        self.k = normal(case.batch, case.kv_heads, case.seq, case.dim)
        self.v = normal(case.batch, case.kv_heads, case.seq, case.value_dim)
        self.dout = normal(case.batch, case.heads, case.queries, case.value_dim)
        self.sinks = normal(case.heads) if case.sinks else None
        # Those of a model with so many heads (Press et al., 2022): 2 ** (-8 n / heads).
        ratio = torch.arange(1, case.heads + 1, device=device) / case.heads
        self.slopes = 2.0 ** (-8 * ratio) if case.alibi else None
        self.bias = normal(*case.bias, case.seq, case.seq) if case.bias else None
        self.mask = None
        if case.mask:
            shape = (case.batch, 1, case.seq, case.seq)
            self.mask = torch.rand(shape, generator=generator, device=device) < 0.8
            self.mask[..., 0] = True  # no row without a key: torch's answer there is another
        lengths = case.kv_lengths()
        self.kv_lengths = torch.tensor(lengths, dtype=torch.int32, device=device) if lengths else None
        if case.page:
            self._make_pages()

    def _make_pages(self) -> None:
        """The keys and values in pages, which lie in no order."""
        case = self.case
        pages = -(-case.seq // case.page)
        order = torch.randperm(case.batch * pages, generator=torch.Generator().manual_seed(0))
        self.table = order.view(case.batch, pages).int().to(self.device)
        self.pages = []
        for t in (self.k, self.v):
            rows = F.pad(t.transpose(1, 2), (0, 0, 0, 0, 0, pages * case.page - case.seq))
            paged = torch.empty(batch_of_pages := case.batch * pages, case.page, *rows.shape[2:],
                                dtype=t.dtype, device=self.device)  # fmt: skip
            paged[self.table.long().flatten()] = rows.reshape(batch_of_pages, case.page, *rows.shape[2:])
            self.pages.append(paged)

    def inputs(self, grad: bool) -> list[Tensor]:
        return [t.detach().requires_grad_(grad) for t in (self.q, self.k, self.v)]

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        case = self.case
        if case.page:
            q = q.transpose(1, 2)
            out = fae.flash_attention_with_kvcache(
                q, *self.pages, cache_lengths=case.seq, block_table=self.table
            )
            return out.transpose(1, 2)
        return fae.flash_attention(
            q, k, v, case.causal, layout="bhsd", window=case.window, mask=self.mask, bias=self.bias,
            sinks=self.sinks, alibi_slopes=self.slopes, kv_lengths=self.kv_lengths,
        )  # fmt: skip

    def theirs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        case, mask = self.case, self._torch_mask()
        causal = case.causal and not (case.window or case.alibi)  # else the mask has it
        if case.sinks:  # one more key, of zeros, whose score the mask is
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=bool(case.heads_kv)
        )

    def _torch_mask(self) -> Tensor | None:
        if not hasattr(self, "_mask"):
            self._mask = self.bias if self.mask is None else self.mask
            if self.case.window:
                self._mask = band_mask(self.case).to(self.device)
            elif self.kv_lengths is not None:
                keys = torch.arange(self.case.seq, device=self.device)
                keep = keys[None, None, None, :] < self.kv_lengths[:, None, None, None]
                self._mask = additive(keep, self.dtype)
            elif self.sinks is not None:
                seen = self.sinks.new_zeros(self.q.shape[1], self.case.seq, self.case.seq)
                sinks = self.sinks[:, None, None].expand(-1, self.case.seq, 1)
                self._mask = torch.cat((seen, sinks), -1)[None].to(self.dtype)
            elif self.slopes is not None:
                place = torch.arange(self.case.seq, device=self.device)
                far = (place[:, None] - place).abs()
                band = additive(band_mask(self.case), torch.float32).to(self.device)
                self._mask = (band - self.slopes[:, None, None] * far)[None].to(self.dtype)
        return self._mask

    def timed(self, attend: Callable) -> Callable[[], object]:
        """One forward pass a call, or one backward pass over a graph that is made here."""
        leaves = self.inputs(self.case.backward)
        if not self.case.backward:
            return lambda: attend(*leaves)
        out = attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, self.dout, retain_graph=True)

    def verify(self) -> None:
        """Raises ValueError unless the first K/V head's output and gradients are those of fp32 math."""
        case = self.case
        group = case.heads // case.kv_heads
        got = self._results(self.ours, self.inputs(not case.seq_q), self.dout)
        one = CudaProblem.__new__(CudaProblem)
        one.__dict__.update(self.__dict__)
        one.__dict__.pop("_mask", None)
        for name, heads in (("q", group), ("k", 1), ("v", 1), ("dout", group)):
            setattr(one, name, getattr(self, name)[:1, :heads].float())
        one.bias = None if self.bias is None else self.bias[:1, :group].float()
        one.sinks, one.slopes = (t if t is None else t[:group].float() for t in (self.sinks, self.slopes))
        one.mask = None if self.mask is None else self.mask[:1]
        one.kv_lengths = None if self.kv_lengths is None else self.kv_lengths[:1]
        one.dtype = torch.float32
        with sdpa_kernel(SDPBackend.MATH):
            want = one._results(one.theirs, one.inputs(not case.seq_q), one.dout)
        allowed = TOLERANCE[case.dtype]
        for name, mine, exact in zip(("out", "dq", "dk", "dv"), got, want, strict=False):
            mine = mine[:1, : exact.shape[1]].float()
            error = float((mine - exact).abs().max() / exact.abs().max())
            if not error <= allowed[name != "out"]:
                raise ValueError(f"{case.name}: {name} is off by {error:.2e} of its maximum")

    def _results(self, attend: Callable, leaves: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
        """(out, dq, dk, dv); of few queries `out` alone, as for decoding."""
        out = attend(*leaves)
        if self.case.seq_q:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def _torch_sides(problem: CudaProblem) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every backend of torch that takes the case as it is."""
    case = problem.case
    for name, kind in BACKENDS.items():
        if name == "math" and case.batch * case.heads * case.queries * case.seq * 12 > MATH_BYTES:
            continue

        def call(*leaves: Tensor, kind: SDPBackend = kind) -> Tensor:
            with sdpa_kernel(kind):
                return problem.theirs(*leaves)

        with contextlib.suppress(RuntimeError), torch.set_grad_enabled(case.backward):
            run = problem.timed(call)
            run()
            yield name, run


def event_times(functions: list[Callable[[], object]], budget_s: float) -> list[float]:
    """Best time of one call of each, in seconds, by CUDA events around a few calls, in turn."""

    def sample(fn: Callable[[], object], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    calls = []
    for fn in functions:
        fn()
        calls.append(max(1, min(20, int(2e-3 / max(sample(fn, 2), 1e-6)))))
    best = [float("inf")] * len(functions)
    start = time.perf_counter()
    rounds = 0
    while rounds < 3 or time.perf_counter() - start < budget_s:
        for i, fn in enumerate(functions):
            best[i] = min(best[i], sample(fn, calls[i]))
        rounds += 1
    return best


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float32).to(dtype) for _ in range(2))
    return 2.0 * size**3 / event_times([lambda: a @ b], 0.3)[0]


def copy_bandwidth(count: int = 1 << 30) -> float:
    """Bytes read and written a second."""
    a = torch.empty(count, device="cuda", dtype=torch.float32)
    b = torch.empty_like(a)
    return 2.0 * 4 * count / event_times([lambda: b.copy_(a)], 0.3)[0]


def measure_limits() -> dict:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rates = {name: matmul_rate(getattr(torch, name)) for name in ("bfloat16", "float16", "float32")}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    rates["float32"] /= 3  # three TF32 products make one fp32 product
    return {"matmul_tflops": {k: v / 1e12 for k, v in rates.items()}, "copy_tbytes": copy_bandwidth() / 1e12}


def run_case(case: Case, limits: dict, budget_s: float) -> dict:
    """Verifies, then times one case; raises ValueError when a result is wrong."""
    problem = CudaProblem(case, "cuda")
    problem.verify()
    with torch.set_grad_enabled(case.backward):
        sides = [("ours", problem.timed(problem.ours)), *_torch_sides(problem)]
        seconds = dict(zip((n for n, _ in sides), event_times([f for _, f in sides], budget_s), strict=True))
    ours = seconds.pop("ours")
    best = min(seconds, key=seconds.get)
    flops = case.flops()
    work, limit = flops, limits["matmul_tflops"][case.dtype] * 1e12
    if case.seq_q:  # keys and values are read once
        work, limit = case.key_bytes(), limits["copy_tbytes"] * 1e12
    return {
        "class": case.group,
        "name": case.name,
        "ours_s": ours,
        "torch_s": seconds[best],
        "torch_formulation": best,
        "torch_all_s": seconds,
        "ratio": seconds[best] / ours,
        "plain_ratio": seconds[best] / ours,
        "ours_gflops": flops / ours / 1e9,
        "torch_gflops": flops / seconds[best] / 1e9,
        "share": work / ours / limit,
        "torch_share": work / seconds[best] / limit,
        "goal_ratio": case.goal_ratio,
        "goal_share": case.goal_share,
    }


def launch_overhead(calls: int = 200) -> dict[str, dict[str, float]]:
    """Microseconds of a call of (1, 1, 8, 64) in bf16, as the host sees them, ours and torch's."""

    def call_us(attend: Callable, leaves: list[Tensor]) -> float:
        best = float("inf")
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                attend(*leaves)
            best = min(best, (time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
        return best * 1e6

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fae.flash_attention(q, k, v, layout="bhsd")

    found = {}
    for name, grad in (("no grad", False), ("forward with grad", True)):
        leaves = [torch.randn(1, 1, 8, 64, device="cuda").bfloat16().requires_grad_(grad) for _ in range(3)]
        sides = {"ours": ours, "torch": F.scaled_dot_product_attention}
        found[name] = {side: call_us(attend, leaves) for side, attend in sides.items()}
    return found


def run_all(results: dict, save: Callable[[], None], seconds: float, budget_s: float = 0.4) -> None:
    """Fills results["limits"], ["rows"] and ["void"], saving after each row, until time is up."""
    deadline = time.monotonic() + seconds
    fae.set_backend("cuda")
    results["limits"] = measure_limits()
    results["overhead"] = launch_overhead()
    for case in all_cases():
        if time.monotonic() > deadline:
            results["void"].append(f"{case.name}: no time left")
            continue
        try:
            results["rows"].append(run_case(case, results["limits"], budget_s))
        except Exception as error:  # whatever it is, the other cases are worth their time
            results["void"].append(f"{case.name}: {type(error).__name__}: {error}"[:500])
        torch.cuda.empty_cache()
        save()


def rehearse(results: dict, backend: str) -> None:
    """Every kind of case at emulator size, verified and not timed."""
    fae.set_backend(backend)
    try:
        for case in small_cases():
            try:
                CudaProblem(case, "cpu").verify()
                results["rehearsed"].append(case.name)
            except Exception as error:  # as in run_all
                results["void"].append(f"{case.name}: {type(error).__name__}: {error}"[:500])
    finally:
        fae.set_backend("auto")
