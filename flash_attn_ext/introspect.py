"""What a call would do and why, what it costs, and what this build can do."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from . import _C, _cuda, _errors, dispatch
from ._extended import Arguments, check_dropout, options_of
from ._philox import no_state
from ._problem import heads_first, lse_dtype
from ._run import check_constants, check_types
from .config import AttentionConfig
from .masks import Mask
from .portable import tile_shape


@dataclass(frozen=True)
class Plan:
    """How one attention call is carried out. `str(plan)` is a table for people.

    Attributes:
        backend: "cpu", "cuda", "portable" or "standard".
        kernel: name of the compiled kernel, or of the algorithm. Of several kernels, the one with
            the most work.
        isa: instruction set of the kernel, such as "sm_80"; "torch" where torch's own kernels run.
        block_q, block_kv: query rows (of all heads that share a K/V head) and keys per tile.
        register_tile: rows and columns of the micro-kernel, (0, 0) where torch decides.
        splits: side-by-side pieces per K/V head.
        tasks: units of work that threads draw from; blocks of the grid on CUDA.
        threads: threads that can work at once; of a block on CUDA.
        shared_bytes: shared memory of a block on CUDA; else 0.
        launches: (kernel, blocks) of every launch on CUDA, in their order; else empty.
        notes: what a reader should know, such as why this kernel is slower than another.
        workspace_bytes: memory beyond inputs and outputs.
        flops: matrix-product FLOPs of the tiles that are computed.
        bytes: traffic if every input is read once and every output written once.
        rejected: for each backend that was not chosen, every reason.
    """

    backend: str
    kernel: str
    isa: str
    block_q: int
    block_kv: int
    register_tile: tuple[int, int]
    splits: int
    tasks: int
    threads: int
    workspace_bytes: int
    flops: float
    bytes: float
    rejected: dict[str, list[str]] = field(default_factory=dict)
    shared_bytes: int = 0
    launches: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def arithmetic_intensity(self) -> float:
        """FLOPs per byte; 0 where nothing is read or written."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __str__(self) -> str:
        rows = {
            "backend": self.backend,
            "kernel": f"{self.kernel} ({self.isa})",
            "tile": f"{self.block_q} query rows x {self.block_kv} keys",
        }
        if self.launches:
            grids = (f"{kernel} on {blocks}" for kernel, blocks in self.launches)
            rows["work"] = f"{', '.join(grids)} blocks; of {self.threads} threads each"
            rows["shared memory"] = f"{format_bytes(self.shared_bytes)} of a block"
        else:
            register = " x ".join(map(str, self.register_tile)) if any(self.register_tile) else "torch's"
            rows["register tile"] = register
            rows["work"] = f"{self.tasks} tasks, {self.splits} splits, {self.threads} threads"
        rows |= {
            "workspace": format_bytes(self.workspace_bytes),
            "FLOPs": f"{self.flops:.4g}",
            "traffic": format_bytes(self.bytes),
            "intensity": f"{self.arithmetic_intensity:.1f} FLOP/byte",
        }
        if self.notes:
            rows["note"] = "; ".join(self.notes)
        rows.update({f"not {name}": "; ".join(reasons) for name, reasons in self.rejected.items()})
        return "\n".join(f"{name:<14} {value}" for name, value in rows.items())


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    *,
    scale: float | None = None,
    layout: str = "bshd",
    mask: Tensor | Mask | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
    config: AttentionConfig | None = None,
    out: Tensor | None = None,
    backward: bool = False,
) -> Plan:
    """What `flash_attention` would do with the same arguments, without doing it.

    Args:
        backward: describe the backward pass instead of the forward one.
        Others: as for `flash_attention`; tensors may be on the meta device.

    Raises:
        What `flash_attention` would raise.

    Example:
        >>> q = torch.empty(1, 4096, 8, 64, device="meta")
        >>> print(explain(q, q, q, causal=True))
    """
    dense = None if isinstance(mask, Mask) else mask
    tensors = (dense, bias, kv_lengths, out, alibi_slopes, sinks)
    check_types(q, k, v, tensors, layout, causal, scale, softcap, config)
    check_constants(scale=scale, softcap=softcap)
    config = config or AttentionConfig()
    dropout_p = check_dropout(dropout_p)
    arguments = Arguments(
        causal, scale, layout, mask, bias, window, softcap, alibi_slopes, sinks, kv_lengths, dropout_p
    )
    options = options_of(q, k, arguments, config, draw=no_state)
    request = dispatch.Request.of(q, v, batch_invariant)
    chosen = dispatch.resolve(backend, config.backend, request)
    _errors.check_call(q, k, v, options, out)
    threads = torch.get_num_threads()
    desc = _errors.call_desc(q, k, v, options)
    lengths = options.kv_lengths
    if desc["kv_lengths"] is not None and lengths.device.type == "cpu":
        desc["kv_lengths"] += (lengths.data_ptr(),)  # the plan counts the work that they leave
    blocks = dispatch.blocks(chosen, config, batch_invariant)
    splits = config.num_splits or 0
    native = _C.plan(desc, None, threads, backward, *blocks, splits, batch_invariant)
    rejected = {}
    for name in dispatch.BACKENDS:
        if name not in ("auto", chosen):
            reasons = dispatch.objections(name, request)
            rejected[name] = reasons or [_why_not(name, chosen, backend, config)]
    if chosen in _cuda.BACKENDS:
        native |= _cuda.explain(chosen, q, k, v, options, deterministic, backward, splits, batch_invariant)
    elif chosen != "cpu":
        heads_of = (heads_first(t, options.layout) for t in (q, k))
        native |= _plan_by_torch(chosen, *heads_of, blocks)
    own = {"backend": chosen, "splits": native["chunks"] * native["splits"], "rejected": rejected}
    own |= {f.name: native[f.name] for f in fields(Plan) if f.name in native and f.name not in own}
    return Plan(**own)


