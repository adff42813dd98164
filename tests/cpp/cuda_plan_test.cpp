// What the CUDA planner chooses, without running anything.
#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <string>
#include <tuple>

#include "cuda/api.h"

namespace fae::cuda {
namespace {

constexpr DType kDTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
constexpr int64_t kSmall = 99 * 1024, kLarge = 163 * 1024;  // shared memory of a block: sm_86, sm_80
constexpr int64_t kMost = std::numeric_limits<int>::max();

Problem problem(DType dtype, int64_t dim, int64_t dim_v = 0) {
  Problem p;
  p.dtype = dtype;
  p.batch = 2;
  p.heads_q = 6;
  p.heads_kv = 2;
  p.seq_q = 70;
  p.seq_kv = 300;
  p.dim = dim;
  p.dim_v = dim_v ? dim_v : dim;
  p.score.scale = 0.125;
  return p;
}

Device device(int64_t shared_bytes) {
  Device d;
  d.shared_bytes = shared_bytes;
  return d;
}

Plan backward_plan(const Problem& p, int64_t shared_bytes, bool deterministic = false) {
  Options options;
  options.deterministic = deterministic;
  return plan_backward(p, device(shared_bytes), options);
}

TEST(CudaBlockOrder, EveryPlaceOnce) {
  for (int64_t tiles : {1, 2, 3, 7, 64}) {
    for (int64_t units : {1, 2, 5, 12, 17}) {
      for (int64_t section : {1, 2, 3, 5, 17, 100}) {
        for (bool descending : {false, true}) {
          const BlockOrder order{tiles, units, section, descending};
          ASSERT_EQ(order.blocks(), tiles * units);
          std::set<std::pair<int64_t, int64_t>> seen;
          int64_t last_section = 0, last_rank = 0;
          for (int64_t block = 0; block < order.blocks(); ++block) {
            const BlockOrder::Place place = order.place(block);
            ASSERT_TRUE(place.unit >= 0 && place.unit < units && place.tile >= 0 && place.tile < tiles);
            seen.insert({place.unit, place.tile});
            // Section by section, and in a section tile by tile, from the dear end.
            const int64_t its_section = place.unit / section;
            const int64_t rank = descending ? tiles - 1 - place.tile : place.tile;
            ASSERT_TRUE(its_section > last_section || (its_section == last_section && rank >= last_rank));
            last_section = its_section;
            last_rank = rank;
          }
          ASSERT_EQ(int64_t(seen.size()), order.blocks()) << tiles << ' ' << units << ' ' << section;
        }
      }
    }
  }
}

TEST(CudaBlockOrder, NumbersBeyond32Bits) {
  const BlockOrder order{int64_t(1) << 22, int64_t(1) << 16, 3, true};
  EXPECT_EQ(order.blocks(), int64_t(1) << 38);
  for (int64_t block : {int64_t(0), order.blocks() / 3, order.blocks() - 1}) {
    const BlockOrder::Place place = order.place(block);
    const int64_t first = place.unit / 3 * 3, size = std::min<int64_t>(order.units - first, 3);
    EXPECT_EQ(first * order.tiles + (order.tiles - 1 - place.tile) * size + place.unit - first, block);
  }
}

TEST(CudaVariants, OneRowEach) {
  std::set<std::tuple<Pass, DType, int, bool, bool>> rows;
  for (const Variant& v : variants()) {
    SCOPED_TRACE(std::string(name_of(v.pass)) + " " + name_of(v.dtype) + " " + std::to_string(v.dim));
    EXPECT_TRUE(rows.insert({v.pass, v.dtype, v.dim, v.split, v.modified}).second);
    EXPECT_TRUE(v.threads > 0 && v.threads <= 1024 && v.threads % 32 == 0);
    EXPECT_LE(v.shared_bytes, kLarge);
    EXPECT_NE(v.launch, nullptr);
  }
  EXPECT_GE(rows.size(), 3u * 15u);
}

// Every head dim has kernels on the smallest card there is.
TEST(CudaPlan, EveryHeadDimOnTheSmallestCard) {
  for (DType t : kDTypes) {
    for (int64_t dim = 1; dim <= 1024; ++dim) {
      for (bool modified : {false, true}) {
        Problem p = problem(t, dim);
        if (modified) p.score.softcap = 3;
        const Plan plan = plan_forward(p, device(kSmall), {});
        ASSERT_TRUE(plan.objections.empty()) << plan.objections[0];
        ASSERT_TRUE(backward_plan(p, kSmall).objections.empty());
        ASSERT_TRUE(backward_plan(p, kSmall, true).objections.empty());
        const Variant& v = *plan.forward.variant;
        ASSERT_TRUE(v.split || v.dim >= dim);
        ASSERT_EQ(v.modified, modified);
        ASSERT_EQ(v.dtype, t);
        ASSERT_LE(v.shared_bytes, kSmall);
      }
    }
  }
}

TEST(CudaPlan, TheSmallestTileThatHoldsTheHead) {
  const auto dim = [](DType t, int64_t d, int64_t dv = 0) {
    const Variant& v = *plan_forward(problem(t, d, dv), device(kLarge), {}).forward.variant;
    return v.split ? -v.dim : v.dim;
  };
  for (DType t : {DType::kFloat16, DType::kBFloat16}) {
    EXPECT_EQ(dim(t, 1), 64);
    EXPECT_EQ(dim(t, 64), 64);
    EXPECT_EQ(dim(t, 65), 96);
    EXPECT_EQ(dim(t, 97), 128);
    EXPECT_EQ(dim(t, 129), 256);
    EXPECT_EQ(dim(t, 257), -128);
    EXPECT_EQ(dim(t, 16, 200), 256);  // the longer of the two decides
    EXPECT_EQ(dim(t, 300, 8), -128);
  }
  EXPECT_EQ(dim(DType::kFloat32, 64), 64);
  EXPECT_EQ(dim(DType::kFloat32, 65), 128);
  EXPECT_EQ(dim(DType::kFloat32, 129), -64);
}

TEST(CudaPlan, CutsUpWhatDoesNotFitSharedMemory) {
  for (DType t : {DType::kFloat16, DType::kBFloat16}) {
    const Plan large = backward_plan(problem(t, 128), kLarge), small = backward_plan(problem(t, 128), kSmall);
    EXPECT_FALSE(large.key_grad.variant->split);
    EXPECT_EQ(large.key_grad.variant->dim, 128);
    EXPECT_GT(large.key_grad.variant->shared_bytes, kSmall);
    EXPECT_NE(large.round_query_grad.variant, nullptr);
    EXPECT_EQ(large.query_grad.variant, nullptr);
    // Slices of dS K are no rows of it: dQ comes from a kernel of its own.
    EXPECT_TRUE(small.key_grad.variant->split);
    EXPECT_EQ(small.round_query_grad.variant, nullptr);
    EXPECT_NE(small.query_grad.variant, nullptr);
  }
}

TEST(CudaPlan, DeterministicTakesNoAtomics) {
  for (DType t : kDTypes) {
    for (int64_t dim : {64, 128, 500}) {
      const Plan plan = backward_plan(problem(t, dim), kLarge, true);
      EXPECT_EQ(plan.round_query_grad.variant, nullptr);
      ASSERT_NE(plan.query_grad.variant, nullptr);
      EXPECT_EQ(plan.workspace_bytes, size_t(2 * 2 * plan.rows_padded * 4 * 3));
    }
    EXPECT_EQ(backward_plan(problem(t, 64), kLarge).query_grad.variant, nullptr);
    EXPECT_NE(backward_plan(problem(t, 64), kLarge).round_query_grad.variant, nullptr);
    EXPECT_NE(backward_plan(problem(t, 500), kLarge).query_grad.variant, nullptr);
  }
}

TEST(CudaPlan, WorkspaceHoldsStatisticsAndSums) {
  const Problem p = problem(DType::kBFloat16, 52);
  const Plan plan = backward_plan(p, kLarge);
  EXPECT_EQ(plan.rows_padded, 256);  // 210 packed rows
  EXPECT_EQ(plan.dim_padded, 56);
  EXPECT_EQ(plan.workspace_bytes, size_t(4 * 256 * 4 * (3 + 56)));
}

// Rows of packed sequences lie one behind the other, each sequence's padded.
TEST(CudaPlan, StatisticsOfPackedSequences) {
  Problem p = problem(DType::kBFloat16, 52);
  const int32_t starts[] = {0, 70, 140};
  p.packing = {{starts, 1, false}, {starts, 1, false}, 200, 400};
  const Plan plan = backward_plan(p, kLarge, true);
  EXPECT_EQ(plan.stats_rows, 2 * (200 * 3 / 128 + 2) * 128);
  EXPECT_EQ(plan.workspace_bytes, size_t(plan.stats_rows) * 4 * 3);
  RowStats stats;
  stats.batch_stride = kRowPadding;
  stats.head_stride = plan.stats_rows / 2;
  // Sequences of all lengths: each ends, padded, before the next begins, and the last within its head.
  for (int64_t group : {1, 3, 8}) {
    for (int64_t length : {1, 42, 43, 127, 128, 129}) {
      const int64_t batch = 5, padded = (length * group + kRowPadding - 1) / kRowPadding * kRowPadding;
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t end = stats.place(b, 0, b * length * group) + padded;
        if (b + 1 < batch) ASSERT_LE(end, stats.place(b + 1, 0, (b + 1) * length * group));
        else ASSERT_LE(end, (batch * length * group / kRowPadding + batch) * kRowPadding);
      }
    }
  }
}

TEST(CudaPlan, CachesHaveNoGradients) {
  Problem p = problem(DType::kBFloat16, 64);
  p.cache.capacity = 300;
  EXPECT_TRUE(plan_forward(p, device(kLarge), {}).objections.empty());
  const Plan plan = backward_plan(p, kLarge);
  ASSERT_EQ(plan.objections.size(), 1u);
  EXPECT_NE(plan.objections[0].find("a cache of keys"), std::string::npos);
}

TEST(CudaPlan, GridsCoverRowsAndKeys) {
  const Problem p = problem(DType::kFloat16, 64);
  const Plan forward = plan_forward(p, device(kLarge), {});
  const int64_t units = 4, rows = 210;
  const auto tiles = [](int64_t n, int64_t tile) { return (n + tile - 1) / tile; };
  EXPECT_EQ(forward.forward.blocks, units * tiles(rows, forward.forward.variant->tile_q));
  EXPECT_TRUE(forward.forward.order.descending);
  const Plan plan = backward_plan(p, kLarge);
  EXPECT_EQ(plan.key_grad.blocks, units * tiles(300, plan.key_grad.variant->tile_kv));
  EXPECT_EQ(plan.row_stats.blocks, units * tiles(plan.rows_padded, plan.row_stats.variant->tile_q));
  // A block for each slice of a head dim that is cut up: of dQ's columns, of dK's and dV's.
  const Plan split = backward_plan(problem(DType::kFloat16, 300, 500), kLarge, true);
  EXPECT_EQ(split.key_grad.blocks, units * 8 * tiles(300, split.key_grad.variant->tile_kv));
  EXPECT_EQ(split.query_grad.blocks, units * 5 * tiles(rows, split.query_grad.variant->tile_q));
}

// Sums over a row of dS are made where whole rows are seen.
TEST(CudaPlan, GradientsPerHead) {
  Problem p = problem(DType::kBFloat16, 64);
  char some;
  p.score.sinks.data = p.score.alibi.data = &some;
  const Plan none = plan_backward(p, device(kLarge), {});
  EXPECT_EQ(none.head_grad.variant, nullptr);
  EXPECT_TRUE(none.key_grad.variant->modified);
  MoreGradients more;
  more.dsinks = true;
  const Plan sinks = plan_backward(p, device(kLarge), {}, more);
  EXPECT_EQ(sinks.head_grad.blocks, 6);
  EXPECT_EQ(sinks.query_grad.variant, nullptr);
  EXPECT_EQ(sinks.workspace_bytes, none.workspace_bytes + size_t(4 * 256 * 4));
  more.dalibi = true;
  const Plan both = plan_backward(p, device(kLarge), {}, more);
  EXPECT_NE(both.query_grad.variant, nullptr);
  EXPECT_EQ(both.round_query_grad.variant, nullptr);
  EXPECT_EQ(both.workspace_bytes, size_t(4 * 256 * 4 * 5));
}

TEST(CudaPlan, SinksAndDropoutAreNoPlainScores) {
  Problem p = problem(DType::kFloat16, 64);
  const int64_t state[2] = {1, 2};
  EXPECT_FALSE(plan_forward(p, device(kLarge), {}).forward.variant->modified);
  p.dropout = make_dropout(0.1, state, 1);
  EXPECT_TRUE(plan_forward(p, device(kLarge), {}).forward.variant->modified);
}

// Two blocks for each multiprocessor, of enough keys each.
TEST(CudaPlan, SplitsFillTheCard) {
  Problem p = problem(DType::kBFloat16, 128);
  p.seq_q = 1;
  Device d = device(kLarge);
  d.multiprocessors = 132;
  const auto splits = [&](int64_t seq_kv, int64_t asked = 0, bool batch_invariant = false) {
    p.seq_kv = seq_kv;
    Options options;
    options.num_splits = asked;
    options.batch_invariant = batch_invariant;
    return plan_forward(p, d, options).num_splits;
  };
  EXPECT_EQ(splits(65536), 66);  // of four heads
  EXPECT_EQ(splits(4096), 16);
  EXPECT_EQ(splits(500), 1);
  EXPECT_EQ(splits(0), 1);
  EXPECT_EQ(splits(65536, 9), 9);
  EXPECT_EQ(splits(65536, 1000), 128);
  EXPECT_EQ(splits(70, 1000), 3);  // tiles of 32 keys
  EXPECT_EQ(splits(65536, 9, true), 1);
  EXPECT_EQ(splits(65536, 0, true), 1);
  p.batch = 100;
  EXPECT_EQ(splits(65536), 1);
  p.batch = int64_t(1) << 29;
  EXPECT_EQ(splits(65536, 100), 1);
}

TEST(CudaPlan, PartialResultsHaveTheirPlace) {
  Problem p = problem(DType::kFloat16, 300);
  p.dim_v = 260;
  p.seq_q = 50;  // 150 packed rows
  Options options;
  options.num_splits = 2;
  const Plan plan = plan_forward(p, device(kLarge), options);
  EXPECT_EQ(plan.forward.blocks, 2 * 4 * 2 * 3);  // ranges, heads, tiles, slices of 128 columns
  EXPECT_EQ(plan.merge_partials.blocks, 4 * 38);  // heads, four rows each
  EXPECT_EQ(plan.workspace_bytes, size_t(2 * 4 * 256 * (3 * 128 + 2)) * sizeof(float));
}

TEST(CudaPlan, BiasGradientByItsShape) {
  Problem p = problem(DType::kFloat16, 64);
  char bias;
  p.score.bias.data = &bias;
  const auto blocks = [&](int64_t b, int64_t h, int64_t q, int64_t k) {
    const int64_t shape[4] = {b, h, q, k};
    return plan_backward(p, device(kLarge), {}, {shape}).bias_grad.blocks;
  };
  EXPECT_EQ(plan_backward(p, device(kLarge), {}).bias_grad.variant, nullptr);
  EXPECT_EQ(blocks(2, 6, 70, 300), 2 * 6 * 2 * 5);
  EXPECT_EQ(blocks(1, 6, 70, 1), 6 * 2);
  EXPECT_EQ(blocks(1, 1, 1, 1), 1);
}

// Keys and values of a section share the L2 cache, at least one unit and at most all.
TEST(CudaPlan, SectionsFollowTheCache) {
  Problem p = problem(DType::kFloat16, 64);
  p.batch = 64;
  p.seq_kv = 4096;  // 1 MiB of K and V a head
  Device d = device(kLarge);
  d.l2_bytes = 40 << 20;
  EXPECT_EQ(plan_forward(p, d, {}).forward.order.section, 20);
  d.l2_bytes = 1;
  EXPECT_EQ(plan_forward(p, d, {}).forward.order.section, 1);
  d.l2_bytes = int64_t(1) << 40;
  EXPECT_EQ(plan_forward(p, d, {}).forward.order.section, 128);
}

std::string objection(const Problem& p, const Device& d) {
  const Plan forward = plan_forward(p, d, {}), backward = plan_backward(p, d, {});
  EXPECT_EQ(forward.objections.size(), 1u);
  EXPECT_FALSE(backward.objections.empty());
  return forward.objections.empty() ? "" : forward.objections[0];
}

TEST(CudaPlan, ObjectionsNameTheReason) {
  Device old = device(kLarge);
  old.compute_capability = 75;
  EXPECT_NE(objection(problem(DType::kFloat16, 64), old).find("has 7.5"), std::string::npos);
  EXPECT_NE(objection(problem(DType::kFloat64, 64), device(kLarge)).find("float64"), std::string::npos);
  EXPECT_NE(objection(problem(DType::kFloat16, 64), device(4096)).find("4096 bytes"), std::string::npos);
  Problem p = problem(DType::kFloat16, 64);
  p.seq_kv = kMost;
  EXPECT_NE(objection(p, device(kLarge)).find("2^31 rows"), std::string::npos);
  p = problem(DType::kFloat16, 64);
  p.seq_q = kMost / 3;  // 3 heads a group
  EXPECT_NE(objection(p, device(kLarge)).find("2^31 rows"), std::string::npos);
  p = problem(DType::kFloat16, 64);
  p.batch = int64_t(1) << 31;
  EXPECT_NE(objection(p, device(kLarge)).find("2^31 blocks"), std::string::npos);
}

TEST(CudaPlan, NothingToDoIsNoObjection) {
  for (int empty = 0; empty < 2; ++empty) {
    Problem p = problem(DType::kBFloat16, 64);
    (empty ? p.seq_q : p.batch) = 0;
    const Plan forward = plan_forward(p, device(kSmall), {}), backward = backward_plan(p, kSmall);
    EXPECT_TRUE(forward.objections.empty() && backward.objections.empty());
    EXPECT_EQ(forward.forward.blocks, 0);
    EXPECT_EQ(backward.query_grad.blocks + backward.row_stats.blocks, 0);
  }
  Problem p = problem(DType::kBFloat16, 64);
  p.seq_kv = 0;  // rows of zeros are to be written
  EXPECT_GT(plan_forward(p, device(kSmall), {}).forward.blocks, 0);
}

}  // namespace
}  // namespace fae::cuda
