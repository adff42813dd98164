#!/bin/sh
# Cross-compiles core, CPU kernels and C++ tests for aarch64 and runs them under user-mode
# emulation. Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user googletest cmake
#
#   tests/cpp/run_aarch64.sh [GoogleTest arguments]
#
# AARCH64_CXX, QEMU, GTEST_SOURCE name the tools; BUILD_DIR (default build/cpp_tests_aarch64)
# keeps objects between runs; MAX_JOBS limits compilers.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cxx=${AARCH64_CXX:-aarch64-linux-gnu-g++}
qemu=${QEMU:-qemu-aarch64}
gtest=${GTEST_SOURCE:-/usr/src/googletest}
build=${BUILD_DIR:-$here/../../build/cpp_tests_aarch64}
for tool in "$cxx" "$qemu" cmake; do
  command -v "$tool" >/dev/null || {
    echo "error: $tool was not found (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user googletest cmake)" >&2
    exit 1
  }
done
[ -f "$gtest/CMakeLists.txt" ] || {
  echo "error: no GoogleTest sources in $gtest (Debian, Ubuntu: apt install googletest; or set GTEST_SOURCE)" >&2
  exit 1
}
cmake -S "$here" -B "$build" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$cxx" \
  -DCMAKE_EXE_LINKER_FLAGS=-static -DFAE_GTEST_SOURCE="$gtest" >/dev/null
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" --target fae_tests
exec "$qemu" "$build/fae_tests" --gtest_brief=1 "$@"
