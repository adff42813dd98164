// Runs a kernel on the host: every block of a grid, one after another, each CUDA thread a
// fiber.
//
//   emu::ScopedRange q_range(q, q_bytes, "q", emu::Access::kRead);
//   emu::launch({"forward", blocks, 128, shared_bytes}, [&] { run<Traits>(params); });
//
// A fault of the kernel is an emu::Fault thrown from launch(). All state (ranges, options,
// counters) belongs to the calling OS thread; several may launch at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/emu/counters.h"
#include "cuda/emu/fault.h"
#include "cuda/emu/global.h"

namespace fae::cuda::emu {

struct LaunchConfig {
  const char* kernel;
  int64_t grid;         // blocks
  int threads;          // of a block; a multiple of 32, at most 1024
  size_t shared_bytes;  // dynamic shared memory of a block
};

struct Options {
  uint64_t seed = 0;   // of the order of blocks, warps, lanes and copies
  bool count = false;  // bank conflicts and sectors, see counters.h
  bool races = true;   // accesses that no barrier orders are faults
};

// What launches of this OS thread use.
Options& options();

void launch(const LaunchConfig& config, void (*entry)(const void*), const void* params);

template <class Kernel>
void launch(const LaunchConfig& config, const Kernel& kernel) {
  launch(config, [](const void* k) { (*static_cast<const Kernel*>(k))(); }, &kernel);
}

}  // namespace fae::cuda::emu
