#include "torch/arguments.h"

#include <algorithm>

#include "torch/errors.h"

namespace fae::torch_ops {

Options take_options(Arguments& arguments, Family family, Direction direction) {
  const bool extended = family == Family::kExtended;
  Options o;
  o.mask = arguments.optional_tensor();
  o.bias = arguments.optional_tensor();
  o.kv_lengths = arguments.optional_tensor();
  if (extended) {
    for (TensorRef* tensor : {&o.alibi_slopes, &o.sinks, &o.rng_state, &o.row_labels, &o.key_bounds,
                              &o.cu_seqlens_q, &o.cu_seqlens_k}) {
      *tensor = arguments.optional_tensor();
    }
  }
  o.layout = arguments.integer();
  if (o.layout == kBhsdAsGiven) {
    o.layout = int64_t(Layout::kBhsd);
    o.as_given = true;
  }
  o.causal = arguments.integer();
  o.window_left = arguments.integer();
  o.window_right = arguments.integer();
  o.scale = arguments.optional_real();
  o.softcap = arguments.real();
  if (extended) {
    o.dropout_p = arguments.real();
    for (int64_t* number : {&o.mask_block_q, &o.mask_block_kv, &o.max_seqlen_q, &o.max_seqlen_k})
      *number = arguments.integer();
  }
  if (direction == Direction::kForward) {
    o.return_lse = arguments.boolean();
  } else {
    o.need_bias_grad = arguments.boolean();
    if (extended) {
      o.need_slope_grad = arguments.boolean();
      o.need_sink_grad = arguments.boolean();
    }
  }
  o.run.deterministic = arguments.boolean();
  o.run.tf32 = arguments.boolean();
  o.run.block_q = arguments.integer();
  o.run.block_kv = arguments.integer();
  o.run.num_splits = arguments.integer();
  o.run.batch_invariant = arguments.boolean();
  return o;
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
  call.alibi_slopes = describe("alibi_slopes", options.alibi_slopes);
  call.sinks = describe("sinks", options.sinks);
  call.rng_state = describe("rng_state", options.rng_state);
  call.row_labels = describe("row_labels", options.row_labels);
  call.key_bounds = describe("key_bounds", options.key_bounds);
  call.cu_seqlens_q = describe("cu_seqlens_q", options.cu_seqlens_q);
  call.cu_seqlens_k = describe("cu_seqlens_k", options.cu_seqlens_k);
  call.dropout_p = options.dropout_p;
  call.mask_block_q = options.mask_block_q;
  call.mask_block_kv = options.mask_block_kv;
  call.max_seqlen_q = options.max_seqlen_q;
  call.max_seqlen_k = options.max_seqlen_k;
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
