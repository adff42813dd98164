// The operators' kernels, boxed, of the backend that the library is linked with; see schemas.h.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace fae::torch_ops {

void attention_forward(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void attention_forward_out(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void attention_backward(StableIValue* stack, uint64_t inputs, uint64_t outputs);

}  // namespace fae::torch_ops
