// The operators' CPU kernels, boxed; the schemas are in library.cpp.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

#include "torch/boxed.h"
#include "torch/view.h"

namespace fae::torch_ops {

void attention_forward(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void attention_forward_out(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void attention_backward(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// What every operator takes after its leading tensors.
struct Options {
  TensorRef mask;        // bool, broadcastable to (batch, heads_q, seq_q, seq_kv)
  TensorRef bias;        // floating, same
  TensorRef kv_lengths;  // (batch,)
};
Options take_options(Arguments& arguments, CallDesc* call);

}  // namespace fae::torch_ops
