// Device memory, for the host code of the launchers.
#include "cuda/launch/memory.h"

#include "cuda/cache/update.h"
#include "cuda/launch/launch.h"
#include "cuda/packing/clear_unowned.h"
#include "cuda/prim/global.h"

namespace fae::cuda {

#if defined(__CUDACC__)

void zero_memory(void* data, size_t bytes, Stream stream) {
  const cudaError_t error = cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) {
    throw std::runtime_error("flash_attn_ext: cudaMemsetAsync of " + std::to_string(bytes) +
                             " bytes failed: " + cudaGetErrorString(error));
  }
}

#else

void zero_memory(void* data, size_t bytes, Stream) {
  emu::launch({"zero_memory", 1, kWarpSize, 0}, [&] {
    auto* const words = static_cast<uint32_t*>(data);
    for (size_t i = size_t(thread_index()); i < bytes / 4; i += kWarpSize)
      store_global(words + i, uint32_t(0));
  });
}

#endif

void clear_unowned(const ClearUnownedParams& params, Stream stream) {
  launch_kernel<ClearUnowned>("clear_unowned", &params, params.blocks, stream);
}

void update_cache(const CacheParams& params, Stream stream) {
  launch_kernel<UpdateCache>("update_cache", &params, params.blocks, stream);
}

}  // namespace fae::cuda
