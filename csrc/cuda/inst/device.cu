// What the planner asks of a card.
#include "cuda/launch/device.h"

#include <cuda_runtime.h>
#include "cuda/launch/c_api.h"

#include <mutex>
#include <stdexcept>
#include <string>

namespace fae::cuda {
namespace {

constexpr int kMostDevices = 64;

Device ask(int index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
    if (error != cudaSuccess) {
      throw std::runtime_error("flash_attn_ext: device cuda:" + std::to_string(index) +
                               " does not describe itself: " + cudaGetErrorString(error));
    }
    return value;
  };
  Device device;
  device.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  return device;
}

}  // namespace

const Device& device_properties(int index) {
  static Device devices[kMostDevices];
  static std::once_flag asked[kMostDevices];
  if (index < 0 || index >= kMostDevices) {
    throw std::runtime_error("flash_attn_ext: device number " + std::to_string(index) + " is beyond " +
                             std::to_string(kMostDevices - 1));
  }
  std::call_once(asked[index], [&] { devices[index] = ask(index); });
  return devices[index];
}

}  // namespace fae::cuda

// What the driver has to serve: 1000 major + 10 minor.
extern "C" FAE_EXPORT int fae_cuda_runtime_version() { return CUDART_VERSION; }
