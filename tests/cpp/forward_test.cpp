// The forward kernels of every ISA against the double oracle.
#include <cmath>

#include "cpu/std_executor.h"
#include "failing_new.h"
#include "kernel_test.h"

namespace fae::testing {
namespace {

FAE_KERNEL_SUITE(Forward);

TEST_P(Forward, MatchesTheOracle) {
  for_each_case([&](const CaseSpec& spec) {
    Case c(spec);
    const ForwardResult wanted = exact_forward(c), got = run_forward(c, GetParam());
    EXPECT_EQ(mismatch(got.out, wanted.out, forward_tolerance(spec.dtype)), "") << "out";
    const DType exact = spec.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    EXPECT_EQ(mismatch(got.lse, wanted.lse, forward_tolerance(exact)), "") << "lse";
    // Rows without keys: exactly 0, not a rounded something.
    for (size_t i = 0; i < wanted.lse.size(); ++i) {
      if (wanted.lse[i] != -INFINITY) continue;
      ASSERT_EQ(got.lse[i], -INFINITY);
      for (int64_t x = 0; x < spec.dim_v; ++x) ASSERT_EQ(got.out[i * size_t(spec.dim_v) + size_t(x)], 0.0);
    }
  });
}

TEST_P(Forward, LseIsOptional) {
  for (DType t : kDTypes) {
    Case c(case_named("group_3", t));
    const ForwardResult with = run_forward(c, GetParam());
    ForwardCall call = c.forward_call();
    call.lse = {};
    c.clear_results();
    cpu::forward(call, cpu::plan_forward(c.problem, GetParam(), 1), cpu::Executor{});
    EXPECT_TRUE(identical(c.out.values(), with.out)) << fae::name_of(t);
  }
}

// How rows are shared out never changes a bit of them.
TEST_P(Forward, DoesNotDependOnBlockQ) {
  for (const char* name :
       {"ragged", "group_3", "causal_wide", "window_causal", "lengths_causal", "mask_full",
        "softcap_bias_mask_causal", "key_blocks", "decode", "intervals", "blocks", "everything"}) {
    for (DType t : kDTypes) {
      Case c(case_named(name, t));
      const ForwardResult whole = run_forward(c, GetParam());
      const int rows = cpu::plan_forward(c.problem, GetParam(), 1).register_rows;
      for (int64_t tiles : {1, 2, 5}) {
        const ForwardResult parts = run_forward(c, GetParam(), 1, tiles * rows);
        EXPECT_TRUE(identical(parts.out, whole.out)) << name << ' ' << fae::name_of(t) << ' ' << tiles;
        EXPECT_TRUE(identical(parts.lse, whole.lse)) << name << ' ' << fae::name_of(t) << ' ' << tiles;
      }
    }
  }
}

TEST_P(Forward, DoesNotDependOnThreads) {
  for_each_case([&](const CaseSpec& spec) {
    Case c(spec);
    const ForwardResult one = run_forward(c, GetParam(), 1);
    for (int threads : {2, 5}) {
      const ForwardResult many = run_forward(c, GetParam(), threads);
      EXPECT_TRUE(identical(many.out, one.out)) << threads;
      EXPECT_TRUE(identical(many.lse, one.lse)) << threads;
    }
  });
}

// Large enough that the planner really uses several threads.
TEST_P(Forward, ManyThreadsOnOneHead) {
  Case c(shape("", 1, 2, 1, 300, 300, 32, 32));
  c.problem.masking.band = make_band(Causal::kBottomRight, -1, -1, 300, 300);
  ASSERT_GT(cpu::plan_forward(c.problem, GetParam(), 4).threads, 1);
  const ForwardResult one = run_forward(c, GetParam(), 1), four = run_forward(c, GetParam(), 4);
  EXPECT_TRUE(identical(four.out, one.out));
  EXPECT_TRUE(identical(four.lse, one.lse));
}

// NaN and Inf in keys and values reach exactly the rows that see them.
TEST_P(Forward, SpecialValuesReachOnlyTheirRows) {
  for (const char* name : {"causal_square", "window_causal", "mask_full", "bias_hides", "lengths_causal",
                           "key_blocks", "group_3", "softcap_bias_mask_causal"}) {
    for (DType t : kDTypes) {
      for (double special : {std::nan(""), double(INFINITY), -double(INFINITY)}) {
        for (bool in_value : {false, true}) {
          SCOPED_TRACE(std::string(name) + " " + fae::name_of(t) + (in_value ? " value " : " key ") +
                       std::to_string(special));
          Case c(case_named(name, t));
          HostTensor& x = in_value ? c.v : c.k;
          for (int64_t key : {int64_t(0), c.spec.seq_kv / 2, c.spec.seq_kv - 1}) {
            x.set(c.spec.batch - 1, 0, key, x.shape()[3] - 1, special);
          }
          const ForwardResult wanted = exact_forward(c), got = run_forward(c, GetParam());
          EXPECT_EQ(mismatch(got.out, wanted.out, forward_tolerance(t)), "");
        }
      }
    }
  }
}

TEST_P(Forward, LargeScoresNeitherOverflowNorVanish) {
  for (double deviation : {30.0, 1e4}) {
    Case c(case_named("group_3", DType::kFloat32));
    c.q.fill_normal(5, deviation);
    c.k.fill_normal(6, deviation);
    const ForwardResult wanted = exact_forward(c), got = run_forward(c, GetParam());
    for (double x : got.out) ASSERT_TRUE(std::isfinite(x));
    if (deviation < 100) {
      EXPECT_EQ(mismatch(got.out, wanted.out, 2e-3), "");
      EXPECT_EQ(mismatch(got.lse, wanted.lse, 1e-6), "");
    }
  }
}

// A whole row at the smallest finite bias is no mask: it gives the mean of V.
TEST_P(Forward, SmallestBiasGivesTheMean) {
  for (DType t : {DType::kFloat32, DType::kFloat64}) {
    CaseSpec spec = case_named("bias_full", t);
    spec.bias_dtype = t;
    Case c(spec);
    const double lowest = t == DType::kFloat32 ? -3.4028234663852886e38 : -1.7976931348623157e308;
    c.bias.fill(lowest);
    const ForwardResult got = run_forward(c, GetParam());
    for (int64_t x = 0; x < spec.dim_v; ++x) {
      double mean = 0;
      for (int64_t j = 0; j < spec.seq_kv; ++j) mean += c.v.get(0, 0, j, x) / double(spec.seq_kv);
      EXPECT_NEAR(got.out[size_t(x)], mean, 1e-5);
    }
  }
}

// Inputs are read, never written.
TEST_P(Forward, LeavesInputsAlone) {
  for (DType t : kDTypes) {
    Case c(case_named("bias_full", t));
    const auto q = c.q.values(), k = c.k.values(), v = c.v.values(), bias = c.bias.values();
    run_forward(c, GetParam(), 2);
    EXPECT_TRUE(identical(c.q.values(), q) && identical(c.k.values(), k) && identical(c.v.values(), v) &&
                identical(c.bias.values(), bias));
  }
}

// Rows behind packed sequences included.
TEST_P(Forward, WritesNothingWithoutMemory) {
  Case c(case_named("packed_causal"));
  cpu::Plan plan = cpu::plan_forward(c.problem, GetParam(), 1);
  plan.worker_bytes = kTooManyBytes;
  c.clear_results();
  EXPECT_THROW(cpu::forward(c.forward_call(), plan, cpu::Executor{}), std::bad_alloc);
  for (double x : c.out.values()) ASSERT_TRUE(std::isnan(x));
  for (double x : c.lse_values()) ASSERT_TRUE(std::isnan(x));
}

// Whole, and in ranges of keys.
TEST_P(Forward, AllocatesNothingInMemoryThatItIsGiven) {
  for (const CaseSpec& spec :
       {case_named("group_3"), case_named("packed_causal"), shape("ranges", 2, 4, 1, 1, 700, 32, 24)}) {
    for (int64_t splits : {0, 2}) {
      SCOPED_TRACE(spec.name + " " + std::to_string(splits));
      Case c(spec);
      const ForwardResult wanted = exact_forward(c);
      const cpu::Plan plan = cpu::plan_forward(c.problem, GetParam(), 1, {0, 0, splits, false});
      if (spec.name == "ranges" && splits) EXPECT_EQ(plan.splits, 2);
      const cpu::PlanMemory memory(plan);
      c.clear_results();
      {
        const FailingNew none_left;
        cpu::forward(c.forward_call(), plan, memory, cpu::Executor{});
      }
      EXPECT_EQ(mismatch(c.out.values(), wanted.out, forward_tolerance(c.spec.dtype)), "");
    }
  }
}

}  // namespace
}  // namespace fae::testing
