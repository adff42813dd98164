// Every task runs exactly once, on any number of workers, and errors come back.
#include "cpu/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "cpu/std_executor.h"
#include "cpu/workspace.h"

namespace fae::cpu {
namespace {

class Parallel : public testing::TestWithParam<Sharing> {};
INSTANTIATE_TEST_SUITE_P(, Parallel, testing::Values(Sharing::kInOrder, Sharing::kNeighbours));

TEST_P(Parallel, EveryTaskRunsOnce) {
  for (int threads : {1, 2, 3, 8, 70}) {
    for (int64_t tasks : {0, 1, 2, 7, 100}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      std::atomic<int> largest_worker{0};
      for_each_task(
          std_executor(threads), tasks,
          [&](int worker, int64_t task) {
            ++runs[size_t(task)];
            int seen = largest_worker;
            while (worker > seen && !largest_worker.compare_exchange_weak(seen, worker)) {
            }
          },
          GetParam());
      for (const auto& n : runs) EXPECT_EQ(n, 1);
      EXPECT_LT(largest_worker, threads);
    }
  }
}

TEST_P(Parallel, WithoutAPoolTheCallerWorks) {
  int64_t sum = 0;
  Executor executor;
  executor.threads = 4;  // ignored: nothing runs them
  const auto add = [&](int worker, int64_t task) {
    EXPECT_EQ(worker, 0);
    sum += task;
  };
  for_each_task(executor, 10, add, GetParam());
  EXPECT_EQ(sum, 45);
}

TEST_P(Parallel, ExceptionsReachTheCaller) {
  for (int threads : {1, 3}) {
    EXPECT_THROW(for_each_task(
                     std_executor(threads), 20,
                     [](int, int64_t task) {
                       if (task == 11) throw std::runtime_error("task 11");
                     },
                     GetParam()),
                 std::runtime_error);
  }
}

// One worker goes over its own tasks in their order before it helps the others.
TEST(Neighbours, EachWorkerBeginsWithItsShare) {
  constexpr int64_t kTasks = 90;
  Executor in_turn = std_executor(3);
  in_turn.run = [](void*, int workers, void (*body)(void*, int), void* arg) {
    for (int w = workers - 1; w >= 0; --w) body(arg, w);
  };
  std::vector<int64_t> order;
  for_each_task(in_turn, kTasks, [&](int, int64_t task) { order.push_back(task); }, Sharing::kNeighbours);
  ASSERT_EQ(order.size(), size_t(kTasks));
  for (size_t i = 0; i < size_t(kTasks); ++i) EXPECT_EQ(order[i], (60 + int64_t(i)) % kTasks);
}

TEST(Workspace, IsAlignedAndMayBeEmpty) {
  const Workspace some(100), none(0);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(some.data()) % 64, 0u);
  EXPECT_EQ(none.data(), nullptr);
}

TEST(Workspace, ThrowsWhenMemoryIsOut) { EXPECT_THROW(Workspace(size_t(1) << 62), std::bad_alloc); }

}  // namespace
}  // namespace fae::cpu
