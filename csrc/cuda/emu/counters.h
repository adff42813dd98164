// What launches did: instructions, shared-memory bank conflicts, global-memory sectors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fae::cuda::emu {

// Instructions since the last reset. Those of a warp count once per warp, barriers of a
// block once per block, the rest once per thread.
struct Instructions {
  uint64_t launches = 0, blocks = 0;
  uint64_t mma = 0, ldmatrix = 0, shuffle = 0, ballot = 0, warp_barrier = 0;  // per warp
  uint64_t block_barrier = 0;                                                 // per block
  uint64_t copy_async = 0, copy_async_commit = 0, copy_async_wait = 0;        // per thread
  uint64_t load_shared = 0, store_shared = 0;
  uint64_t load_global = 0, store_global = 0, add_global = 0;
};

// The accesses of one source line: the lanes' k-th access there since the warp last met
// counts as one access of the warp. Only with Options::count.
struct AccessSite {
  std::string file;
  int line = 0;
  std::string op;         // the primitive's name
  uint64_t accesses = 0;  // of a warp
  // Shared memory: passes beyond the fewest that the bytes need, by 32 banks of 4 bytes.
  uint64_t extra_wavefronts = 0;
  // Global memory: 32-byte sectors touched, and the fewest that the bytes asked for fill.
  uint64_t sectors = 0;
  uint64_t ideal_sectors = 0;
};

// Of the calling OS thread.
Instructions& instructions();
std::vector<AccessSite> access_sites();
void reset_counters();

}  // namespace fae::cuda::emu
