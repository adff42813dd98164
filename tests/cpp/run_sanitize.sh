#!/bin/sh
# Builds the C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer and runs them;
# the first finding ends the run. Debian, Ubuntu: apt install googletest cmake
#
#   tests/cpp/run_sanitize.sh [GoogleTest arguments]
#
# GTEST_SOURCE names GoogleTest's sources; BUILD_DIR (default build/cpp_tests_sanitize)
# keeps objects between runs; MAX_JOBS limits compilers.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
gtest=${GTEST_SOURCE:-/usr/src/googletest}
build=${BUILD_DIR:-$here/../../build/cpp_tests_sanitize}
command -v cmake >/dev/null || {
  echo "error: cmake was not found (Debian, Ubuntu: apt install cmake)" >&2
  exit 1
}
[ -f "$gtest/CMakeLists.txt" ] || {
  echo "error: no GoogleTest sources in $gtest (Debian, Ubuntu: apt install googletest; or set GTEST_SOURCE)" >&2
  exit 1
}
cmake -S "$here" -B "$build" -DFAE_SANITIZE=ON -DFAE_GTEST_SOURCE="$gtest" \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 >/dev/null
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" --target fae_tests
exec "$build/fae_tests" --gtest_brief=1 "$@"
