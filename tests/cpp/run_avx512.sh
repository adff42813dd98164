#!/bin/sh
# Builds the C++ tests with the AVX-512 kernels made of AVX2 instructions (avx512/emulation.h) and runs them,
# for machines that have no AVX-512; g++ only. Debian, Ubuntu: apt install libgtest-dev cmake
#
#   tests/cpp/run_avx512.sh [GoogleTest arguments]
#
# BUILD_DIR (default build/cpp_tests_avx512) keeps objects between runs; MAX_JOBS limits compilers.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=${BUILD_DIR:-$here/../../build/cpp_tests_avx512}
command -v cmake >/dev/null || {
  echo "error: cmake was not found (Debian, Ubuntu: apt install cmake)" >&2
  exit 1
}
cmake -S "$here" -B "$build" -DFAE_EMULATE_AVX512=ON >/dev/null
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" --target fae_tests
exec "$build/fae_tests" --gtest_brief=1 "$@"
