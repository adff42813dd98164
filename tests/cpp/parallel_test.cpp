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

TEST(Parallel, EveryTaskRunsOnce) {
  for (int threads : {1, 2, 3, 8}) {
    for (int64_t tasks : {0, 1, 2, 7, 100}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      std::atomic<int> largest_worker{0};
      for_each_task(std_executor(threads), tasks, [&](int worker, int64_t task) {
        ++runs[size_t(task)];
        int seen = largest_worker;
        while (worker > seen && !largest_worker.compare_exchange_weak(seen, worker)) {
        }
      });
      for (const auto& n : runs) EXPECT_EQ(n, 1);
      EXPECT_LT(largest_worker, threads);
    }
  }
}

TEST(Parallel, WithoutAPoolTheCallerWorks) {
  int64_t sum = 0;
  Executor executor;
  executor.threads = 4;  // ignored: nothing runs them
  for_each_task(executor, 10, [&](int worker, int64_t task) {
    EXPECT_EQ(worker, 0);
    sum += task;
  });
  EXPECT_EQ(sum, 45);
}

TEST(Parallel, ExceptionsReachTheCaller) {
  for (int threads : {1, 3}) {
    EXPECT_THROW(for_each_task(std_executor(threads), 20,
                               [](int, int64_t task) {
                                 if (task == 11) throw std::runtime_error("task 11");
                               }),
                 std::runtime_error);
  }
}

TEST(Workspace, IsAlignedAndMayBeEmpty) {
  const Workspace some(100), none(0);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(some.data()) % 64, 0u);
  EXPECT_EQ(none.data(), nullptr);
}

TEST(Workspace, ThrowsWhenMemoryIsOut) { EXPECT_THROW(Workspace(size_t(1) << 62), std::bad_alloc); }

}  // namespace
}  // namespace fae::cpu
