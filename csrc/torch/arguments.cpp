#include "torch/arguments.h"

#include <algorithm>

#include "torch/errors.h"

namespace fae::torch_ops {

Options take_options(Arguments& arguments) {
  // Braces evaluate from left to right.
  return {arguments.optional_tensor(),
          arguments.optional_tensor(),
          arguments.optional_tensor(),
          arguments.integer(),
          arguments.integer(),
          arguments.integer(),
          arguments.integer(),
          arguments.optional_real(),
          arguments.real(),
          arguments.boolean(),
          {arguments.boolean(), arguments.boolean(), arguments.integer(), arguments.integer()}};
}

CallDesc describe_call(const TensorRef& q, const TensorRef& k, const TensorRef& v, const Options& options,
                       const TensorRef* out) {
  CallDesc call;
  call.q = describe("q", q);
  call.k = describe("k", k);
  call.v = describe("v", v);
  call.mask = describe("mask", options.mask);
  call.bias = describe("bias", options.bias);
  call.kv_lengths = describe("kv_lengths", options.kv_lengths);
  if (out) call.out = describe("out", *out, Access::kWrite);
  call.window_left = options.window_left;
  call.window_right = options.window_right;
  call.scale = options.scale;
  call.softcap = options.softcap;
  if (const auto error = set_layout_and_causal(&call, options.layout, options.causal)) raise(*error);
  if (const auto error = validate(call)) raise(*error);
  return call;
}

void out_shape(const CallDesc& call, int64_t shape[4]) {
  const int last = call.q.rank - 1;
  std::copy_n(call.q.shape, last, shape);
  shape[last] = call.v.shape[last];
}

}  // namespace fae::torch_ops
