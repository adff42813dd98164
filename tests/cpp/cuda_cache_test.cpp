// What goes into a cache of keys and values before the CUDA kernels attend, on the host emulator. Lengths and
// tables that validate() would refuse on a CPU are what a card cannot ask about.
#include <cmath>
#include <random>
#include <vector>

#include "cuda/emu/launch.h"
#include "cuda_test.h"

namespace fae::testing {
namespace {

namespace emu = cuda::emu;

HostTensor tensor(int64_t entries, int64_t heads, int64_t rows, int64_t columns, uint32_t seed) {
  const int64_t shape[4] = {entries, heads, rows, columns};
  HostTensor t(DType::kFloat32, shape, Layout::kBshd, Strides::kContiguous);
  t.fill_normal(seed);
  return t;
}

emu::ScopedRange memory_of(const HostTensor& t, const char* name, emu::Access access) {
  return emu::ScopedRange(static_cast<const void*>(t.bytes()), t.byte_count(), name, access);
}

// A cache and what is put into it: sequences of `added` new rows each.
struct CacheCase {
  CacheCase(int64_t batch, int64_t entries, int64_t rows, int64_t added)
      : k_cache(tensor(entries, kHeads, rows, kDim, 1)),
        v_cache(tensor(entries, kHeads, rows, kDim, 2)),
        k(tensor(batch, kHeads, added, kDim, 3)),
        v(tensor(batch, kHeads, added, kDim, 4)) {
    problem.batch = batch;
    problem.heads_q = problem.heads_kv = kHeads;
    problem.dim = problem.dim_v = kDim;
    problem.k = k_cache.view();
    problem.v = v_cache.view();
    problem.cache.capacity = rows;
    problem.cache.added = added;
    problem.cache.entries = entries;
    update.k = k.view();
    update.v = v.view();
  }

  void set_lengths(std::vector<int64_t> values) {
    lengths = std::move(values);
    problem.cache.lengths = {lengths.data(), 1, true};
  }
  // Pages of a sequence side by side; the cache's entries are the pages.
  void set_table(std::vector<int64_t> values) {
    table = std::move(values);
    KeyCache& cache = problem.cache;
    const int64_t size = k_cache.shape()[2], pages_of_each = int64_t(table.size()) / problem.batch;
    cache.pages = {{table.data(), pages_of_each, true}, 1, size, cache.entries};
    cache.capacity = pages_of_each * size;
  }

  void run(uint64_t seed) {
    emu::options().seed = seed;
    const emu::ScopedRange keys = memory_of(k_cache, "k_cache", emu::Access::kReadWrite);
    const emu::ScopedRange values = memory_of(v_cache, "v_cache", emu::Access::kReadWrite);
    const emu::ScopedRange new_keys = memory_of(k, "k", emu::Access::kRead);
    const emu::ScopedRange new_values = memory_of(v, "v", emu::Access::kRead);
    cuda::update_cache(problem, update, nullptr);
  }

  // Sequence by sequence, row by row.
  void expect_appended(const HostTensor& cache_before, const HostTensor& cache, const HostTensor& rows) {
    std::vector<double> wanted = cache_before.values();
    const int64_t cache_rows = cache.shape()[2];
    for (int64_t b = 0; b < problem.batch; ++b) {
      for (int64_t i = 0; i < problem.cache.added; ++i) {
        const int64_t position = problem.cache.filled(b) + i;
        const bool paged = problem.cache.pages.present();
        const int64_t entry =
            paged ? problem.cache.pages.at(b, position / cache_rows) : problem.cache.entry(b);
        for (int64_t h = 0; h < kHeads; ++h) {
          const int64_t at = (entry * kHeads + h) * cache_rows + (paged ? position % cache_rows : position);
          for (int64_t c = 0; c < kDim; ++c) wanted[size_t(at * kDim + c)] = rows.get(b, h, i, c);
        }
      }
    }
    EXPECT_TRUE(identical(cache.values(), wanted));
  }
  void expect_appended(uint64_t seed) {
    const HostTensor keys = tensor(k_cache.shape()[0], kHeads, k_cache.shape()[2], kDim, 1);
    const HostTensor values = tensor(k_cache.shape()[0], kHeads, k_cache.shape()[2], kDim, 2);
    run(seed);
    expect_appended(keys, k_cache, k);
    expect_appended(values, v_cache, v);
  }

