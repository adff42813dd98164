"""The emulator catches faults in the CUDA kernels: each mutation below is a fault put into a copy of their source.

A mutant is compiled with a small driver (tests/cpp/cuda_mutant.cpp) that runs a few problems under a few schedules
and must report a fault of the emulator or a wrong result; of the source as it is, it must report neither.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_cpp import BUILD, build

ROOT = Path(__file__).resolve().parent.parent
CUDA = Path("csrc/cuda")
DRIVER = ROOT / "tests" / "cpp" / "cuda_mutant.cpp"
LIBRARIES = ("fae_cuda_support", "fae_emulator", "fae_cpu")

FORWARD = ("BFloat16", 1)
FORWARD_FP32 = ("float", 1)
SPLIT = ("BFloat16", 2)
KEY_GRAD = ("BFloat16", 3)
QUERY_GRAD = ("BFloat16", 4)
# Those of modified scores; slopes of ALiBi bring the kernel of dQ along.
FORWARD_MOD, KEY_GRAD_MOD = (("BFloat16", number) for number in (5, 7))
KERNELS = {"forward": FORWARD, "forward_fp32": FORWARD_FP32, "split": SPLIT, "key_grad": KEY_GRAD,
           "query_grad": QUERY_GRAD, "forward_mod": FORWARD_MOD, "key_grad_mod": KEY_GRAD_MOD}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """Replaces `old`, the first of its kind in a file, and is caught by `caught`: fault, mismatch, or either."""

    name: str
    kernels: tuple[str, int]
    file: str
    old: str
    new: str
    caught: str = "fault|mismatch"


PIPELINE, FRAG, GMEM, ROWS = (
    f"csrc/cuda/tile/{name}.h" for name in ("pipeline", "frag", "gmem_tile", "rows")
)
SMEM, SCORE, SOFTMAX = (f"csrc/cuda/tile/{name}.h" for name in ("smem_tile", "score", "softmax"))
SCORE_GRAD, SEQUENCE, MASK_CLASS = (
    f"csrc/cuda/tile/{name}.h" for name in ("score_grad", "sequence", "mask_class")
)
FWD, KEY, QUERY = (f"csrc/cuda/sm80/{name}.h" for name in ("forward", "key_grad", "query_grad"))
MASK, PARAMS = "csrc/core/mask.h", "csrc/cuda/params.h"
STATS, ROUND, HEAD = (
    f"csrc/cuda/bwd_aux/{name}.h" for name in ("row_stats", "round_query_grad", "head_grad")
)
MERGE = "csrc/cuda/fwd_aux/merge_partials.h"
DROPOUT = "csrc/cuda/tile/dropout.h"

MUTATIONS = [
    # Synchronisation: what a race detector or a poisoned copy has to see.
    Mutation("no_barrier_per_item", FORWARD, PIPELINE, "    block_barrier();\n", "", "fault"),
    Mutation("no_wait_for_copies", FORWARD, PIPELINE, "    copy_async_wait<kSlots - 2>();\n", "", "fault"),
    Mutation("waits_one_group_short", FORWARD, PIPELINE, "wait<kSlots - 2>", "wait<kSlots - 1>", "fault"),
    Mutation("fills_one_slot_late", FORWARD, PIPELINE, "int fill_ = 0;", "int fill_ = 1;", "fault"),
    Mutation("no_commit_without_loads", FORWARD, PIPELINE, "    copy_async_commit();\n", "", "fault"),
    Mutation("staged_rows_read_too_early", FORWARD, FWD, "    warp_barrier();\n", "", "fault"),
    Mutation("split_stages_too_early", SPLIT, FWD, "    if (kSplit) block_barrier();\n", "", "fault"),
    Mutation("ds_read_too_early", KEY_GRAD, KEY, "    block_barrier();\n    constexpr int kRowWarps", "    constexpr int kRowWarps", "fault"),
    Mutation("dk_staged_too_early", KEY_GRAD, KEY, "    block_barrier();\n    store(dk", "    store(dk", "fault"),
    Mutation("dq_staged_rows_read_too_early", QUERY_GRAD, QUERY, "    warp_barrier();\n    const RowSource<T> target(params_.call.dq", "    const RowSource<T> target(params_.call.dq", "fault"),
    # Operands of matrix instructions.
    Mutation("a_rows_swapped", FORWARD, FRAG, "row + lane_index() % 16, lane", "row + (lane_index() % 16 ^ 8), lane"),
    Mutation("b_transposed", FORWARD, FRAG, "ldmatrix_x4(reg, Tile", "ldmatrix_x4_transposed(reg, Tile"),
    Mutation("b_not_transposed", FORWARD, FRAG, "ldmatrix_x4_transposed(reg, Tile", "ldmatrix_x4(reg, Tile"),
    Mutation("a_registers_swapped", FORWARD, FRAG, "a.reg[1] = pack_pair(T{}, c[2 * step][2]", "a.reg[1] = pack_pair(T{}, c[2 * step][1]"),
    Mutation("swizzle_of_loads", FORWARD, SMEM, "(chunks & kSwizzleMask) * 16)", "(chunks & kSwizzleMask / 2) * 16)"),
    Mutation("odd_rows_unswizzled", FORWARD_FP32, SMEM, "uint32_t(swizzle(1) * 16)", "0u"),
    Mutation("low_part_dropped", FORWARD_FP32, FRAG, "      mma_m16n8k8_tf32(d, a.low, b.high);\n", "", "mismatch"),
    # Tails.
    Mutation("one_row_too_many", FORWARD, GMEM, "inside = r < row_count && c < columns;\n      const Smem", "inside = r <= row_count && c < columns;\n      const Smem"),
    Mutation("one_chunk_too_many", FORWARD, GMEM, "&& c < columns;\n      const Smem", "&& c <= columns;\n      const Smem"),
    Mutation("one_column_too_many", FORWARD, GMEM, "r < row_count && c + e < columns", "r < row_count && c + e <= columns"),
    Mutation("stores_one_row_too_many", FORWARD, GMEM, "if (r >= row_count ||", "if (r > row_count ||", "fault"),
    Mutation("last_keys_taken_for_full", FORWARD, MASK, " && k_end <= kv_length;", ";"),
    # Masks, the softmax and its state.
    Mutation("band_one_key_longer", FORWARD, SCORE, "int(seen.end) - key : *begin", "int(seen.end) - key + 1 : *begin", "mismatch"),
    Mutation("skips_the_last_tile", FORWARD, FWD, "key_end_ = int(keys.end);", "key_end_ = int(keys.end) - 1;", "mismatch"),
    Mutation("no_rescale", FORWARD, SOFTMAX, "out[m][n][e] *= alpha[e / 2];", "out[m][n][e] *= 1;", "mismatch"),
    Mutation("sum_not_rescaled", FORWARD, SOFTMAX, "sum[m][half] * alpha", "sum[m][half]", "mismatch"),
    Mutation("half_of_the_quad_sum", FORWARD, SOFTMAX, "return x + shuffle_xor(x, 2);", "return x;", "mismatch"),
    Mutation("unseen_rows_become_nan", FORWARD, SOFTMAX, "new_max == kHidden ? 0.0f : new_max", "new_max", "mismatch"),
    Mutation("key_tiles_begin_anywhere", FORWARD, FWD, "int(keys.begin) / kTileKV * kTileKV", "int(keys.begin)", "mismatch"),
    # Which row is which, and who does what.
    Mutation("group_remainder_forgotten", FORWARD, ROWS, "unsigned(remainder + r) / unsigned(group)", "unsigned(r) / unsigned(group)"),
    Mutation("lse_of_another_head", FORWARD, FWD, "head_q() + rows_.head(r)", "head_q() + (int(p_.group()) - 1 - rows_.head(r))", "mismatch"),
    Mutation("last_section_too_long", FORWARD, PARAMS, "rest % size, descending", "rest % section, descending"),
    # Gradients.
    Mutation("delta_added", KEY_GRAD, SCORE_GRAD, "(dp[0][n][2 * half] - d.x)", "(dp[0][n][2 * half] + d.x)", "mismatch"),
    Mutation("delta_added_in_dq", QUERY_GRAD, SCORE_GRAD, "(dp[0][n][e] - stats.delta", "(dp[0][n][e] + stats.delta", "mismatch"),
    Mutation("dk_not_scaled", KEY_GRAD, KEY, "kx * scale, ky * scale", "kx, ky", "mismatch"),
    Mutation("dq_added_to_other_rows", KEY_GRAD, KEY, "(first + r) * params_.dim_padded", "(first + (r ^ 8)) * params_.dim_padded", "mismatch"),
    Mutation("unseen_rows_without_lse", KEY_GRAD, STATS, "if (lse == -__builtin_inf())", "if (false)"),
    Mutation("query_range_cut_short", KEY_GRAD, KEY, "int(queries.end) * group", "(int(queries.end) - 1) * group", "mismatch"),
    Mutation("first_query_tile_late", KEY_GRAD, KEY, "int(queries.begin) * group / kTileQ * kTileQ", "int(queries.begin) * group / kTileQ * kTileQ + kTileQ", "mismatch"),
    Mutation("dq_rounded_from_other_column", KEY_GRAD, ROUND, "load_global(sums + c) * scale", "load_global(sums + (c ^ 1)) * scale", "mismatch"),
    # Sinks.
    Mutation("sink_missing_in_lse", FORWARD_MOD, SOFTMAX, "lane_index() % 4 == 0 ? 1.0f : 0.0f", "lane_index() % 4 == 0 ? 0.0f : 0.0f", "mismatch"),
    Mutation("sink_gains_of_blind_rows", KEY_GRAD_MOD, STATS, "(lse != sink || sees_any(params, batch, head_kv, row))", "true", "mismatch"),
    Mutation("head_sums_read_too_early", KEY_GRAD_MOD, HEAD, "    block_barrier();\n    double total", "    double total", "fault"),
    # ALiBi.
    Mutation("alibi_of_wrong_sign", FORWARD_MOD, SCORE, "fmaf(-slope,", "fmaf(slope,", "mismatch"),
    # Dropout.
    Mutation("dropout_one_key_on", FORWARD_MOD, DROPOUT, "uint32_t(words.x[i] >= threshold) << i", "uint32_t(words.x[i] >= threshold) << (i + 1) % 4", "mismatch"),
    Mutation("dropout_transposed_wrongly", KEY_GRAD_MOD, DROPOUT, "<< (turn ^ i)", "<< i", "mismatch"),
    Mutation("dropout_not_reused_in_dq", KEY_GRAD_MOD, SCORE_GRAD, "if (dropout.present()) {", "if (false) {", "mismatch"),
    # Ranges of keys.
    Mutation("ranges_overlap", FORWARD, FWD, "int64_t(tiles) * (range + 1)", "int64_t(tiles) * (range + 2)", "mismatch"),
    Mutation("last_key_of_a_range_twice", FORWARD, FWD, "end < key_end_ ? end : key_end_;", "end + 1 < key_end_ ? end + 1 : key_end_;", "mismatch"),
    Mutation("partials_not_rescaled", FORWARD, MERGE, "merged.out[n] * factors.a", "merged.out[n]", "mismatch"),
    Mutation("sinks_of_every_range", FORWARD_MOD, FWD, " && work_of(opaque(int(block_index()))).range == 0", "", "mismatch"),
    Mutation("slices_of_partials_overlap", SPLIT, FWD, "to.columns + column_v() + 2 * t", "to.columns + 2 * t"),
    # Sequences of their own lengths, masks of ranges, pages.
    Mutation("sequence_begins_late", FORWARD, SEQUENCE, "first_key = int(s.first_key);", "first_key = int(s.first_key) + 1;"),
    Mutation("sequence_without_end", FORWARD, FWD, "sequence.seq_q * int(p_.group())", "int(p_.packed_rows())"),
    Mutation("queries_of_the_next_sequence", KEY_GRAD, KEY, "seeing_queries(sequence.band(), sequence.seq_q", "seeing_queries(sequence.band(), p_.seq_q"),
    Mutation("statistics_overlap", KEY_GRAD, PARAMS, "batch * batch_stride + head_kv", "0 * batch_stride + head_kv"),
    Mutation("page_of_another_sequence", FORWARD, ROWS, "rows.pages.at(rows.entry, ", "rows.pages.at(0, ", "mismatch"),
    Mutation("intervals_wrongly_full", FORWARD, MASK_CLASS, "all &= warp_ballot(!all_here) == 0;", "", "mismatch"),
    Mutation("keys_trimmed_too_far", QUERY_GRAD, MASK_CLASS, "range.end) += front ? chunk : -chunk;", "range.end) += front ? chunk : -chunk - 16;", "mismatch"),
]  # fmt: skip


@functools.cache
def includes_and_libraries() -> tuple[list[str], list[str]]:
    for library in LIBRARIES:
        build(library)
    return [f"-I{ROOT / 'tests' / 'cpp'}"], [str(BUILD / f"lib{name}.a") for name in LIBRARIES]


def run_driver(sources: Path, kernels: tuple[str, int], folder: Path) -> str:
    """What the driver says about kernels compiled from `sources`; nothing when all is well."""
    includes, libraries = includes_and_libraries()
    element, number = kernels
    program = folder / "mutant"
    command = ["g++", "-std=c++20", "-O1", "-w", f"-I{sources / 'csrc'}", *includes, f"-DFAE_TYPE={element}",
               f"-DFAE_KERNELS={number}", str(DRIVER), *libraries, "-lpthread", "-o", str(program)]  # fmt: skip
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert ran.returncode in (0, 1), f"the driver ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    assert bool(ran.stdout) == bool(ran.returncode)
    return ran.stdout


@pytest.mark.parametrize("name", KERNELS)
def test_the_source_as_it_is_has_no_fault(name: str, tmp_path: Path) -> None:
    assert run_driver(ROOT, KERNELS[name], tmp_path) == ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu", "torch", "python", "emu")
    )
    for room in ("cpu", "cuda/emu"):
        (tmp_path / "csrc" / room).symlink_to(ROOT / "csrc" / room)
    target = tmp_path / mutation.file
    text = target.read_text()
    assert mutation.old in text, f"{mutation.file} no longer holds the text that {mutation.name} replaces"
    target.write_text(text.replace(mutation.old, mutation.new, 1))
    report = run_driver(tmp_path, mutation.kernels, tmp_path)
    assert report, "nothing was noticed"
    assert report.split(":")[0] in mutation.caught.split("|"), report


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
