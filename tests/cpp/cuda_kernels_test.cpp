// The CUDA kernels against the double oracle, on the host emulator.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "cuda_case.h"
#include "kernel_test.h"

namespace fae::testing {
namespace {

constexpr DType kCudaDTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};

// Every tile size, several tiles of rows and keys, and head dims that fill no tile.
std::vector<CaseSpec> cuda_cases() {
  std::vector<CaseSpec> all = kernel_cases();
  const auto add = [&](CaseSpec s, Causal causal) {
    s.causal = causal;
    s.dlse = true;
    all.push_back(s);
  };
  add(shape("d64", 1, 2, 1, 150, 170, 64, 64), Causal::kBottomRight);
  add(shape("d96", 1, 1, 1, 140, 100, 96, 96), Causal::kNone);
  add(shape("d88", 1, 1, 1, 70, 100, 88, 72), Causal::kTopLeft);
  add(shape("d128", 1, 4, 2, 70, 150, 128, 128), Causal::kBottomRight);
  add(shape("d256", 1, 1, 1, 130, 90, 256, 256), Causal::kBottomRight);
  add(shape("d200", 1, 1, 1, 20, 90, 200, 136), Causal::kNone);
  add(shape("d300", 1, 2, 1, 70, 90, 300, 260), Causal::kBottomRight);
  return all;
}

class CudaKernels : public ::testing::TestWithParam<DType> {};

TEST_P(CudaKernels, ForwardMatchesTheOracle) {
  for (CaseSpec spec : cuda_cases()) {
    SCOPED_TRACE(spec.name);
    spec.dtype = GetParam();
    Case c(spec);
    const ForwardResult wanted = exact_forward(c);
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      EmulatedRun run;
      run.seed = seed;
      const ForwardResult got = run_forward(c, run);
      EXPECT_EQ(mismatch(got.out, wanted.out, forward_tolerance(spec.dtype)), "") << "out";
      EXPECT_EQ(mismatch(got.lse, wanted.lse, forward_tolerance(DType::kFloat32)), "") << "lse";
    }
  }
}

TEST_P(CudaKernels, BackwardMatchesTheOracle) {
  for (CaseSpec spec : cuda_cases()) {
    if (spec.batch * spec.seq_q * spec.seq_kv == 0) continue;
    SCOPED_TRACE(spec.name);
    spec.dtype = GetParam();
    Case c(spec);
    const BackwardResult wanted = exact_backward(c);
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      EmulatedRun run;
      run.seed = seed;
      run.options.deterministic = seed == 3;
      const BackwardResult got = run_backward(c, run);
      const double tolerance = backward_tolerance(spec.dtype);
      EXPECT_EQ(mismatch(got.dq, wanted.dq, tolerance), "") << "dq";
      EXPECT_EQ(mismatch(got.dk, wanted.dk, tolerance), "") << "dk";
      EXPECT_EQ(mismatch(got.dv, wanted.dv, tolerance), "") << "dv";
      EXPECT_EQ(mismatch(got.dbias, wanted.dbias, std::max(tolerance, backward_tolerance(spec.bias_dtype))),
                "")
          << "dbias";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Type, CudaKernels, ::testing::ValuesIn(kCudaDTypes),
                         [](const auto& info) { return std::string(name_of(info.param)); });

}  // namespace
}  // namespace fae::testing
