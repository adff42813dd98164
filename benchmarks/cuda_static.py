"""What can be known of the CUDA kernels' speed without a card: the instruction mix of their main loops.

    python -m benchmarks.cuda_static > docs/cuda_static.md

disassembles the CUDA library of the build (or of --library) with cuobjdump. The main loop of a kernel is the
innermost with the most matrix instructions, counted along the path that a full tile takes: a forward branch
over code without matrix, copy or exponential instructions is taken (masks, rescaling, tails). Kernels for
modified scores count with their softcap, which most calls do not have.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "flash_attn_ext" / "lib" / "libflash_attn_ext_cuda.so"
COMMAND = "python -m benchmarks.cuda_static > docs/cuda_static.md"

FORMULA = """\
Cycles of one of the four parts of an sm_80 processor, for a warp's pass through the loop:

- matrix: 8 per HMMA (16 x 8 x 16 of 16 bits at 256 multiply-adds a cycle, 16 x 8 x 8 of TF32 at 128);
- issue: 1 per instruction;
- FMA and ALU pipes: 2 per instruction (16 lanes each);
- MUFU: 8 per instruction (4 lanes);
- shared memory: 16 per LDSM and LDGSTS of 16 bytes a lane (512 bytes at 128 a cycle, shared by four parts),
  4 per LDS and STS of 4 bytes a lane, in proportion for others.

`share` = matrix / max(all of these): the bound on the share of the tensor peak if warps overlap perfectly.
For fp32, of the peak of TF32; three products make one, so divide by 3 for the share of useful work."""


def find_cuobjdump() -> str | None:
    """On the PATH, in CUDA_HOME, beside /usr/local/cuda, or the one that Triton brings."""
    folders = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if home := os.environ.get("CUDA_HOME"):
        folders.insert(0, str(Path(home) / "bin"))
    folders += [str(Path(entry) / "triton" / "backends" / "nvidia" / "bin") for entry in sys.path]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


@dataclass(frozen=True)
class Kernel:
    """One row of the variants' table, read from a mangled name."""

    room: str
    dtype: str
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, mangled: str) -> Kernel | None:
        found = re.search(
            r"kernel_entryI(?:NS0?_)(?:4sm80)?\d+([A-Za-z]+?)(?:I(NS_8BFloat16E|NS_7Float16E|f)((?:L[ib]\d+E)*))?E",
            mangled,
        )
        if not found:
            return None
        types = {"NS_8BFloat16E": "bfloat16", "NS_7Float16E": "float16", "f": "float32", None: "any"}
        numbers = re.findall(r"L[ib](\d+)E", found.group(3) or "")
        return cls(found.group(1), types[found.group(2)], tuple(int(n) for n in numbers))

    @property
    def name(self) -> str:
        """As the build names it, but for the type: KeyGrad 64 split modified."""
        if len(self.numbers) < 3:
            return " ".join([self.room, *(["modified"] if self.numbers[-1:] == (1,) else [])])
        dim, split, modified = self.numbers
        return " ".join(
            [self.room, str(dim), *(["split"] if split else []), *(["modified"] if modified else [])]
        )

    @property
    def multiplies(self) -> bool:
        return self.room in ("Forward", "KeyGrad", "QueryGrad", "BiasGrad")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    opcode: str  # with its modifiers
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.base == "BRA" else None
        return int(found.group(1), 16) if found else None


def disassemble(library: Path, functions: list[str] | None = None) -> Iterator[tuple[str, list[Instruction]]]:
    """(mangled name, instructions) of each kernel, or of those with these mangled names."""
    tool = find_cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump was not found: set CUDA_HOME")
    command = [tool, "-sass", *(["-fun", ",".join(functions)] if functions else []), str(library)]
    line_of = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
    name, code = "", []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "Function : " in line:
                if code:
                    yield name, code
                name, code = line.split("Function : ")[1].strip(), []
            elif found := line_of.match(line):
                address, predicate, opcode, operands = found.groups()
                code.append(Instruction(int(address, 16), bool(predicate), opcode, operands))
    if code:
        yield name, code


