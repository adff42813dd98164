// NaN and infinities in the CUDA kernels' inputs, on the host emulator.
#include <cmath>
#include <limits>

#include "cuda_test.h"

namespace fae::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const double kSpecials[] = {std::nan(""), kInfinity, -kInfinity};

// Sets an element of the last batch's row in the middle, and for keys the first and last row too.
void spoil(HostTensor& x, double special, bool every_third) {
  const int64_t* n = x.shape();
  for (int64_t row : {int64_t(0), n[2] / 2, n[2] - 1}) {
    if (every_third || row == n[2] / 2) x.set(n[0] - 1, n[1] - 1, row, n[3] - 1, special);
  }
}

// Problems that hide keys from rows in every way, and one of several key tiles.
constexpr const char* kHiding[] = {"causal_square", "window_causal",     "mask_full",
                                   "bias_hides",    "lengths_causal",    "softcap_bias_mask_causal",
                                   "sinks_mask",    "alibi_softcap_bias"};

FAE_CUDA_SUITE(CudaSpecialForward);

// What a row does not see does not reach it; what it sees does as in exact arithmetic.
TEST_P(CudaSpecialForward, ReachesOnlyTheRowsThatSeeIt) {
  std::vector<std::string> names(std::begin(kHiding), std::end(kHiding));
  names.insert(names.end(), {"group_3", "key_blocks", "ragged", "dropout_causal"});
  for (const std::string& name : names) {
    for (double special : kSpecials) {
      for (int which = 0; which < 3; ++which) {
        const char* const places[] = {"q", "k", "v"};
        SCOPED_TRACE(name + " " + std::to_string(special) + " in " + places[which]);
        Case c(case_named(name, GetParam()));
        HostTensor* const inputs[] = {&c.q, &c.k, &c.v};
        spoil(*inputs[which], special, which > 0);
        const ForwardResult wanted = exact_forward(c), got = run_forward(c, EmulatedRun());
        EXPECT_EQ(mismatch(got.out, wanted.out, forward_tolerance(GetParam())), "") << "out";
        EXPECT_EQ(mismatch(got.lse, wanted.lse, forward_tolerance(DType::kFloat32)), "") << "lse";
      }
    }
  }
}

// Keys that nobody sees may hold anything: not a bit changes.
TEST_P(CudaSpecialForward, HiddenKeysMayHoldAnything) {
  CaseSpec spec = shape("", 2, 4, 2, 40, 90, 64, 64);
  spec.dtype = GetParam();
  spec.kv_lengths = {70, 33};
  Case clean(spec);
  const ForwardResult wanted = run_forward(clean, EmulatedRun());
  for (double special : kSpecials) {
    Case c(spec);
    for (HostTensor* x : {&c.k, &c.v}) {
      for (int64_t b = 0; b < 2; ++b) {
        for (int64_t h = 0; h < 2; ++h) {
          for (int64_t j = spec.kv_lengths[size_t(b)]; j < spec.seq_kv; ++j) {
            for (int64_t d = 0; d < 64; ++d) x->set(b, h, j, d, special);
          }
        }
      }
    }
    const ForwardResult got = run_forward(c, EmulatedRun());
    EXPECT_TRUE(identical(got.out, wanted.out)) << special;
    EXPECT_TRUE(identical(got.lse, wanted.lse)) << special;
  }
}

// Head dims that are cut into slices take other paths to the same rules.
TEST_P(CudaSpecialForward, SlicesOfLongHeads) {
  CaseSpec spec = shape("", 1, 1, 1, 20, 70, 272, 264);
  spec.dtype = GetParam();
  spec.causal = Causal::kTopLeft;
  for (int which = 0; which < 2; ++which) {
    Case c(spec);
    (which ? c.v : c.k).set(0, 0, 12, 261, kInfinity);
    const ForwardResult wanted = exact_forward(c), got = run_forward(c, EmulatedRun());
    EXPECT_EQ(mismatch(got.out, wanted.out, forward_tolerance(GetParam())), "") << which;
    EXPECT_EQ(mismatch(got.lse, wanted.lse, forward_tolerance(DType::kFloat32)), "") << which;
  }
}

