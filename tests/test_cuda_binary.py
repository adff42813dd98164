"""What the compiled CUDA kernels consist of: registers, spills, and the instructions of their main loops.

Skipped without the CUDA library of the build, and without cuobjdump.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from benchmarks import cuda_static
from benchmarks.cuda_static import LIBRARY, Instruction, Kernel, category, main_loop, share_of_peak

# The kernels that most calls run, the matrix instructions of a pass through their loop (by the tiles of
# csrc/cuda/sm80/config.h: products x rows x columns x depth of a warp), and the least share of the tensor peak
# that the loop's instructions may allow. The short loops that copy keys out of pages lie on the path that is counted,
# as if every call took them.
LOOPS = {
    ("Forward 64", "bfloat16"): (2 * (2 * 8 * 4), 0.9),
    ("Forward 96", "bfloat16"): (2 * (2 * 4 * 6), 0.8),
    ("Forward 128", "bfloat16"): (2 * (2 * 4 * 8), 0.85),
    ("Forward 64", "float32"): (3 * 2 * (1 * 8 * 8), 0.95),
    ("KeyGrad 64", "bfloat16"): (5 * (1 * 8 * 4), 0.7),
    ("KeyGrad 128", "bfloat16"): (5 * (1 * 4 * 8), 0.68),
    ("QueryGrad 64", "bfloat16"): (3 * (1 * 8 * 4), 0.7),
}


@functools.cache
def usage() -> dict[str, dict[str, int]]:
    if not LIBRARY.exists():
        pytest.skip(f"this build has no {LIBRARY.name}")
    if cuda_static.find_cuobjdump() is None:
        pytest.skip("cuobjdump was not found: set CUDA_HOME")
    return cuda_static.resources(LIBRARY)


@functools.cache
def kernels() -> dict[tuple[str, str], str]:
    """Mangled names by (name, dtype)."""
    found = {Kernel.of(mangled): mangled for mangled in usage()}
    return {(kernel.name, kernel.dtype): mangled for kernel, mangled in found.items() if kernel}


@functools.cache
def code() -> dict[tuple[str, str], list[Instruction]]:
    """Of the kernels in LOOPS that the build has: it may be trimmed to some head dims."""
    wanted = {kernels()[key]: key for key in LOOPS if key in kernels()}
    assert wanted
    return {wanted[mangled]: body for mangled, body in cuda_static.disassemble(LIBRARY, list(wanted))}


def loop_of(key: tuple[str, str]) -> list[Instruction]:
    if key not in kernels():
        pytest.skip("this build is trimmed to other head dims")
    return main_loop(code()[key])


def test_every_kernel_is_recognised() -> None:
    assert all(Kernel.of(mangled) for mangled in usage() if "kernel_entry" in mangled)
    assert {name.split()[0] for name, _ in kernels()} == {
        "Forward", "KeyGrad", "QueryGrad", "BiasGrad", "RowStatsKernel", "RoundQueryGrad",
        "HeadGrad", "UpdateCache", "ClearUnowned", "MergePartials"}  # fmt: skip


def test_registers_and_spills() -> None:
    for key, mangled in kernels().items():
        used = usage()[mangled]
        assert used["REG"] <= 255, key
        assert used["LOCAL"] == 0, key
        assert used["STACK"] == 0, f"{key} spills: {used['STACK']} bytes"


@pytest.mark.parametrize("key", LOOPS, ids=" ".join)
def test_main_loop(key: tuple[str, str]) -> None:
    loop = loop_of(key)
    counts = Counter(map(category, loop))
    products, least = LOOPS[key]
    assert counts["HMMA"] == products
    assert counts["LDSM"] > 0
    assert counts["LDGSTS"] > 0, "the next tiles are loaded while this one is used"
    assert not any(i.base in ("LDL", "STL") for i in loop)
    assert share_of_peak(loop) >= least, dict(counts)


def test_atomics_only_where_they_are_meant() -> None:
    for key in LOOPS:
        if key in kernels():
            atomics = any(i.base in ("RED", "ATOM", "ATOMG") for i in code()[key])
            assert atomics == key[0].startswith("KeyGrad"), key


# The parser itself, on a made-up loop: a head, a mask that a full tile skips, work, and the way back.
def test_path_of_a_full_tile() -> None:
    def body(*lines: tuple[str, str]) -> list[Instruction]:
        return [Instruction(16 * n, False, opcode, operands) for n, (opcode, operands) in enumerate(lines)]

    instructions = body(
        ("MOV", "R1, R2 "), ("HMMA.16816.F32", "R0"), ("BRA", "0x50 "), ("MUFU.RCP", "R3"), ("IADD3", "R4"),
        ("MUFU.EX2", "R5"), ("BRA", "0x80 "), ("LDSM.16.M88.4", "R6"), ("BRA", "0x10 "), ("EXIT", ""))  # fmt: skip
    loop = main_loop(instructions)
    assert [i.base for i in loop] == ["HMMA", "BRA", "MUFU", "BRA", "LDSM", "BRA"]
    assert share_of_peak(loop) == 8 / 16
    assert main_loop(body(("HMMA", "R0"), ("EXIT", ""))) == []
    assert Kernel.of(
        "_ZN3fae4cuda12kernel_entryINS0_4sm807ForwardINS_8BFloat16ELi64ELb0ELb1EEEEEvNT_6ParamsE"
    ) == Kernel("Forward", "bfloat16", (64, 0, 1))
