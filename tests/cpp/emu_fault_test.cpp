// Each kind of wrong memory access, made on purpose.
#include <vector>

#include "emu_test.h"

namespace fae::cuda::testing {
namespace {

using EmuFault = EmulatorTest;

Smem<float> floats(int64_t i) { return shared_memory().as<float>() + i; }

TEST_F(EmuFault, NamesKernelBlockThreadAndLine) {
  const int line = __LINE__ + 3;
  const auto kernel = [] {
    if (block_index() != 2 || thread_index() != 37) return;
    load_shared(floats(3));
  };
  const std::string place =
      "kernel 'mini', block 2 of 4, thread 37 (warp 1, lane 5), "
      "tests/cpp/emu_fault_test.cpp:" +
      std::to_string(line) + ": ";
  expect_fault({64, 64, 4}, kernel, {place.c_str()});
}

TEST_F(EmuFault, UninitialisedShared) {
  const char* const text = "load_shared of uninitialised shared memory: 2 bytes at offset 8 of shared memory";
  expect_fault({}, [] { load_shared(floats(2)); }, {text});
  // Also the half of a word, and also what the block before has written.
  expect_fault({},
               [] {
                 store_shared((shared_memory() + 2 * lane_index()).as<uint16_t>(), uint16_t(1));
                 warp_barrier();
                 if (lane_index() == 15) load_shared(floats(15));
                 if (lane_index() == 16) load_shared(floats(16));
               },
               {"offset 64 of shared memory have not been written"});
  int threads_run = 0;
  const auto second_block_loads = [&] {
    if (threads_run++ < 32) store_shared(floats(lane_index()), 1.0f);
    else load_shared(floats(lane_index()));
  };
  EXPECT_NE(fault_of({32, 1024, 2}, second_block_loads).find("uninitialised"), std::string::npos);
}

TEST_F(EmuFault, SharedOutOfBounds) {
  expect_fault({32, 128}, [] { load_shared(floats(lane_index() + 32)); },
               {"load_shared out of bounds: 4 bytes at offset", "of which the block has 128 bytes"});
  expect_fault({32, 128}, [] { store_shared(floats(-1), 0.0f); },
               {"store_shared out of bounds: 4 bytes at offset -4"});
  expect_fault({32, 120}, [] { store_shared((shared_memory() + 112).as<Vec16>(), Vec16{}); },
               {"store_shared out of bounds: 16 bytes at offset 112"});
  expect_fault({}, [] { load_shared(Smem<float>{}); }, {"load_shared out of bounds"});
  expect_fault({32, 256},
               [] {
                 uint32_t out[4];
                 ldmatrix_x4(out, shared_memory() + 16 * lane_index());
               },
               {"ldmatrix_x4"});
}

TEST_F(EmuFault, SharedMisaligned) {
  expect_fault({}, [] { store_shared((shared_memory() + 2).as<float>(), 0.0f); },
               {"store_shared misaligned: 4 bytes at offset 2 of shared memory"});
  expect_fault({}, [] { load_shared((shared_memory() + 8).as<Vec16>()); },
               {"load_shared misaligned: 16 bytes"});
  expect_fault({},
               [] {
                 for (int i = 0; i < 8; ++i) store_shared(floats(lane_index() + 32 * i), 0.0f);
                 warp_barrier();
                 uint32_t out[4];
                 ldmatrix_x4_transposed(out, shared_memory() + 8 * lane_index());
               },
               {"ldmatrix_x4_transposed misaligned: 16 bytes at offset 8"});
}

TEST_F(EmuFault, RacesOfWarps) {
  // A missing block barrier: the other warp may not have written yet.
  const auto reader_of_other_warp = [](bool barrier) {
    return [barrier] {
      const int t = thread_index();
      store_shared(floats(t), 1.0f);
      if (barrier) block_barrier();
      load_shared(floats(t ^ 32));
    };
  };
  const Shape two_warps{64, 256};
  const std::string text = fault_of(two_warps, reader_of_other_warp(false));
  EXPECT_TRUE(text.find("race: ") != text.npos || text.find("uninitialised") != text.npos) << text;
  expect_no_fault(two_warps, reader_of_other_warp(true));

  // Write after read.
  const auto overwritten = [](bool barrier) {
    return [barrier] {
      const int t = thread_index();
      store_shared(floats(t), 1.0f);
      block_barrier();
      load_shared(floats(t ^ 32));
      if (barrier) block_barrier();
      store_shared(floats(t), 2.0f);
    };
  };
  expect_fault(two_warps, overwritten(false),
               {"race: ", "at tests/cpp/emu_fault_test.cpp:", "with no barrier in between"});
  expect_no_fault(two_warps, overwritten(true));

  // Write after write.
  expect_fault(two_warps, [] { store_shared(floats(0), float(thread_index())); },
               {"race: store_shared of 2 bytes at offset 0 of shared memory, written by thread"});
}

TEST_F(EmuFault, RacesWithinAWarp) {
  const auto neighbour = [](int order) {
    return [order] {
      store_shared(floats(lane_index()), 1.0f);
      if (order == 1) shuffle_xor(1.0f, 1);  // no barrier for memory
      if (order == 2) warp_barrier();
      load_shared(floats(lane_index() ^ 1));
    };
  };
  expect_fault({}, neighbour(1), {"race: load_shared", "written by thread"});
  expect_no_fault({}, neighbour(2));
  // Several readers of a warp, then one of them writes.
  const auto broadcast = [](bool barrier) {
    return [barrier] {
      if (lane_index() == 0) store_shared(floats(0), 1.0f);
      warp_barrier();
      load_shared(floats(0));
      if (barrier) warp_barrier();
      else shuffle_xor(1.0f, 1);
      if (lane_index() == 0) store_shared(floats(0), 2.0f);
    };
  };
  expect_fault({}, broadcast(false), {"race: store_shared", "read by several threads of warp 0"});
  expect_no_fault({}, broadcast(true));
  // A warp barrier says nothing to other warps.
  expect_fault({64, 256},
               [] {
                 if (warp_index() == 0) store_shared(floats(lane_index()), 1.0f);
                 block_barrier();
                 load_shared(floats(lane_index()));
                 warp_barrier();
                 if (warp_index() == 0) store_shared(floats(lane_index()), 2.0f);
                 warp_barrier();
                 if (warp_index() == 1) load_shared(floats(lane_index()));
               },
               {"race: "});
}

TEST_F(EmuFault, RacesCanBeOverlooked) {
  emu::options().races = false;
  expect_no_fault({64, 256}, [] { store_shared(floats(0), float(thread_index())); });
}

TEST_F(EmuFault, GlobalOutOfBounds) {
  std::vector<float> x(100);
  const auto load = [&](int64_t i) { return [&x, i] { load_global(x.data() + i); }; };
  expect_fault({}, load(0), {"load_global out of bounds: 4 bytes at 0x"});
  emu::ScopedRange range((const void*)x.data(), x.size() * 4, "x", emu::Access::kReadWrite);
  expect_no_fault({}, load(99));
  expect_fault({}, load(100), {"offset 400 of 'x', which has 400 bytes"});
  expect_fault({}, load(-1), {"offset -4 of 'x'"});
  expect_fault({}, [&] { store_global(x.data() + 100, 1.0f); }, {"store_global out of bounds: 4 bytes"});
  expect_fault({}, [&] { add_global(x.data() + 100, 1.0f); }, {"add_global out of bounds: 4 bytes"});
  expect_fault({}, [&] { copy_async_16(shared_memory(), nullptr, true); },
               {"copy_async_16 out of bounds: 16 bytes"});
}

TEST_F(EmuFault, GlobalMisaligned) {
  alignas(16) float x[8] = {};
  emu::ScopedRange range((const void*)x, sizeof(x), "x", emu::Access::kReadWrite);
  expect_fault({}, [&] { load_global(reinterpret_cast<const Vec16*>(x + 1)); },
               {"load_global misaligned: 16 bytes at", "offset 4 of 'x', no multiple of 16"});
  expect_fault({}, [&] { copy_async_16(shared_memory(), x + 2, true); }, {"copy_async_16 misaligned"});
  expect_fault({}, [&] { copy_async_16(shared_memory() + 8, x, true); },
               {"copy_async_16 misaligned: 16 bytes at offset 8"});
}

TEST_F(EmuFault, GlobalReadOnly) {
  float x[4] = {};
  emu::ScopedRange range((const void*)x, sizeof(x), "weights", emu::Access::kRead);
  expect_fault({}, [&] { store_global(x + 1, 1.0f); },
               {"store_global to read-only memory: 4 bytes", "of 'weights'"});
  expect_fault({}, [&] { add_global(x, 1.0f); }, {"add_global to read-only memory"});
}

TEST_F(EmuFault, GlobalUninitialised) {
  float x[64];
  emu::ScopedRange range((const void*)x, sizeof(x), "out", emu::Access::kReadWrite, emu::Contents::kUnset);
  expect_fault({}, [&] { load_global(x + 3); }, {"load_global of uninitialised global memory", "of 'out'"});
  expect_fault({}, [&] { add_global(x + 3, 1.0f); }, {"add_global to uninitialised global memory"});
  EXPECT_EQ(emu::global_memory().first_unset(range.id()), 0);
  launch({}, [&] { store_global(x + lane_index(), 1.0f); });
  EXPECT_EQ(emu::global_memory().first_unset(range.id()), 128);
  expect_no_fault({}, [&] { load_global(x + lane_index()); });
}

TEST_F(EmuFault, GlobalBetweenElements) {
  alignas(8) uint16_t x[2 * 10] = {};
  // Two rows of three elements, ten apart.
  const emu::Extent extent{2, 2, {2, 3}, {10, 1}};
  emu::ScopedRange range((const void*)x, extent, "rows", emu::Access::kReadWrite);
  expect_no_fault({}, [&] { load_global(x + 12); });
  expect_fault({}, [&] { load_global(x + 3); },
               {"load_global out of bounds", "between its elements, or past the end"});
  expect_fault({}, [&] { load_global(reinterpret_cast<const uint32_t*>(x + 2)); },
               {"out of bounds: 4 bytes"});
  expect_fault({}, [&] { load_global(x + 13); }, {"out of bounds"});
}

TEST_F(EmuFault, GlobalDoubleStore) {
  float x[4] = {};
  emu::ScopedRange range((const void*)x, sizeof(x), "out", emu::Access::kReadWrite);
  expect_no_fault({}, [&] { store_global(x, 5.0f); });  // the same value
  expect_fault(
      {}, [&] { store_global(x, float(lane_index())); },
      {"race: store_global of 4 bytes", "of 'out', written with another value by thread", "of block 0"});
  expect_fault({32, 0, 2},
               [&] {
                 if (lane_index() == 0) store_global(x, float(block_index() + 1));
               },
               {"written with another value by thread 0 (warp 0, lane 0) of block"});
  // One launch after another, and one thread after itself.
  expect_no_fault({32, 0, 1}, [&] {
    if (lane_index() != 7) return;
    store_global(x, 8.0f);
    store_global(x, 9.0f);
  });
}

TEST_F(EmuFault, GlobalReadOfWhatTheLaunchWrites) {
  float x[32] = {};
  emu::ScopedRange range((const void*)x, sizeof(x), "sums", emu::Access::kReadWrite);
  expect_fault({},
               [&] {
                 add_global(x + lane_index(), 1.0f);
                 block_barrier();
                 load_global(x + lane_index());
               },
               {"load_global of 4 bytes", "written in the same launch by some thread of block 0"});
  expect_fault({32, 0, 2},
               [&] {
                 if (block_index() == 0) store_global(x + lane_index(), 1.0f);
                 else add_global(x + lane_index(), 1.0f);
               },
               {"race: "});
}

}  // namespace
}  // namespace fae::cuda::testing
