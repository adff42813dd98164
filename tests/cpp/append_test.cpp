// New keys and values in a cache: how many threads they are worth.
#include "cpu/append.h"

#include <gtest/gtest.h>

#include <vector>

namespace fae::cpu {
namespace {

// Runs tasks on the calling thread, and remembers for how many workers it was asked.
struct Pool {
  int most_workers = 1;

  static void run(void* context, int workers, void (*body)(void* arg, int worker), void* arg) {
    static_cast<Pool*>(context)->most_workers = workers;
    for (int w = 0; w < workers; ++w) body(arg, w);
  }
  Executor executor() { return {8, this, run}; }
};

constexpr int64_t kHeads = 8, kDim = 128;

View4 view(std::vector<float>& memory, int64_t rows) {
  return {memory.data(), {rows * kHeads * kDim, kDim, kHeads * kDim, 1}};
}

struct Workers { int append, rotate; };

Workers workers_for(int64_t rows) {
  std::vector<float> cache(size_t(rows * kHeads * kDim)), values = cache, k = cache, turned = cache;
  std::vector<float> angles(size_t(rows), 1.0f);
  Problem p;
  p.batch = 1;
  p.heads_q = p.heads_kv = kHeads;
  p.seq_q = rows;
  p.dim = p.dim_v = kDim;
  p.q = view(k, rows);
  p.k = view(cache, rows);
  p.v = view(values, rows);
  p.cache.capacity = p.cache.added = rows;
  p.cache.entries = 1;
  Rotary rotary;
  rotary.cos = rotary.sin = angles.data();
  rotary.cos_stride[0] = rotary.sin_stride[0] = 1;
  rotary.positions = rows;
  rotary.pairs = 1;
  Pool appending, rotating;
  append(p, view(k, rows), view(k, rows), {}, appending.executor());
  rotate_queries(p, view(turned, rows), rotary, true, rotating.executor());
  return {appending.most_workers, rotating.most_workers};
}

TEST(Append, OneTokenWakesNobody) {
  const Workers workers = workers_for(1);
  EXPECT_EQ(workers.append, 1);
  EXPECT_EQ(workers.rotate, 1);
}

TEST(Append, AThreadForEachOfEnoughBytes) {
  const Workers some = workers_for(24), many = workers_for(1000);
  EXPECT_EQ(some.append, 3);  // 24 rows of 8 KiB of keys and values
  EXPECT_EQ(some.rotate, 1);  // of 4 KiB
  EXPECT_EQ(many.append, 8);
  EXPECT_EQ(many.rotate, 8);
}

}  // namespace
}  // namespace fae::cpu
