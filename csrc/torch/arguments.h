// What the operators have in common: their options, and the description of a call.
#pragma once

#include <cstdint>
#include <optional>

#include "torch/backend.h"
#include "torch/boxed.h"
#include "torch/view.h"

namespace fae::torch_ops {

// What every operator takes after its leading tensors, in the order of the schemas.
struct Options {
  TensorRef mask;        // bool, broadcastable to (batch, heads_q, seq_q, seq_kv)
  TensorRef bias;        // floating, same
  TensorRef kv_lengths;  // (batch,)
  int64_t layout;
  int64_t causal;
  int64_t window_left;
  int64_t window_right;
  std::optional<double> scale;
  double softcap;
  bool extra_result;  // return_lse, need_bias_grad
  RunOptions run;
};

// Only takes: an error before the stack is empty would leak what is left on it.
Options take_options(Arguments& arguments);

// Describes q, k, v and the options; raises what is wrong with them, or with `out` if given.
CallDesc describe_call(const TensorRef& q, const TensorRef& k, const TensorRef& v, const Options& options,
                       const TensorRef* out = nullptr);

// The shape of the result: q's with v's last axis, in every rank and layout.
void out_shape(const CallDesc& call, int64_t shape[4]);

}  // namespace fae::torch_ops
