// From a kernel class to something that can be called: the only place with <<< >>>.
//
// A kernel is a class with Params, kThreads, kSharedBytes, kMinBlocks and
// `static FAE_DEVICE void run(const Params&)`.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/launch/variant.h"
#include "cuda/prim/device.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <atomic>
#else
#include "cuda/emu/launch.h"
#endif

namespace fae::cuda {

#if defined(__CUDACC__)

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

[[noreturn]] inline void raise_launch_error(cudaError_t error, const char* name, int64_t blocks, int threads,
                                            int shared_bytes) {
  throw std::runtime_error("flash_attn_ext: kernel " + std::string(name) + " did not launch on " +
                           std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                           " threads with " + std::to_string(shared_bytes) +
                           " bytes of shared memory: " + cudaGetErrorString(error));
}

template <class Kernel>
void launch_kernel(const char* name, const void* params, int64_t blocks, Stream stream) {
  const auto entry = kernel_entry<Kernel>;
  const auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) {
      raise_launch_error(error, name, blocks, Kernel::kThreads, Kernel::kSharedBytes);
    }
  };
  if (Kernel::kSharedBytes > 48 * 1024) {
    // Once per device: a bit each.
    static std::atomic<uint64_t> allowed{0};
    int device = 0;
    check(cudaGetDevice(&device));
    const uint64_t bit = uint64_t(1) << (device % 64);
    if (!(allowed.load(std::memory_order_relaxed) & bit)) {
      check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes));
      allowed.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  entry<<<unsigned(blocks), Kernel::kThreads, Kernel::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      *static_cast<const typename Kernel::Params*>(params));
  check(cudaGetLastError());
}

#else

template <class Kernel>
void launch_kernel(const char* name, const void* params, int64_t blocks, Stream) {
  const auto& p = *static_cast<const typename Kernel::Params*>(params);
  emu::launch({name, blocks, Kernel::kThreads, size_t(Kernel::kSharedBytes)}, [&] { Kernel::run(p); });
}

#endif

// The table's row of a kernel; Kernel::kTileQ and kTileKV are the tile's sizes.
template <class Kernel>
Variant make_variant(Pass pass, DType dtype, int dim, bool split, bool modified) {
  // "forward_float16_64_split_modified"; kernels without tiles of a head dim serve any.
  static const std::string name = std::string(name_of(pass)) + "_" + name_of(dtype) +
                                  (dim ? "_" + std::to_string(dim) + (split ? "_split" : "") : "") +
                                  (modified ? "_modified" : "");
  return {name.c_str(),
          pass,
          dtype,
          dim,
          split,
          modified,
          Kernel::kTileQ,
          Kernel::kTileKV,
          Kernel::kThreads,
          Kernel::kSharedBytes,
          [](const void* params, int64_t blocks, Stream stream) {
            launch_kernel<Kernel>(name.c_str(), params, blocks, stream);
          }};
}

}  // namespace fae::cuda
