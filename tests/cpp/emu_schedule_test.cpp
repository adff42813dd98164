// Threads, rendezvous and schedules of the emulator.
#include <algorithm>
#include <set>
#include <thread>
#include <vector>

#include "emu_test.h"

namespace fae::cuda::testing {
namespace {

using EmuSchedule = EmulatorTest;

TEST_F(EmuSchedule, EveryThreadOfEveryBlockRunsOnce) {
  std::vector<int> runs(3 * 96, 0);
  launch({96, 0, 3}, [&] {
    EXPECT_EQ(lane_index() + 32 * warp_index(), thread_index());
    ++runs[size_t(block_index() * 96 + thread_index())];
  });
  EXPECT_EQ(runs, std::vector<int>(3 * 96, 1));
  EXPECT_EQ(emu::instructions().launches, 1u);
  EXPECT_EQ(emu::instructions().blocks, 3u);
}

TEST_F(EmuSchedule, ExchangesOfAWarp) {
  launch({64, 0, 1}, [] {
    const int lane = lane_index(), other = 100 * warp_index();
    EXPECT_EQ(shuffle_xor(float(lane + other), 5), float((lane ^ 5) + other));
    EXPECT_EQ(shuffle_xor(double(lane + other), 16), double((lane ^ 16) + other));
    EXPECT_EQ(shuffle(float(lane + other), 31 - lane), float(31 - lane + other));
    EXPECT_EQ(warp_ballot(lane % 3 == 0), 0x49249249u);
    EXPECT_EQ(warp_ballot(warp_index() == 1), warp_index() == 1 ? ~0u : 0u);
  });
  EXPECT_EQ(emu::instructions().shuffle, 6u);
  EXPECT_EQ(emu::instructions().ballot, 4u);
}

TEST_F(EmuSchedule, BlockAny) {
  launch({96, 0, 1}, [] {
    EXPECT_TRUE(block_any(thread_index() == 77));
    EXPECT_FALSE(block_any(false));
    EXPECT_TRUE(block_any(true));
  });
  EXPECT_EQ(emu::instructions().block_barrier, 3u);
}

// The order in which threads pass three points, two of them rendezvous.
std::vector<int> order_of(uint64_t seed) {
  emu::options().seed = seed;
  std::vector<int> order;
  launch({64, 0, 2}, [&] {
    for (int i = 0; i < 2; ++i) {
      order.push_back(int(block_index()) * 1000 + i * 100 + thread_index());
      warp_barrier();
    }
    block_barrier();
    order.push_back(int(block_index()) * 1000 + 200 + thread_index());
  });
  return order;
}

TEST_F(EmuSchedule, DiffersBySeedAndOnlyBySeed) {
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    orders.insert(order_of(seed));
    EXPECT_EQ(order_of(seed), order_of(seed)) << seed;
  }
  EXPECT_EQ(orders.size(), 20u);
}

TEST_F(EmuSchedule, WarpsRunAheadAndInterleave) {
  bool ahead = false, interleaved = false, second_first = false, blocks_swapped = false;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    const std::vector<int> order = order_of(seed);
    const auto position = [&](int event) {
      return std::find(order.begin(), order.end(), event) - order.begin();
    };
    ahead = ahead || position(100) < position(32) || position(132) < position(0);
    interleaved = interleaved || (position(0) < position(32) && position(33) < position(1));
    second_first = second_first || position(1) < position(0);
    blocks_swapped = blocks_swapped || position(1000) < position(0);
  }
  EXPECT_TRUE(ahead);
  EXPECT_TRUE(interleaved);
  EXPECT_TRUE(second_first);
  EXPECT_TRUE(blocks_swapped);
}

TEST_F(EmuSchedule, ResultsOfARaceFreeKernelDoNotDifferBySeed) {
  std::set<std::vector<float>> results;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    emu::options().seed = seed;
    std::vector<float> sums(2 * 128, -1.0f);
    emu::ScopedRange range((const void*)sums.data(), sums.size() * 4, "sums", emu::Access::kReadWrite,
                           emu::Contents::kUnset);
    launch({128, 512, 2}, [&] {
      const int t = thread_index();
      const auto at = [&](int i) { return shared_memory().as<float>() + i; };
      store_shared(at(t), float(t) * float(block_index() + 1));
      block_barrier();
      float sum = 0;
      for (int i = 0; i < 128; i += 8) sum += load_shared(at((t + i) % 128));
      for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      store_global(sums.data() + block_index() * 128 + t, sum);
    });
    EXPECT_EQ(emu::global_memory().first_unset(range.id()), -1);
    results.insert(sums);
  }
  EXPECT_EQ(results.size(), 1u);
}

TEST_F(EmuSchedule, AdditionsFollowTheSchedule) {
  // Of 1, 2^24 and -2^24 in fp32 the order of summation shows.
  std::set<float> sums;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    emu::options().seed = seed;
    float sum = 0;
    emu::ScopedRange range((const void*)&sum, sizeof(sum), "sum", emu::Access::kReadWrite);
    launch({32, 0, 3}, [&] {
      if (lane_index() == 0)
        add_global(&sum, block_index() == 0 ? 1.0f : block_index() == 1 ? 0x1p24f : -0x1p24f);
    });
    sums.insert(sum);
  }
  EXPECT_EQ(sums, (std::set<float>{0.0f, 1.0f}));
}

