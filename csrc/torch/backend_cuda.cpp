// The operators on CUDA tensors.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "cuda/launch/device.h"
#include "torch/cuda_call.h"
#include "torch/schemas.h"

namespace fae::torch_ops {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// By name, in the library that a torch with CUDA has loaded: so this one can be linked where
// torch has none.
CurrentStream find_current_stream() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  if (!symbol) throw std::runtime_error("flash_attn_ext: this torch has no CUDA streams");
  return reinterpret_cast<CurrentStream>(symbol);
}

// The tensors' device is the current one for as long as this lives.
class Card {
 public:
  template <class Call>
  Card(Place place, const Call&) : index_(place.index) {
    static const CurrentStream current_stream = find_current_stream();
    if (aoti_torch_create_device_guard(index_, &guard_) != TORCH_SUCCESS) {
      throw std::runtime_error("flash_attn_ext: torch could not switch to device cuda:" +
                               std::to_string(index_));
    }
    if (current_stream(index_, &stream_) != TORCH_SUCCESS) {
      aoti_torch_delete_device_guard(guard_);
      throw std::runtime_error("flash_attn_ext: torch has no current stream on device cuda:" +
                               std::to_string(index_));
    }
  }
  Card(const Card&) = delete;
  Card& operator=(const Card&) = delete;
  ~Card() { aoti_torch_delete_device_guard(guard_); }

  const cuda::Device& device() const { return cuda::device_properties(index_); }
  cuda::Stream stream() const { return stream_; }
  void use_scratch(void*, size_t) {}
  void finish() {}

 private:
  int index_;
  DeviceGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace

void run_forward(const ForwardCall& call, Place place, const RunOptions& options) {
  cuda_forward<Card>(call, place, options);
}

void run_backward(const BackwardCall& call, Place place, const RunOptions& options) {
  cuda_backward<Card>(call, place, options);
}

void run_kvcache(const CachedCall& call, Place place, const RunOptions& options) {
  cuda_kvcache<Card>(call, place, options);
}

}  // namespace fae::torch_ops

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) { fae::torch_ops::implement(m, "attention"); }