  static constexpr int64_t kHeads = 3, kDim = 6;
  HostTensor k_cache, v_cache, k, v;
  std::vector<int64_t> lengths, table, entries;
  Problem problem;
  CacheUpdate update;
};

// Of sequences whose pages are the same the last one's rows stay, whatever order blocks come in.
TEST(CudaCache, SharedPagesHoldWhatCameLast) {
  std::mt19937 random(7);
  for (int n = 0; n < 60; ++n) {
    SCOPED_TRACE(n);
    const int64_t batch = 1 + int64_t(random() % 4), size = 1 + int64_t(random() % 9);
    const int64_t added = 1 + int64_t(random() % 40), pages_of_each = (added + 12 + size - 1) / size;
    const int64_t pages = n % 3 == 0 ? batch * pages_of_each : 1 + int64_t(random() % 12);
    CacheCase c(batch, pages, size, added);
    std::vector<int64_t> table, lengths;
    for (int64_t i = 0; i < batch * pages_of_each; ++i)
      table.push_back(n % 3 == 0 ? i : int64_t(random()) % (pages + 2) - 1);
    // Some past the room that there is.
    for (int64_t b = 0; b < batch; ++b) lengths.push_back(int64_t(random() % 16) - 1);
    c.set_table(table);
    c.set_lengths(lengths);
    c.expect_appended(uint64_t(n));
  }
}

TEST(CudaCache, SharedEntriesHoldWhatCameLast) {
  std::mt19937 random(8);
  for (int n = 0; n < 20; ++n) {
    SCOPED_TRACE(n);
    CacheCase c(3, 2, 50, 20);
    c.set_lengths({int64_t(random() % 30), int64_t(random() % 30), int64_t(random() % 40)});
    c.entries = {int64_t(random() % 2), int64_t(random() % 2), int64_t(random() % 4) - 1};
    c.problem.cache.batch = {c.entries.data(), 1, true};
    c.expect_appended(uint64_t(n));
  }
}

// Rows are compared with others only where a page is written by more than one sequence, and pages once each.
TEST(CudaCache, LooksForSharedPagesOnce) {
  CacheCase c(2, 12, 8, 40);
  c.set_table({11, 10, 9, 8, 7, 6, 0, 1, 2, 3, 4, 5});
  c.set_lengths({3, 8});
  emu::reset_counters();
  c.expect_appended(1);
  EXPECT_EQ(emu::instructions().ballot, 0u);
  // Of 3 runs a sequence, 16 rows each: the first begins in the middle of a page, the second at one.
  EXPECT_LE(emu::instructions().block_barrier, 3u * 3 + 2 + 2 + 1);
}

// Tables of angles that end before a sequence does are read up to their last row.
TEST(CudaCache, RotaryTablesAreNotLeft) {
  constexpr int64_t kPositions = 5, kPairs = 3, kAdded = 4;
  for (const bool moving : {false, true}) {
    SCOPED_TRACE(moving);
    CacheCase c(3, 3, 40, kAdded);
    c.set_lengths({0, 3, 1000});
    const HostTensor cos = tensor(1, 1, kPositions, kPairs, 5), sin = tensor(1, 1, kPositions, kPairs, 6);
    const HostTensor q = tensor(3, CacheCase::kHeads, 7, CacheCase::kDim, 7);
    HostTensor turned = tensor(3, CacheCase::kHeads, 7, CacheCase::kDim, 8);
    Rotary& rotary = c.update.rotary;
    rotary.cos = cos.view().data;
    rotary.sin = sin.view().data;
    rotary.cos_stride[0] = rotary.sin_stride[0] = kPairs;
    rotary.cos_stride[1] = rotary.sin_stride[1] = 1;
    rotary.positions = kPositions;
    rotary.pairs = kPairs;
    c.problem.q = q.view();
    c.problem.seq_q = 7;
    c.update.turned = turned.view();
    c.update.queries_move = moving;
    const emu::ScopedRange cosines = memory_of(cos, "rotary_cos", emu::Access::kRead);
    const emu::ScopedRange sines = memory_of(sin, "rotary_sin", emu::Access::kRead);
    const emu::ScopedRange queries = memory_of(q, "q", emu::Access::kRead);
    const emu::ScopedRange results = memory_of(turned, "turned", emu::Access::kReadWrite);
    ASSERT_NO_THROW(c.run(1));
    const auto first = [&](const HostTensor& x, int64_t b, int64_t i, int64_t position) {
      const int64_t row = std::min(position, kPositions - 1);
      return x.get(b, 0, i, 0) * cos.get(0, 0, row, 0) - x.get(b, 0, i, kPairs) * sin.get(0, 0, row, 0);
    };
    for (int64_t b = 0; b < 3; ++b) {
      const int64_t filled = c.problem.cache.filled(b);
      for (int64_t i = 0; i < kAdded; ++i)
        EXPECT_NEAR(c.k_cache.get(b, 0, filled + i, 0), first(c.k, b, i, filled + i), 1e-5);
      for (int64_t i = 0; i < 7; ++i)
        EXPECT_NEAR(turned.get(b, 0, i, 0), first(q, b, i, filled + (moving ? i : 0)), 1e-5);
    }
  }
}

}  // namespace
}  // namespace fae::testing
