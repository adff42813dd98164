// What a kernel knows of where it runs. Under nvcc the names of this room are CUDA and
// PTX; under any other compiler they are the emulator's (cuda/emu), with the same contract.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/hd.h"

#if defined(__CUDACC__)
#define FAE_DEVICE __device__ __forceinline__
#define FAE_DEVICE_COLD inline __device__ __noinline__  // rare paths, kept out of the hot ones' registers
#define FAE_UNROLL _Pragma("unroll")
#define FAE_NO_UNROLL _Pragma("unroll 1")  // rare or long ways need not be long code, too
#else
#define FAE_DEVICE inline
#define FAE_DEVICE_COLD inline
#define FAE_UNROLL
#define FAE_NO_UNROLL
#include "cuda/emu/thread.h"
#endif

namespace fae::cuda {

constexpr int kWarpSize = 32;

#if defined(__CUDACC__)

// Thread and block in their linear grids.
FAE_DEVICE int thread_index() { return int(threadIdx.x); }
FAE_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }

// All threads of the block; orders their shared and global memory accesses.
FAE_DEVICE void block_barrier() { __syncthreads(); }

// As above; true for all when `value` is true for any.
FAE_DEVICE bool block_any(bool value) { return __syncthreads_or(value) != 0; }

// x, of which the compiler knows nothing: what is computed from it stays where it is, and is not moved
// before a loop, where it would hold a register for the sake of a rare path.
FAE_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

#else

FAE_DEVICE int opaque(int x) { return x; }

using emu::block_any;
using emu::block_barrier;
using emu::block_index;
using emu::thread_index;

#endif

FAE_DEVICE int lane_index() { return thread_index() % kWarpSize; }
FAE_DEVICE int warp_index() { return thread_index() / kWarpSize; }

}  // namespace fae::cuda
