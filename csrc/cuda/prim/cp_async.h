// Asynchronous copies from global to shared memory (PTX cp.async, sm_80).
//
// A thread's copies since its last commit form a group; waiting until at most n of its
// latest groups are pending makes the others visible to that thread, and to the block
// after a barrier. Until then the destination holds nothing that may be read.
#pragma once

#include "cuda/prim/shared.h"

#if !defined(__CUDACC__)
#include "cuda/emu/cp_async.h"
#endif

namespace fae::cuda {

#if defined(__CUDACC__)

// 16 bytes, both addresses multiples of 16. When not `valid`, zeros, and src is not read.
FAE_DEVICE void copy_async_16(Smem<std::byte> dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst.address),
               "l"(__cvta_generic_to_global(src)), "r"(valid ? 16 : 0)
               : "memory");
}

FAE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
FAE_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

inline void copy_async_16(Smem<std::byte> dst, const void* src, bool valid,
                          emu::Where where = emu::Where::here()) {
  emu::copy_async_16(dst.address, src, valid, where);
}

inline void copy_async_commit() { emu::copy_async_commit(); }

template <int kPending>
void copy_async_wait() {
  emu::copy_async_wait(kPending);
}

#endif

}  // namespace fae::cuda
