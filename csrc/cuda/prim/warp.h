// Exchanges between the 32 threads of a warp. All of them take part in every call.
#pragma once

#include "cuda/prim/device.h"

#if !defined(__CUDACC__)
#include "cuda/emu/warp.h"
#endif

namespace fae::cuda {

#if defined(__CUDACC__)

// Orders the shared memory accesses of the warp's threads.
FAE_DEVICE void warp_barrier() { __syncwarp(); }

// The value of the thread whose lane differs in the bits of `mask`.
FAE_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
FAE_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
FAE_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

FAE_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The value of thread `lane`.
FAE_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// A bit per lane.
FAE_DEVICE uint32_t warp_ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

#else

using emu::shuffle;
using emu::shuffle_xor;
using emu::warp_ballot;
using emu::warp_barrier;

#endif

}  // namespace fae::cuda
