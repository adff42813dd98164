// What the operators have in common: their options, and the description of a call.
#pragma once

#include <cstdint>
#include <optional>

#include "torch/backend.h"
#include "torch/boxed.h"
#include "torch/ops.h"
#include "torch/view.h"

namespace fae::torch_ops {

// A layout in the schemas beyond those of the core.
constexpr int64_t kBhsdAsGiven = 2;

// What every operator takes after its leading tensors, in the order of the schemas.
struct Options {
  TensorRef mask, bias, kv_lengths;
  TensorRef alibi_slopes, sinks, rng_state, row_labels, key_bounds, cu_seqlens_q, cu_seqlens_k;
  int64_t layout = 0;
  bool as_given = false;  // results lie in memory as the tensors that they belong to
  int64_t causal = 0;
  int64_t window_left = -1;
  int64_t window_right = -1;
  std::optional<double> scale;
  double softcap = 0;
  double dropout_p = 0;
  int64_t mask_block_q = 1, mask_block_kv = 1;
  int64_t max_seqlen_q = -1, max_seqlen_k = -1;
  // What a forward operator or a backward one is asked for.
  bool return_lse = false;
  bool need_bias_grad = false, need_slope_grad = false, need_sink_grad = false;
  RunOptions run;
};

enum class Direction { kForward, kBackward };

// Only takes: an error before the stack is empty would leak what is left on it.
Options take_options(Arguments& arguments, Family family, Direction direction);

// Describes q, k, v and the options; raises what is wrong with them, or with `out` if given.
CallDesc describe_call(const TensorRef& q, const TensorRef& k, const TensorRef& v, const Options& options,
                       const TensorRef* out = nullptr);

// A contiguous tensor of one number per row: (batch, heads_q, seq_q) or (heads_q, total_q).
template <class Void>
RowValues<Void> row_values(const TensorDesc& t, const TensorDesc& q, Layout layout, bool packed) {
  const Axes4 axes = attention_axes(q, layout);
  return {t.data, packed ? 0 : axes.shape[1] * axes.shape[2], axes.shape[2]};
}

template <class Void>
RowValues<Void> row_values(const TensorDesc& t, const CallDesc& call) {
  return row_values<Void>(t, call.q, call.layout, call.packed());
}

// The shape of the result: q's with v's last axis, in every rank and layout.
void out_shape(const CallDesc& call, int64_t shape[4]);

// The tensor whose order in memory a result takes that belongs to `t`, if not that of its axes.
inline const TensorDesc* order_of(const TensorDesc& t, const Options& options) {
  return options.as_given ? &t : nullptr;
}

}  // namespace fae::torch_ops
