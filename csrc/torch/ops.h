// The operators' kernels, boxed, of the backend that the library is linked with; see schemas.h.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace fae::torch_ops {

// Which of the two sets of arguments in schemas.h a kernel takes.
enum class Family { kPlain, kExtended };

template <Family family>
void attention_forward(StableIValue* stack, uint64_t inputs, uint64_t outputs);
template <Family family>
void attention_forward_out(StableIValue* stack, uint64_t inputs, uint64_t outputs);
template <Family family>
void attention_backward(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// On a cache of keys and values.
void attention_kvcache(StableIValue* stack, uint64_t inputs, uint64_t outputs);

}  // namespace fae::torch_ops