def resources(library: Path) -> dict[str, dict[str, int]]:
    """REG, STACK, LOCAL, ... of each kernel by its mangled name."""
    tool = find_cuobjdump()
    assert tool is not None
    text = subprocess.run(
        [tool, "-res-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        for name, usage in re.findall(r"Function (\S+):\n\s+(.*)", text)
    }


def is_work(i: Instruction) -> bool:
    """Done for every tile; the reciprocals of integer divisions belong to masks."""
    return i.base in ("HMMA", "LDSM", "LDGSTS") or i.opcode.startswith("MUFU.EX2")


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The instructions of one pass through the main loop along a full tile's path; empty without a loop."""
    index = {i.address: n for n, i in enumerate(code)}
    best: tuple[int, int, int, int] | None = None
    for n, instruction in enumerate(code):
        begin = index.get(instruction.target) if instruction.target is not None else None
        if begin is None or begin > n:
            continue
        products = sum(i.base == "HMMA" for i in code[begin : n + 1])
        if products and (best is None or (products, begin - n) > best[:2]):
            best = (products, begin - n, begin, n)
    if best is None:
        return []
    begin, end = best[2:]
    path, n = [], begin
    while n <= end:
        path.append(code[n])
        target = index.get(code[n].target) if code[n].target is not None else None
        skips = target is not None and n < target <= end
        if skips and not any(map(is_work, code[n + 1 : target])):
            n = target
        else:
            n += 1
    return path


def category(i: Instruction) -> str:
    """The column of the table that an instruction counts in."""
    if i.base in ("HMMA", "LDSM", "LDGSTS", "MUFU"):
        return i.base
    if i.base in ("LDS", "STS"):
        return "LDS/STS"
    if i.base in ("LDG", "STG", "RED", "LD", "ST", "LDL", "STL", "LDC", "ULDC"):
        return "memory"
    if i.base in ("FFMA", "FMUL", "FADD", "IMAD"):
        return "FMA"
    if i.base in (
        "BRA",
        "BAR",
        "BSSY",
        "BSYNC",
        "DEPBAR",
        "LDGDEPBAR",
        "WARPSYNC",
        "EXIT",
        "NOP",
        "CALL",
        "RET",
        "VOTE",
        "SHFL",
        "BREAK",
        "YIELD",
        "R2UR",
    ):
        return "control"
    return "ALU"


COLUMNS = ("HMMA", "LDSM", "LDGSTS", "MUFU", "FMA", "ALU", "LDS/STS", "memory", "control")


def shared_cycles(i: Instruction) -> int:
    if i.base in ("LDSM", "LDGSTS"):
        return 16
    if i.base in ("LDS", "STS"):
        return 16 if ".128" in i.opcode else 8 if ".64" in i.opcode else 4
    return 0


def share_of_peak(loop: list[Instruction]) -> float:
    """See FORMULA."""
    n = Counter(map(category, loop))
    matrix = 8 * n["HMMA"]
    busiest = max(matrix, len(loop), 2 * n["FMA"], 2 * n["ALU"], 8 * n["MUFU"], sum(map(shared_cycles, loop)))
    return matrix / busiest if busiest else 0.0


def table(library: Path) -> str:
    """The report in Markdown."""
    used = resources(library)
    rows = []
    for mangled, code in disassemble(library):
        kernel = Kernel.of(mangled)
        # The two 16-bit types differ in one instruction's name.
        if kernel is None or not kernel.multiplies or kernel.dtype == "float16":
            continue
        loop = main_loop(code)
        counts = Counter(map(category, loop))
        usage = used[mangled]
        local = sum(i.base in ("LDL", "STL") for i in loop)
        cells = [f"{kernel.name} {kernel.dtype}", usage["REG"], usage["STACK"], local, len(loop),
                 *(counts[c] for c in COLUMNS), f"{share_of_peak(loop):.0%}"]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    head = ["kernel", "registers", "stack", "LDL/STL", "loop", *COLUMNS, "share"]
    lines = [
        f"<!-- {COMMAND} -->",
        "# Main loops of the CUDA kernels (sm_80)",
        "",
        "Instructions of a warp in one pass through the loop; `stack` in bytes; `LDL/STL`: spills in it.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *sorted(rows),
        "",
        FORMULA,
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    arguments = parser.parse_args()
    if not arguments.library.exists():
        sys.exit(f"error: {arguments.library} does not exist: build with nvcc, or name one with --library")
    print(table(arguments.library))


if __name__ == "__main__":
    main()