def _why_not(name: str, chosen: str, backend: str, config: AttentionConfig) -> str:
    if backend != "auto" or config.backend != "auto":
        return f"backend={chosen!r} was asked for"
    if not dispatch.is_auto():
        return f"{chosen!r} is the default that was set"
    if reason := dispatch.unavailable().get(name):
        return reason
    order = dispatch.BACKENDS
    return f"slower than {chosen!r}" if order.index(name) > order.index(chosen) else "not preferred"


def _plan_by_torch(name: str, q: Tensor, k: Tensor, blocks: tuple[int, int]) -> dict:
    """What differs from the native plan where torch does the work. q, k: (batch, heads, seq, dim)."""
    batch, heads, seq_q, _ = q.shape
    seq_kv = k.shape[2]
    if name == "portable":
        block_q, block_kv = tile_shape(batch * heads, seq_q, seq_kv, *blocks)
        kernel, element = "online softmax", lse_dtype(q).itemsize
    else:
        block_q, block_kv = seq_q, seq_kv
        kernel, element = "unfused", q.dtype.itemsize
    tasks = -(-seq_q // max(1, block_q)) * -(-seq_kv // max(1, block_kv))
    return {
        "kernel": kernel,
        "isa": "torch",
        "register_tile": (0, 0),
        "block_q": block_q,
        "block_kv": block_kv,
        "chunks": 1,
        "splits": 1,
        "tasks": tasks,
        "threads": torch.get_num_threads(),
        # Scores and probabilities of one tile exist together.
        "workspace_bytes": 2 * batch * heads * block_q * block_kv * element,
    }


def format_bytes(count: float) -> str:
    """A size for people: "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a forward pass allocates beyond its inputs."""

    standard_bytes: int  # scores, probabilities and the output
    flash_bytes: int  # the output and one log-sum-exp per row

    @property
    def ratio(self) -> float:
        """How many times more the unfused computation takes."""
        return self.standard_bytes / self.flash_bytes if self.flash_bytes else 1.0

    def __str__(self) -> str:
        standard, flash = format_bytes(self.standard_bytes), format_bytes(self.flash_bytes)
        return f"standard {standard}, flash {flash}, ratio {self.ratio:.1f}"


def estimate_memory(
    batch: int, heads: int, seq_q: int, seq_kv: int, dim: int, dtype: torch.dtype
) -> MemoryEstimate:
    """Memory of one attention forward pass, unfused and flash.

    For backward as much is kept, and 4 bytes a row more of float32, whose LSE is then a float64.

    Args:
        batch, heads, seq_q, seq_kv, dim: sizes, 0 or more.
        dtype: of the inputs.

    Returns: an object with `standard_bytes`, `flash_bytes` and `ratio`. Both count the output;
        standard adds two (batch, heads, seq_q, seq_kv) tensors, flash (batch, heads, seq_q) LSEs.
        A fixed workspace of about a megabyte per thread is left out.

    Raises:
        TypeError, ValueError: an argument that is no size or no dtype.

    Example:
        >>> print(estimate_memory(1, 8, 8192, 8192, 64, torch.float32))
        standard 4.016 GiB, flash 16.25 MiB, ratio 253.0
    """
    sizes = {"batch": batch, "heads": heads, "seq_q": seq_q, "seq_kv": seq_kv, "dim": dim}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
    rows = batch * heads * seq_q
    out = rows * dim * dtype.itemsize
    lse = rows * (8 if dtype == torch.float64 else 4)
    return MemoryEstimate(out + 2 * rows * seq_kv * dtype.itemsize, out + lse)


def build_info() -> dict:
    """How this build was made and what it can do here.

    Returns: a dict with version, compiler, flags, isas (compiled in), cuda (whether it holds CUDA
        kernels), cuda_archs and cuda_head_dims (those that they were compiled for), cuda_note
        (how far they have been tried), cpu_isas (usable here, best first), active_isa, torch and
        backends.

    Example:
        >>> build_info()["active_isa"]
        'avx512bf16'
    """
    return {
        **_C.build_info(),
        "cuda_note": _cuda.MATURITY if _C.build_info()["cuda"] else "",
        "cpu_isas": _C.cpu_isas(),
        "active_isa": _C.active_isa(),
        "torch": torch.__version__,
        "backends": dispatch.available_backends(),
    }
