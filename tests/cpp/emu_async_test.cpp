// Asynchronous copies: what arrives, and every way to use it too early.
#include <set>

#include "emu_test.h"

namespace fae::cuda::testing {
namespace {

using EmuAsync = EmulatorTest;

// Two stages of 16 bytes per lane.
struct Source {
  alignas(16) uint32_t words[2][32][4];
  emu::ScopedRange range;
  Source() : range((const void*)words, sizeof(words), "source", emu::Access::kRead) {
    for (int i = 0; i < 256; ++i) words[i / 128][i / 4 % 32][i % 4] = uint32_t(i) * 3;
  }
};

Smem<std::byte> slot(int stage, int lane) { return shared_memory() + (stage * 32 + lane) * 16; }

void issue(const Source& source, int stage) {
  copy_async_16(slot(stage, lane_index()), source.words[stage][lane_index()], true);
  copy_async_commit();
}

void expect_copied(const Source& source, int stage, int lane) {
  EXPECT_EQ(load_shared((slot(stage, lane) + 4).as<uint32_t>()), source.words[stage][lane][1]);
}

TEST_F(EmuAsync, CopiesArriveInGroups) {
  const Source source;
  expect_no_fault({}, [&] {
    issue(source, 0);
    issue(source, 1);
    copy_async_wait<1>();
    warp_barrier();
    expect_copied(source, 0, lane_index() ^ 1);
    copy_async_wait<0>();
    block_barrier();
    expect_copied(source, 1, 31 - lane_index());
  });
  EXPECT_EQ(emu::instructions().copy_async, 5 * 64u);
  EXPECT_EQ(emu::instructions().copy_async_wait, 5 * 64u);
}

TEST_F(EmuAsync, InvalidSourcesAreZerosAndNotRead) {
  expect_no_fault({}, [] {
    copy_async_16(slot(0, lane_index()), nullptr, false);
    copy_async_commit();
    copy_async_commit();  // an empty group counts
    copy_async_wait<1>();
    EXPECT_EQ(load_shared(slot(0, lane_index()).as<uint32_t>()), 0u);
  });
}

TEST_F(EmuAsync, MissingWait) {
  const Source source;
  const char* const text = "the destination of an asynchronous copy by thread";
  expect_fault({},
               [&] {
                 issue(source, 0);
                 block_barrier();
                 load_shared(slot(0, lane_index()).as<uint32_t>());
               },
               {"load_shared of 2 bytes", text, "that was not waited for"});
  expect_fault({},
               [&] {
                 issue(source, 0);
                 block_barrier();
                 store_shared(slot(0, lane_index()).as<uint32_t>(), 1u);
               },
               {"store_shared of 2 bytes", text});
  expect_fault({},
               [&] {
                 issue(source, 0);
                 block_barrier();
                 uint32_t out[4];
                 ldmatrix_x4(out, slot(0, lane_index()));
               },
               {"ldmatrix_x4 of 2 bytes", text});
  expect_fault({},
               [&] {
                 issue(source, 0);
                 block_barrier();
                 copy_async_16(slot(0, lane_index()), source.words[1][lane_index()], true);
               },
               {"copy_async_16 of 2 bytes", text});
  // Nothing was committed.
  expect_fault({},
               [&] {
                 copy_async_16(slot(0, lane_index()), source.words[0][lane_index()], true);
                 copy_async_wait<0>();
                 load_shared(slot(0, lane_index()).as<uint32_t>());
               },
               {text});
}

TEST_F(EmuAsync, WaitOneGroupShort) {
  const Source source;
  expect_fault({},
               [&] {
                 issue(source, 0);
                 issue(source, 1);
                 copy_async_wait<1>();
                 block_barrier();
                 load_shared(slot(1, lane_index()).as<uint32_t>());
               },
               {"of an asynchronous copy by thread", "that was not waited for"});
}

TEST_F(EmuAsync, MissingBarrierAfterTheWait) {
  const Source source;
  const auto kernel = [&](bool barrier) {
    return [&source, barrier] {
      issue(source, 0);
      copy_async_wait<0>();
      if (barrier) warp_barrier();
      else warp_ballot(true);  // all have waited, but nothing orders memory
      load_shared(slot(0, lane_index() ^ 1).as<uint32_t>());
    };
  };
  expect_fault({}, kernel(false), {"race: load_shared", "written by thread", "emu_async_test.cpp:"});
  expect_no_fault({}, kernel(true));
}

TEST_F(EmuAsync, MissingBarrierBeforeTheSlotIsFilledAgain) {
  const Source source;
  const auto kernel = [&](bool barrier) {
    return [&source, barrier] {
      issue(source, 0);
      copy_async_wait<0>();
      block_barrier();
      load_shared(slot(0, lane_index() ^ 1).as<uint32_t>());
      if (barrier) block_barrier();
      else warp_ballot(true);
      copy_async_16(slot(0, lane_index()), source.words[1][lane_index()], true);
      copy_async_commit();
      copy_async_wait<0>();
    };
  };
  expect_fault({}, kernel(false), {"race: copy_async_16", "read by thread"});
  expect_no_fault({}, kernel(true));
}

TEST_F(EmuAsync, AnUnfinishedCopyEndsWithItsBlock) {
  const Source source;
  expect_no_fault({32, 1024, 3}, [&] {
    store_shared(slot(0, lane_index()).as<uint32_t>(), 1u);
    issue(source, 0);
  });
}

TEST_F(EmuAsync, TheSourceIsReadAtAnyTimeBeforeTheWait) {
  std::set<uint32_t> seen;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    emu::options().seed = seed;
    Source source;
    launch({}, [&] {
      issue(source, 0);
      warp_ballot(true);
      if (lane_index() == 0) source.words[0][0][0] = 77;
      warp_barrier();
      copy_async_wait<0>();
      if (lane_index() == 0) seen.insert(load_shared(slot(0, 0).as<uint32_t>()));
    });
  }
  EXPECT_EQ(seen, (std::set<uint32_t>{0, 77}));
}

}  // namespace
}  // namespace fae::cuda::testing
