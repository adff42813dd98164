// The CUDA kernels against the double oracle, on the host emulator.
#include <cmath>
#include <initializer_list>
#include <random>

#include "cuda_test.h"
#include "extended_cases.h"

namespace fae::testing {
namespace {

// Forward and backward of a case under schedules of different seeds; that of 3 without atomics.
void expect_exact(CaseSpec spec, DType dtype, std::initializer_list<int> seeds = {1, 2, 3}) {
  SCOPED_TRACE(spec.name);
  spec.dtype = dtype;
  Case c(spec);
  const bool differentiable = spec.batch * spec.seq_q * spec.seq_kv > 0;
  const ForwardResult wanted = exact_forward(c);
  const BackwardResult gradients = differentiable ? exact_backward(c) : BackwardResult();
  for (int seed : seeds) {
    SCOPED_TRACE(seed);
    EmulatedRun run;
    run.seed = uint64_t(seed);
    run.options.deterministic = seed == 3;
    if (differentiable) expect_close(c, run_backward(c, run), gradients);
    else run_forward(c, run);
    EXPECT_EQ(mismatch(c.out.values(), wanted.out, forward_tolerance(dtype)), "") << "out";
    EXPECT_EQ(mismatch(c.lse_values(), wanted.lse, forward_tolerance(DType::kFloat32)), "") << "lse";
    // Rows without keys: exactly 0.
    for (size_t i = 0; i < wanted.lse.size(); ++i) {
      if (wanted.lse[i] != -INFINITY) continue;
      for (int64_t x = 0; x < spec.dim_v; ++x) {
        ASSERT_EQ(c.out.values()[i * size_t(spec.dim_v) + size_t(x)], 0.0) << "row " << i;
      }
    }
  }
}

// The cases that every kernel must solve; in parts, so that they can run side by side.
bool is_masked(const CaseSpec& s) { return s.mask != Extent::kNone; }
bool is_modified(const CaseSpec& s) { return s.softcap > 0 || s.bias != Extent::kNone || s.scale; }
bool is_huge(const CaseSpec& s) { return s.dim > 512; }

FAE_CUDA_SUITE(CudaPlain);
TEST_P(CudaPlain, MatchesTheOracle) {
  for (const CaseSpec& s : kernel_cases()) {
    if (!is_masked(s) && !is_modified(s) && !is_huge(s)) expect_exact(s, GetParam());
  }
}

FAE_CUDA_SUITE(CudaMasked);
TEST_P(CudaMasked, MatchesTheOracle) {
  for (const CaseSpec& s : kernel_cases()) {
    if (is_masked(s) && !is_modified(s)) expect_exact(s, GetParam());
  }
}

FAE_CUDA_SUITE(CudaModified);
TEST_P(CudaModified, MatchesTheOracle) {
  for (const CaseSpec& s : kernel_cases()) {
    if (is_modified(s)) expect_exact(s, GetParam());
  }
}

FAE_CUDA_SUITE(CudaLongHeads);
TEST_P(CudaLongHeads, MatchesTheOracle) {
  for (const CaseSpec& s : kernel_cases()) {
    if (is_huge(s)) expect_exact(s, GetParam(), {1});
  }
}

// Every tile size, several tiles of rows and keys, and head dims that fill no tile.
FAE_CUDA_SUITE(CudaBuckets);
TEST_P(CudaBuckets, MatchesTheOracle) {
  const auto check = [](CaseSpec s, Causal causal) {
    s.causal = causal;
    s.dlse = true;
    expect_exact(s, GetParam(), {2, 3});
  };
  check(shape("d64", 1, 2, 1, 150, 170, 64, 64), Causal::kBottomRight);
  check(shape("d96", 1, 1, 1, 140, 100, 96, 96), Causal::kNone);
  check(shape("d88", 1, 1, 1, 70, 100, 88, 72), Causal::kTopLeft);
  check(shape("d128", 1, 4, 2, 70, 150, 128, 128), Causal::kBottomRight);
  check(shape("d256", 1, 1, 1, 130, 90, 256, 256), Causal::kBottomRight);
  check(shape("d200", 1, 1, 1, 20, 90, 200, 136), Causal::kNone);
  check(shape("d300", 1, 2, 1, 70, 90, 300, 260), Causal::kBottomRight);
}

FAE_CUDA_SUITE(CudaExtended);
TEST_P(CudaExtended, MatchesTheOracle) {
  for (const CaseSpec& s : extended_cases()) {
    if (s.seq_kv < 400) expect_exact(s, GetParam(), {2, 3});
  }
}

// Every tile size, with all of it at once.
TEST_P(CudaExtended, EveryBucket) {
  for (const int64_t dim : {64, 96, 128, 256, 300}) {
    CaseSpec s = shape("bucket", 1, 2, 1, 40, 75, dim, dim);
    s.causal = Causal::kBottomRight;
    s.alibi = s.sinks = s.dlse = true;
    s.dropout_p = 0.3;
    s.softcap = dim == 96 ? 2 : 0;
    expect_exact(s, GetParam(), {dim == 128 ? 3 : 2});
  }
}

// Two heads of a batch of three, in problems that nobody chose.
TEST_P(CudaExtended, Products) {
  std::mt19937 random(20261121);
  const auto one_in = [&](unsigned n) { return random() % n == 0; };
  for (int i = 0; i < 9; ++i) {
    CaseSpec s = shape("product", 2, 4, one_in(2) ? 2 : 4, 1 + int64_t(random() % 70),
                       1 + int64_t(random() % 90), 1 + int64_t(random() % 70), 1 + int64_t(random() % 70));
    s.name += std::to_string(i);
    s.causal = one_in(2) ? Causal::kNone : one_in(2) ? Causal::kTopLeft : Causal::kBottomRight;
    if (one_in(3)) s.window_left = 9;
    if (one_in(3)) s.softcap = 2;
    if (one_in(3)) s.mask = Extent::kFull;
    if (one_in(3)) s.bias = Extent::kPerHead, s.bias_hidden = 0.2;
    if (one_in(3)) s.kv_lengths = {s.seq_kv / 2, s.seq_kv};
    s.alibi = one_in(2);
    s.alibi_per_batch = s.alibi && one_in(2);
    s.sinks = !s.alibi || one_in(2);
    s.dropout_p = one_in(2) ? 0.3 : 0;
    s.dlse = one_in(2);
    expect_exact(s, GetParam(), {1 + i % 3});
  }
}

// All of the above are small; the number of blocks and of tiles in a block is not.
FAE_CUDA_SUITE(CudaManyTiles);
TEST_P(CudaManyTiles, MatchesTheOracle) {
  CaseSpec s = shape("many_tiles", 1, 2, 1, 300, 420, 16, 24);
  s.causal = Causal::kBottomRight;
  s.window_left = 200;
  expect_exact(s, GetParam(), {1});
  s = shape("many_heads", 3, 8, 4, 40, 70, 16, 16);
  s.causal = Causal::kTopLeft;
  expect_exact(s, GetParam(), {1});
}

}  // namespace
}  // namespace fae::testing
