"""Builds and runs tests/cpp/conformance: what the kernels' primitives do, bit by bit.

python -m benchmarks.cuda.conformance              records the card's results beside the emulator's,
                                                   and compares the two
python -m benchmarks.cuda.conformance --emulator   the emulator against its own record
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from .session import ROOT

HOME = ROOT / "tests" / "cpp" / "conformance"
BUILD = ROOT / "build" / "conformance"
INCLUDES = ["-std=c++20", "-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests" / "cpp")]


def compile_command(emulator: bool, program: Path) -> list[str]:
    """With nvcc for a card (sm_80 and PTX for newer ones), else with the system's compiler."""
    main = str(HOME / "main.cpp")
    if emulator:
        sources = sorted(str(file) for file in (ROOT / "csrc" / "cuda" / "emu").glob("*.cpp"))
        return ["c++", "-O1", *INCLUDES, main, *sources, "-o", str(program)]
    targets = [f"-gencode=arch=compute_80,code={code}_80" for code in ("sm", "compute")]
    return ["nvcc", "-O3", *INCLUDES, *targets, "-x", "cu", main, "-o", str(program)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.conformance", description=__doc__)
    parser.add_argument("--emulator", action="store_true")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / ("emulator" if options.emulator else "hardware")
    command = compile_command(options.emulator, program)
    if not shutil.which(command[0]):
        print(f"{command[0]} is not installed")
        return 1
    if code := subprocess.call(command):
        return code
    if not options.emulator and (code := subprocess.call([program, "--record", str(HOME / "hardware.txt")])):
        return code
    return subprocess.call([program, "--check", str(HOME / "emulator.txt")])


if __name__ == "__main__":
    sys.exit(main())
