// The backward kernels of every ISA against the double oracle.
#include <algorithm>
#include <cmath>

#include "failing_new.h"
#include "kernel_test.h"

namespace fae::testing {
namespace {

FAE_KERNEL_SUITE(Backward);

// The bias gradient is rounded to the bias's own dtype.
void expect_close(const Case& c, const BackwardResult& got, const BackwardResult& wanted, double tolerance) {
  const double bias_tolerance = std::max(tolerance, backward_tolerance(c.spec.bias_dtype) / 4);
  EXPECT_EQ(mismatch(got.dq, wanted.dq, tolerance), "") << "dq";
  EXPECT_EQ(mismatch(got.dk, wanted.dk, tolerance), "") << "dk";
  EXPECT_EQ(mismatch(got.dv, wanted.dv, tolerance), "") << "dv";
  EXPECT_EQ(mismatch(got.dbias, wanted.dbias, bias_tolerance), "") << "dbias";
  EXPECT_EQ(mismatch(got.dalibi, wanted.dalibi, tolerance), "") << "dalibi";
  EXPECT_EQ(mismatch(got.dsinks, wanted.dsinks, tolerance), "") << "dsinks";
}

bool identical_all(const BackwardResult& a, const BackwardResult& b) {
  return identical(a.dq, b.dq) && identical(a.dk, b.dk) && identical(a.dv, b.dv) &&
         identical(a.dbias, b.dbias) && identical(a.dalibi, b.dalibi) && identical(a.dsinks, b.dsinks);
}

TEST_P(Backward, MatchesTheOracle) {
  for_each_case([&](const CaseSpec& spec) {
    Case c(spec);
    const BackwardResult wanted = exact_backward(c), got = run_backward(c, GetParam());
    double tolerance = backward_tolerance(spec.dtype);
    // Where probabilities are nearly one-hot, rounding of 16-bit out shows in delta.
    if (spec.scale && *spec.scale > 1) tolerance *= 4;
    expect_close(c, got, wanted, tolerance);
  });
}

TEST_P(Backward, DoesNotDependOnThreads) {
  for_each_case([&](const CaseSpec& spec) {
    Case c(spec);
    const BackwardResult one = run_backward(c, GetParam(), 1);
    EXPECT_TRUE(identical_all(run_backward(c, GetParam(), 3), one));
  });
}

// One head, so many rows that they are cut into chunks: the same bits for any threads.
TEST_P(Backward, ChunksOfOneHead) {
  for (DType t : kDTypes) {
    CaseSpec spec = shape("", 1, 2, 1, 420, 410, 16, 24);
    spec.dtype = t;
    spec.causal = Causal::kBottomRight;
    spec.bias = Extent::kPerHead;
    Case c(spec);
    ASSERT_GT(cpu::plan_backward(c.problem, GetParam(), 4).chunks, 1);
    const BackwardResult one = run_backward(c, GetParam(), 1);
    expect_close(c, one, exact_backward(c), backward_tolerance(t));
    EXPECT_TRUE(identical_all(run_backward(c, GetParam(), 4), one)) << fae::name_of(t);
    EXPECT_TRUE(identical_all(run_backward(c, GetParam(), 7), one)) << fae::name_of(t);
  }
}

// Rows whose log-sum-exp is too large to hold the logarithm, one key block or several, rows
// in chunks or not: all keys at the lowest bias share the row.
TEST_P(Backward, WeightsOfFarRowsAddUpToOne) {
  for (DType t : kDTypes) {
    for (int64_t seq_q : {13, 420}) {
      CaseSpec spec = shape("", 1, 2, 1, seq_q, 900, 8, 16);
      spec.dtype = t;
      spec.bias = Extent::kFull;
      spec.dlse = true;
      spec.causal = Causal::kBottomRight;
      Case c(spec);
      for (int64_t row = 2; row < seq_q; row += 3) {
        for (int64_t j = 0; j < 900; ++j) c.bias.set(0, 1, row, j, -3.4028234663852886e38);
      }
      const BackwardResult one = run_backward(c, GetParam(), 1);
      expect_close(c, one, exact_backward(c), backward_tolerance(t));
      EXPECT_TRUE(identical_all(run_backward(c, GetParam(), 3), one)) << fae::name_of(t);
    }
  }
}

// Rows that see nothing, and keys that nobody sees: exactly 0.
TEST_P(Backward, HiddenIsExactlyZero) {
  for (const char* name : {"causal_tall", "lengths", "window_nothing", "mask_nothing", "no_keys"}) {
    for (DType t : kDTypes) {
      SCOPED_TRACE(std::string(name) + " " + fae::name_of(t));
      Case c(case_named(name, t));
      const BackwardResult wanted = exact_backward(c), got = run_backward(c, GetParam());
      const auto check = [&](const std::vector<double>& a, const std::vector<double>& b, int64_t columns) {
        for (size_t row = 0; row < b.size() / size_t(columns); ++row) {
          double size = 0;
          for (size_t x = 0; x < size_t(columns); ++x) size += std::fabs(b[row * size_t(columns) + x]);
          for (size_t x = 0; size == 0 && x < size_t(columns); ++x)
            ASSERT_EQ(a[row * size_t(columns) + x], 0.0) << row;
        }
      };
      check(got.dv, wanted.dv, c.spec.dim_v);
      if (c.spec.name != "lengths") {  // there, a single visible key has gradient 0 up to rounding
        check(got.dq, wanted.dq, c.spec.dim);
        check(got.dk, wanted.dk, c.spec.dim);
      }
    }
  }
}

// A NaN or Inf in q, k, v or dout touches only gradients of the rows and keys that meet it.
TEST_P(Backward, SpecialValuesReachOnlyWhatSeesThem) {
  for (const char* name : {"causal_square", "window_causal", "mask_full", "bias_hides", "lengths_causal",
                           "group_3", "intervals", "blocks", "packed_causal", "sinks_mask"}) {
    for (DType t : kDTypes) {
      for (int which = 0; which < 4; ++which) {
        const char* places[] = {"q", "k", "v", "dout"};
        SCOPED_TRACE(std::string(name) + " " + fae::name_of(t) + " NaN in " + places[which]);
        Case c(case_named(name, t));
        HostTensor* x[] = {&c.q, &c.k, &c.v, &c.dout};
        const int64_t* n = x[which]->shape();
        x[which]->set(n[0] - 1, n[1] - 1, n[2] / 2, n[3] - 1, std::nan(""));
        expect_close(c, run_backward(c, GetParam()), exact_backward(c), backward_tolerance(t));
      }
    }
  }
}

// The directional derivative of <dout, out> by central differences, in float64.
TEST_P(Backward, AgreesWithFiniteDifferences) {
  for (const char* name : {"ragged", "group_3", "causal_wide", "bias_per_batch", "softcap_bias_mask_causal",
                           "everything", "packed_everything"}) {
    SCOPED_TRACE(name);
    CaseSpec spec = case_named(name, DType::kFloat64);
    spec.bias_dtype = DType::kFloat64;
    spec.dlse = false;
    Case c(spec);
    const BackwardResult grad = run_backward(c, GetParam());
    const auto dout = c.dout.values();
    const auto loss = [&] {
      const ForwardResult r = run_forward(c, GetParam());
      double sum = 0;
      for (size_t i = 0; i < dout.size(); ++i) sum += r.out[i] * dout[i];
      return sum;
    };
    const struct {
      HostTensor* x;
      const std::vector<double>* gradient;
    } inputs[] = {{&c.q, &grad.dq},       {&c.k, &grad.dk},          {&c.v, &grad.dv},
                  {&c.bias, &grad.dbias}, {&c.slopes, &grad.dalibi}, {&c.sinks, &grad.dsinks}};
    for (const auto& in : inputs) {
      if (in.x->count() == 0) continue;
      for (int64_t pick = 0; pick < 3; ++pick) {
        const int64_t* n = in.x->shape();
        int64_t flat = (in.x->count() - 1) * pick / 2, rest = flat;
        int64_t at[4];
        for (int i = 3; i >= 0; --i) at[i] = rest % n[i], rest /= n[i];
        const double old = in.x->get(at[0], at[1], at[2], at[3]), step = 1e-5;
        in.x->set(at[0], at[1], at[2], at[3], old + step);
        const double above = loss();
        in.x->set(at[0], at[1], at[2], at[3], old - step);
        const double below = loss();
        in.x->set(at[0], at[1], at[2], at[3], old);
        EXPECT_NEAR((*in.gradient)[size_t(flat)], (above - below) / (2 * step), 1e-7) << flat;
      }
    }
  }
}

TEST_P(Backward, LeavesInputsAlone) {
  for (DType t : kDTypes) {
    Case c(case_named("bias_full", t));
    run_forward(c, GetParam());
    const auto q = c.q.values(), k = c.k.values(), v = c.v.values(), dout = c.dout.values(),
               out = c.out.values();
    run_backward(c, GetParam(), 2);
    EXPECT_TRUE(identical(c.q.values(), q) && identical(c.k.values(), k) && identical(c.v.values(), v) &&
                identical(c.dout.values(), dout) && identical(c.out.values(), out));
  }
}

// Gradients behind packed sequences included, whichever memory it is that cannot be had.
TEST_P(Backward, WritesNothingWithoutMemory) {
  Case c(case_named("packed_everything"));
  run_forward(c, GetParam());
  const cpu::Plan good = cpu::plan_backward(c.problem, GetParam(), 1);
  cpu::Plan workers = good, shared = good;
  workers.worker_bytes = shared.shared_bytes = kTooManyBytes;
  BackwardCall rows = c.backward_call();
  ASSERT_TRUE(rows.dalibi.present());
  rows.lse_count = int64_t(kTooManyBytes / 8);
  const auto expect_nothing = [&](const BackwardCall& call, const cpu::Plan& plan) {
    for (HostTensor* t : {&c.dq, &c.dk, &c.dv}) t->fill(std::nan(""));
    EXPECT_THROW(cpu::backward(call, plan, cpu::Executor{}), std::bad_alloc);
    for (HostTensor* t : {&c.dq, &c.dk, &c.dv}) {
      for (double x : t->values()) ASSERT_TRUE(std::isnan(x));
    }
  };
  expect_nothing(c.backward_call(), workers);
  expect_nothing(c.backward_call(), shared);
  expect_nothing(rows, good);
}

}  // namespace
}  // namespace fae::testing
