// Forward passes whose keys are cut into ranges, on the host emulator.
#include <cmath>
#include <limits>

#include "cuda_test.h"
#include "extended_cases.h"

namespace fae::testing {
namespace {

EmulatedRun split_run(int64_t num_splits, uint64_t seed = 1) {
  EmulatedRun run;
  run.seed = seed;
  run.options.num_splits = num_splits;
  return run;
}

void expect_exact(const ForwardResult& got, const ForwardResult& wanted, DType dtype) {
  EXPECT_EQ(mismatch(got.out, wanted.out, forward_tolerance(dtype)), "") << "out";
  EXPECT_EQ(mismatch(got.lse, wanted.lse, forward_tolerance(DType::kFloat32)), "") << "lse";
}

// With two ranges, and with more than many a case has tiles.
void expect_exact(CaseSpec spec, DType dtype) {
  SCOPED_TRACE(spec.name);
  spec.dtype = dtype;
  Case c(spec);
  const ForwardResult wanted = exact_forward(c);
  expect_exact(run_forward(c, split_run(2, 2)), wanted, dtype);
  expect_exact(run_forward(c, split_run(5, 3)), wanted, dtype);
}

FAE_CUDA_SUITE(CudaSplitKeys);

TEST_P(CudaSplitKeys, MatchesTheOracle) {
  for (const CaseSpec& s : kernel_cases()) {
    if (s.dim <= 512) expect_exact(s, GetParam());
  }
}

TEST_P(CudaSplitKeys, MatchesTheOracleExtended) {
  for (const CaseSpec& s : extended_cases()) {
    if (s.seq_kv < 400) expect_exact(s, GetParam());
  }
}

TEST_P(CudaSplitKeys, EveryBucket) {
  for (const int64_t dim : {64, 96, 128, 256, 300}) {
    for (const bool modified : {false, true}) {
      CaseSpec s = shape("bucket", 1, 2, 1, 5, 340, dim, dim - 3);
      s.causal = Causal::kBottomRight;
      s.sinks = modified;
      if (modified) s.dropout_p = 0.3;
      expect_exact(s, GetParam());
    }
  }
}

// What is not finite in one range reaches the rows that see it, and no others.
TEST_P(CudaSplitKeys, SpecialValues) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const char* name : {"causal_square", "mask_full", "sinks_mask", "dropout_causal"}) {
    for (const double special : {std::nan(""), infinity, -infinity}) {
      for (const bool in_values : {false, true}) {
        SCOPED_TRACE(std::string(name) + " " + std::to_string(special) + (in_values ? " in v" : " in k"));
        Case c(case_named(name, GetParam()));
        HostTensor& x = in_values ? c.v : c.k;
        x.set(x.shape()[0] - 1, x.shape()[1] - 1, x.shape()[2] / 2, x.shape()[3] - 1, special);
        const ForwardResult wanted = exact_forward(c);
        expect_exact(run_forward(c, split_run(3)), wanted, GetParam());
      }
    }
  }
}

TEST_P(CudaSplitKeys, OneRangeForBatchInvariance) {
  CaseSpec s = shape("", 2, 4, 2, 5, 340, 64, 64);
  s.dtype = GetParam();
  Case c(s);
  const ForwardResult whole = run_forward(c, split_run(1));
  EmulatedRun run = split_run(4);
  EXPECT_FALSE(identical(run_forward(c, run).out, whole.out)) << "num_splits without effect";
  run.options.batch_invariant = true;
  EXPECT_TRUE(identical(run_forward(c, run).out, whole.out));
}

// Few rows and many keys are cut up without being asked.
TEST_P(CudaSplitKeys, ChosenForDecoding) {
  CaseSpec s = shape("", 1, 8, 2, 1, 1500, 64, 64);
  s.dtype = GetParam();
  Case c(s);
  EXPECT_GT(cuda::plan_forward(c.problem, {}, {}).num_splits, 1);
  const ForwardResult wanted = exact_forward(c);
  expect_exact(run_forward(c, EmulatedRun()), wanted, GetParam());
}

}  // namespace
}  // namespace fae::testing
