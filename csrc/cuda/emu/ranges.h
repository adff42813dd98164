// Registered global memory and what the present launch has done to it. Internal.
#pragma once

#include <utility>
#include <vector>

#include "cuda/emu/global.h"
#include "cuda/emu/shadow.h"

namespace fae::cuda::emu {

// Registered bytes; of a tensor with gaps only those of its elements.
struct Range {
  int id = 0;
  std::string name;
  Access access = Access::kRead;
  uintptr_t begin = 0, end = 0;
  size_t element_bytes = 1;
  std::vector<bool> member;  // per byte; empty: all
  std::vector<bool> set;     // per byte; empty: all
  // Per granule, when writable: the last store or addition. Smaller stores of one granule
  // by different threads are not told apart.
  static constexpr size_t kGranule = 2;
  std::vector<Stamp> wrote;
};

// Which block an epoch belongs to, of the present launch of this OS thread.
struct LaunchClock {
  Stamp start = 0;
  std::vector<std::pair<uint64_t, int64_t>> blocks;  // first epoch, block
};
LaunchClock& launch_clock();

// Throws a Fault unless the running thread may load the `bytes` at `address`.
void check_load(const void* address, size_t bytes, const Where& where, const char* op);

}  // namespace fae::cuda::emu