TEST_F(EmuSchedule, ThousandsOfSmallLaunches) {
  int64_t sum = 0;
  for (int i = 0; i < 3000; ++i) {
    launch({128, 4096, 1}, [&] {
      block_barrier();
      ++sum;
    });
  }
  EXPECT_EQ(sum, 3000 * 128);
}

TEST_F(EmuSchedule, OperatingSystemThreadsLaunchOnTheirOwn) {
  std::vector<uint64_t> barriers(3, 0);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < barriers.size(); ++i) {
    threads.emplace_back([&barriers, i] {
      float out[64];
      emu::ScopedRange range((const void*)out, sizeof(out), "out", emu::Access::kReadWrite);
      for (size_t n = 0; n < 20 * (i + 1); ++n) {
        launch({64, 0, 1}, [&] {
          block_barrier();
          store_global(out + thread_index(), 1.0f);
        });
      }
      barriers[i] = emu::instructions().block_barrier;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(barriers, (std::vector<uint64_t>{20, 40, 60}));
  EXPECT_EQ(emu::instructions().launches, 0u);
}

TEST_F(EmuSchedule, RefusesImpossibleLaunches) {
  const auto nothing = [] {};
  EXPECT_THROW(launch({33, 0, 1}, nothing), std::invalid_argument);
  EXPECT_THROW(launch({0, 0, 1}, nothing), std::invalid_argument);
  EXPECT_THROW(launch({2048, 0, 1}, nothing), std::invalid_argument);
  EXPECT_THROW(launch({32, 0, 0}, nothing), std::invalid_argument);
  EXPECT_THROW(launch({32, 228 * 1024, 1}, nothing), std::invalid_argument);
  EXPECT_THROW(thread_index(), std::logic_error);
}

TEST_F(EmuSchedule, ExceptionsOfAKernelReachTheLauncher) {
  const auto throwing = [] {
    warp_barrier();
    if (thread_index() == 40) throw std::runtime_error("mine");
    block_barrier();
  };
  EXPECT_THROW(launch({64, 0, 1}, throwing), std::runtime_error);
  expect_no_fault({64, 0, 1}, [] { block_barrier(); });
}

TEST_F(EmuSchedule, DeadlockNamesEveryWaiter) {
  const int line = __LINE__ + 3;
  const auto kernel = [] {
    if (warp_index() == 1 && lane_index() >= 30) return;
    if (warp_index() < 2) warp_barrier();
    block_barrier();
  };
  const std::string barrier =
      "threads 64-95: block_barrier at tests/cpp/emu_schedule_test.cpp:" + std::to_string(line + 1);
  const std::string first = "threads 0-31: block_barrier at";
  const std::string warp =
      "threads 32-61: warp_barrier at tests/cpp/emu_schedule_test.cpp:" + std::to_string(line);
  expect_fault({96, 0, 1}, kernel,
               {"kernel 'mini', block 0 of 1: deadlock", warp.c_str(), "threads 62-63: returned"});
  // The block's barriers are one group of two ranges.
  const std::string both =
      "threads 0-31, 64-95: block_barrier at tests/cpp/emu_schedule_test.cpp:" + std::to_string(line + 1);
  expect_fault({96, 0, 1}, kernel, {both.c_str()});
}

TEST_F(EmuSchedule, ReturningBeforeABarrierIsADeadlock) {
  expect_fault({64, 0, 1},
               [] {
                 if (thread_index() == 5) return;
                 block_barrier();
               },
               {"deadlock", "thread 5: returned", "threads 0-4, 6-63: block_barrier at"});
}

TEST_F(EmuSchedule, DivergentWarpOperationsAreNamed) {
  expect_fault(
      {32, 0, 1},
      [] {
        if (lane_index() < 16) shuffle_xor(1.0f, 1);
        else warp_ballot(true);
      },
      {"divergence: the lanes of a warp", "threads 0-15: shuffle_xor at", "threads 16-31: warp_ballot at"});
  expect_fault({64, 0, 1},
               [] {
                 if (lane_index() % 2) shuffle_xor(1.0f, 1);
                 else shuffle_xor(2.0f, 1);
               },
               {"divergence: the lanes of a warp"});
}

TEST_F(EmuSchedule, DivergentBarriersAreNamed) {
  expect_fault(
      {64, 0, 1},
      [] {
        if (warp_index() == 0) block_barrier();
        else block_any(true);
      },
      {"divergence: the threads of a block", "threads 0-31: block_barrier", "threads 32-63: block_any"});
}

TEST_F(EmuSchedule, LanesOfAShuffleExist) {
  expect_fault({}, [] { shuffle(1.0f, 32); }, {"shuffle from lane 32"});
  expect_fault({}, [] { shuffle_xor(1.0f, -1); }, {"shuffle_xor by -1"});
}

}  // namespace
}  // namespace fae::cuda::testing