TEST_P(CudaSpecialForward, LargeScoresNeitherOverflowNorVanish) {
  for (double deviation : {30.0, 1e4}) {
    Case c(case_named("group_3", GetParam()));
    c.q.fill_normal(5, deviation);
    c.k.fill_normal(6, deviation);
    for (double x : run_forward(c, EmulatedRun()).out) ASSERT_TRUE(std::isfinite(x)) << deviation;
  }
}

// A whole row at the smallest finite bias is no mask: it gives the mean of V.
TEST_P(CudaSpecialForward, SmallestBiasGivesTheMean) {
  for (DType bias : {DType::kFloat32, DType::kFloat64}) {
    CaseSpec spec = case_named("bias_full", GetParam());
    spec.bias_dtype = bias;
    Case c(spec);
    c.bias.fill(bias == DType::kFloat32 ? -3.4028234663852886e38 : -1.7976931348623157e308);
    const ForwardResult got = run_forward(c, EmulatedRun());
    for (int64_t x = 0; x < spec.dim_v; ++x) {
      double mean = 0;
      for (int64_t j = 0; j < spec.seq_kv; ++j) mean += c.v.get(0, 0, j, x) / double(spec.seq_kv);
      EXPECT_NEAR(got.out[size_t(x)], mean, forward_tolerance(GetParam())) << x;
    }
  }
}

FAE_CUDA_SUITE(CudaSpecialBackward);

TEST_P(CudaSpecialBackward, ReachesOnlyWhatSeesIt) {
  bool deterministic = false;
  for (const char* name : kHiding) {
    for (int which = 0; which < 4; ++which) {
      const char* const places[] = {"q", "k", "v", "dout"};
      SCOPED_TRACE(std::string(name) + " NaN in " + places[which] + (deterministic ? ", ordered" : ""));
      Case c(case_named(name, GetParam()));
      HostTensor* const inputs[] = {&c.q, &c.k, &c.v, &c.dout};
      spoil(*inputs[which], std::nan(""), false);
      EmulatedRun run;
      run.options.deterministic = deterministic;
      expect_close(c, run_backward(c, run), exact_backward(c));
      deterministic = !deterministic;
    }
    deterministic = !deterministic;  // every input both ways
  }
}

// What is finite in exact arithmetic is so here, and the same. Whether the rest is NaN or infinite,
// or was taken for hidden (a score of -inf), depends on the order of operations.
TEST_P(CudaSpecialBackward, InfinitiesReachOnlyWhatSeesThem) {
  for (int which = 0; which < 4; ++which) {
    for (double special : {kInfinity, -kInfinity}) {
      const char* const places[] = {"q", "k", "v", "dout"};
      SCOPED_TRACE(std::to_string(special) + " in " + places[which]);
      Case c(case_named("causal_square", GetParam()));
      HostTensor* const inputs[] = {&c.q, &c.k, &c.v, &c.dout};
      spoil(*inputs[which], special, false);
      const BackwardResult wanted = exact_backward(c);
      BackwardResult got = run_backward(c, EmulatedRun());
      const auto forgive = [](std::vector<double>& x, const std::vector<double>& exact) {
        size_t finite = 0;
        for (size_t i = 0; i < x.size(); ++i) {
          if (std::isfinite(exact[i])) ++finite;
          else x[i] = exact[i];
        }
        return finite;
      };
      const size_t left =
          forgive(got.dq, wanted.dq) + forgive(got.dk, wanted.dk) + forgive(got.dv, wanted.dv);
      EXPECT_GT(left, 500u);
      expect_close(c, got, wanted);
    }
  }
}

// Keys that nobody sees may hold anything: the other gradients keep their bits, theirs are 0.
TEST_P(CudaSpecialBackward, HiddenKeysMayHoldAnything) {
  CaseSpec spec = shape("", 2, 4, 2, 40, 90, 64, 64);
  spec.dtype = GetParam();
  spec.kv_lengths = {70, 33};
  EmulatedRun run;
  run.options.deterministic = true;
  Case clean(spec);
  const BackwardResult wanted = run_backward(clean, run);
  Case c(spec);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t j = spec.kv_lengths[size_t(b)]; j < spec.seq_kv; ++j) {
      c.k.set(b, 1, j, 3, kInfinity);
      c.v.set(b, 0, j, 60, std::nan(""));
    }
  }
  EXPECT_TRUE(identical_all(run_backward(c, run), wanted));
}

}  // namespace
}  // namespace fae::testing
