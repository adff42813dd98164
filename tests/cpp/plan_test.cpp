// What the planner promises, without running anything.
#include <gtest/gtest.h>

#include <cstdint>
#include <random>

#include "cpu/api.h"
#include "cpu/dispatch.h"

namespace fae::cpu {
namespace {

Problem problem(DType t, int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t seq_q, int64_t seq_kv,
                int64_t dim, int64_t dim_v) {
  Problem p;
  p.dtype = t;
  p.batch = batch;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.seq_q = seq_q;
  p.seq_kv = seq_kv;
  p.dim = dim;
  p.dim_v = dim_v;
  return p;
}

// Random sizes, extreme ones included.
template <class Fn>
void for_each_problem(Fn&& fn) {
  std::mt19937 random(2);
  const auto pick = [&](std::initializer_list<int64_t> of) { return of.begin()[random() % of.size()]; };
  for (int round = 0; round < 400; ++round) {
    const DType t = DType(random() % 4);
    const int64_t heads_kv = pick({0, 1, 2, 8});
    Problem p = problem(t, pick({0, 1, 3, 64}), heads_kv * pick({1, 3, 16}), heads_kv,
                        pick({0, 1, 5, 128, 1000, 20000}), pick({0, 1, 63, 64, 700, 20000}),
                        pick({1, 7, 64, 100, 1024}), pick({1, 9, 64, 128, 1024}));
    const Causal causal = Causal(random() % 3);
    p.masking.band = make_band(causal, pick({-1, -1, 0, 100}), pick({-1, -1, 5}), p.seq_q, p.seq_kv);
    for (Isa isa : available_isas()) fn(p, isa);
  }
}

TEST(Plan, ForwardCoversAllRowsWithinSaneMemory) {
  for_each_problem([](const Problem& p, Isa isa) {
    for (int threads : {1, 2, 64}) {
      const Plan plan = plan_forward(p, isa, threads);
      ASSERT_EQ(plan.isa, isa);
      ASSERT_GE(plan.threads, 1);
      ASSERT_LE(plan.threads, threads);
      ASSERT_GT(plan.block_q, 0);
      ASSERT_GT(plan.block_kv, 0);
      ASSERT_EQ(plan.block_kv % plan.register_cols, 0);
      ASSERT_EQ(plan.block_q % plan.register_rows, 0);
      const int64_t units = p.batch * p.heads_kv;
      const int64_t tiles = units ? plan.tasks / units : 0;
      if (p.has_output()) {
        ASSERT_GE(tiles * plan.block_q, p.packed_rows());
        ASSERT_LT((tiles - 1) * plan.block_q, p.packed_rows());
      } else {
        ASSERT_EQ(plan.tasks, 0);
      }
      // O(1) in the lengths: a few blocks per worker.
      ASSERT_LE(plan.worker_bytes, size_t(24) << 20);
      ASSERT_EQ(plan.worker_bytes % 64, 0u);
      ASSERT_GE(plan.flops, 0.0);
    }
  });
}

TEST(Plan, ForwardRoundingDependsOnNeitherThreadsNorRows) {
  for_each_problem([](const Problem& p, Isa isa) {
    const int64_t block_kv = plan_forward(p, isa, 1).block_kv;
    for (int threads : {2, 7}) ASSERT_EQ(plan_forward(p, isa, threads).block_kv, block_kv);
    Problem fewer = p;
    fewer.batch = 1;
    fewer.seq_q = std::min<int64_t>(p.seq_q, 1);
    ASSERT_EQ(plan_forward(fewer, isa, 1).block_kv, block_kv);
  });
}

TEST(Plan, BackwardOrderDoesNotDependOnThreads) {
  for_each_problem([](const Problem& p, Isa isa) {
    const Plan one = plan_backward(p, isa, 1);
    ASSERT_GE(one.chunks, 1);
    ASSERT_GE(one.threads, 1);
    for (int threads : {2, 7, 64}) {
      const Plan many = plan_backward(p, isa, threads);
      ASSERT_EQ(many.block_q, one.block_q);
      ASSERT_EQ(many.block_kv, one.block_kv);
      ASSERT_EQ(many.chunks, one.chunks);
      ASSERT_EQ(many.tasks, one.tasks);
      ASSERT_LE(many.threads, threads);
    }
  });
}

TEST(Plan, AdviceIsRoundedAndBounded) {
  constexpr int64_t kHuge = INT64_MAX;
  for_each_problem([](const Problem& p, Isa isa) {
    for (const Advice& advice :
         {Advice{1, 1}, Advice{7, 200}, Advice{kHuge, kHuge}, Advice{-3, 70}, Advice{50, 0}}) {
      for (bool backward : {false, true}) {
        const auto planned = [&](int threads, const Advice& a) {
          return backward ? plan_backward(p, isa, threads, a) : plan_forward(p, isa, threads, a);
        };
        const Plan own = planned(2, {}), plan = planned(2, advice);
        ASSERT_EQ(plan.block_q % plan.register_rows, 0);
        ASSERT_EQ(plan.block_kv % plan.register_cols, 0);
        ASSERT_GT(plan.block_q, 0);
        ASSERT_GT(plan.block_kv, 0);
        ASSERT_LE(plan.block_q, 4096 + plan.register_rows);
        ASSERT_LE(plan.block_kv, 4096);
        ASSERT_TRUE(advice.block_kv != 0 || plan.block_kv == own.block_kv);
        ASSERT_TRUE(advice.block_kv != 1 || plan.block_kv == plan.register_cols);
        ASSERT_TRUE(advice.block_q != 1 || plan.block_q == plan.register_rows);
        ASSERT_TRUE(advice.block_q > 0 || backward || plan.block_q == own.block_q);
        // dQ sums of the backward pass grow with the rows, whatever the blocks are.
        ASSERT_LE(plan.worker_bytes, (size_t(48) << 20) + (backward ? own.worker_bytes : 0));
        ASSERT_EQ(plan.chunks, own.chunks);
        const Plan one = planned(1, advice);
        ASSERT_EQ(one.block_kv, plan.block_kv);
        ASSERT_TRUE(!backward || one.block_q == plan.block_q);
        if (!backward && p.has_output()) {
          ASSERT_EQ(plan.tasks, p.batch * p.heads_kv * ((p.packed_rows() + plan.block_q - 1) / plan.block_q));
        }
      }
    }
  });
}

TEST(Plan, CountsVisibleWork) {
  const Isa isa = active_isa();
  Problem p = problem(DType::kFloat32, 2, 4, 2, 100, 300, 64, 32);
  const double dense = 2.0 * 2 * 4 * 100 * 300 * (64 + 32);
  EXPECT_EQ(plan_forward(p, isa, 1).flops, dense);
  EXPECT_EQ(plan_backward(p, isa, 1).flops, 2.5 * dense);
  const int32_t lengths[] = {150, 0};
  p.masking.kv_lengths = {lengths, 1, false};
  EXPECT_EQ(plan_forward(p, isa, 1).flops, dense / 4);
  p.masking.kv_lengths = {};
  p.masking.band = make_band(Causal::kBottomRight, 0, -1, 100, 300);
  EXPECT_EQ(plan_forward(p, isa, 1).flops, dense / 300);
}

TEST(Plan, SmallCallsStayOnOneThread) {
  const Problem p = problem(DType::kFloat32, 1, 8, 8, 1, 1, 64, 64);
  EXPECT_EQ(plan_forward(p, active_isa(), 64).threads, 1);
}

// Sizes of which one head's work, or few rows', is worth a second thread.
TEST(Plan, FewHeadsAndFewRowsAreSharedToo) {
  for (Isa isa : available_isas()) {
    EXPECT_EQ(plan_backward(problem(DType::kFloat32, 1, 2, 1, 105, 204, 96, 96), isa, 2).threads, 2);
    EXPECT_EQ(plan_backward(problem(DType::kFloat32, 1, 2, 1, 105, 204, 96, 96), isa, 2).chunks, 4);
    // Two heads occupy two threads: short chunks would only cost.
    EXPECT_EQ(plan_backward(problem(DType::kFloat32, 2, 1, 1, 160, 160, 256, 256), isa, 2).chunks, 1);
    Problem one_query = problem(DType::kFloat32, 2, 3, 3, 1, 160, 128, 128);
    EXPECT_EQ(plan_forward(one_query, isa, 2).threads, 1);
    one_query.k.stride[3] = one_query.v.stride[3] = 1;  // read where they lie: memory is the limit
    EXPECT_EQ(plan_forward(one_query, isa, 2).threads, 2);
  }
}

TEST(Plan, LargeCallsUseAllThreads) {
  for (Isa isa : available_isas()) {
    // One head, many queries; and one query per head of many.
    EXPECT_EQ(plan_forward(problem(DType::kFloat32, 1, 1, 1, 4096, 4096, 64, 64), isa, 8).threads, 8);
    EXPECT_EQ(plan_forward(problem(DType::kFloat32, 8, 8, 8, 1, 4096, 64, 64), isa, 8).threads, 8);
    EXPECT_EQ(plan_backward(problem(DType::kFloat32, 1, 1, 1, 4096, 4096, 64, 64), isa, 8).threads, 8);
  }
}

}  // namespace
}  // namespace fae::cpu
