#include "core/describe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fae {

std::string shape_text(const int64_t* shape, int64_t rank) {
  std::string text = "(";
  for (int64_t i = 0; i < rank; ++i) {
    if (i) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + (rank == 1 ? ",)" : ")");
}

CallError too_many_axes(const char* name, const int64_t* shape, int64_t rank) {
  return {CallError::Kind::kValue, std::string(name) + " has shape " + shape_text(shape, rank) +
                                       ", but must have at most 4 dimensions"};
}

std::optional<CallError> set_layout_and_causal(CallDesc* call, int64_t layout, int64_t causal) {
  if (layout < 0 || layout > 1) {
    return CallError{CallError::Kind::kValue,
                     "layout is " + std::to_string(layout) + ", but must be 0 (bshd) or 1 (bhsd)"};
  }
  if (causal < 0 || causal > 2) {
    return CallError{CallError::Kind::kValue, "causal is " + std::to_string(causal) +
                                                  ", but must be 0 (none), 1 (bottom right) or 2 (top left)"};
  }
  call->layout = static_cast<Layout>(layout);
  call->causal = static_cast<Causal>(causal);
  return std::nullopt;
}

Axes4 attention_axes(const TensorDesc& t, Layout layout) {
  const int64_t* n = t.shape;
  const int64_t* s = t.stride;
  switch (t.rank) {
    case 2: return {{1, 1, n[0], n[1]}, {0, 0, s[0], s[1]}};
    case 3:
      if (layout == Layout::kBshd) return {{1, n[1], n[0], n[2]}, {0, s[1], s[0], s[2]}};
      return {{1, n[0], n[1], n[2]}, {0, s[0], s[1], s[2]}};
    default:
      if (layout == Layout::kBshd) return {{n[0], n[2], n[1], n[3]}, {s[0], s[2], s[1], s[3]}};
      return {{n[0], n[1], n[2], n[3]}, {s[0], s[1], s[2], s[3]}};
  }
}

View4 attention_view(const TensorDesc& t, Layout layout) {
  const Axes4 axes = attention_axes(t, layout);
  return {t.data, {axes.stride[0], axes.stride[1], axes.stride[2], axes.stride[3]}};
}

View4 broadcast_view(const TensorDesc& t, int64_t shape[4]) {
  View4 view;
  view.data = t.data;
  for (int axis = 0; axis < 4; ++axis) {
    const int own = axis - (4 - t.rank);
    shape[axis] = own >= 0 ? t.shape[own] : 1;
    view.stride[axis] = own >= 0 && t.shape[own] != 1 ? t.stride[own] : 0;
  }
  return view;
}

namespace {

void set_intervals(const CallDesc& call, Intervals* intervals) {
  const TensorDesc &labels = call.row_labels, &bounds = call.key_bounds;
  intervals->labels = static_cast<const int32_t*>(labels.data);
  intervals->bounds = static_cast<const int32_t*>(bounds.data);
  intervals->count = labels.shape[0];
  for (int axis = 0; axis < 3; ++axis)
    intervals->label_stride[axis] = labels.shape[axis] == 1 ? 0 : labels.stride[axis];
  for (int axis = 0; axis < 4; ++axis)
    intervals->bound_stride[axis] = bounds.shape[axis] == 1 ? 0 : bounds.stride[axis];
}

}  // namespace

Integers integers_of(const TensorDesc& t) {
  if (!t.present) return {};
  return {t.data, t.stride[0], t.dtype == DType::kInt64};
}

int64_t longest_sequence(const TensorDesc& cu_seqlens, int64_t total, int64_t given, bool* known) {
  *known = true;
  if (cu_seqlens.data && std::strcmp(cu_seqlens.device, "cpu") == 0) {
    const Integers starts = integers_of(cu_seqlens);
    int64_t most = 0;
    for (int64_t b = 0; b + 1 < cu_seqlens.shape[0]; ++b)
      most = std::max(most, starts.at(b + 1) - starts.at(b));
    return std::min(most, total);
  }
  *known = given >= 0;
  return given >= 0 ? std::min(given, total) : total;
}

PerHead per_head(const TensorDesc& t) {
  if (!t.present) return {};
  const int64_t head = t.stride[t.rank - 1];
  const bool batched = t.rank == 2 && t.shape[0] != 1;
  return {t.data, t.dtype, {batched ? t.stride[0] : 0, head}};
}

CallSizes sizes_of(const CallDesc& call) {
  const Axes4 q = attention_axes(call.q, call.layout);
  const Axes4 k = attention_axes(call.k, call.layout);
  CallSizes sizes{q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]};
  if (call.packed()) {
    sizes.batch = call.cu_seqlens_q.shape[0] - 1;
    sizes.seq_q = longest_sequence(call.cu_seqlens_q, q.shape[2], call.max_seqlen_q, &sizes.known_q);
    sizes.seq_kv = longest_sequence(call.cu_seqlens_k, k.shape[2], call.max_seqlen_k, &sizes.known_kv);
  }
  return sizes;
}

Problem make_problem(const CallDesc& call) {
  const CallSizes sizes = sizes_of(call);
  Problem p;
  p.dtype = call.q.dtype;
  p.batch = sizes.batch;
  p.heads_q = sizes.heads_q;
  p.seq_q = sizes.seq_q;
  p.dim = attention_axes(call.q, call.layout).shape[3];
  p.heads_kv = sizes.heads_kv;
  p.seq_kv = sizes.seq_kv;
  p.dim_v = attention_axes(call.v, call.layout).shape[3];
  p.q = attention_view(call.q, call.layout);
  p.k = attention_view(call.k, call.layout);
  p.v = attention_view(call.v, call.layout);

  p.band_rule = {call.causal, call.window_left, call.window_right};
  p.masking.band = p.band_rule.of(p.seq_q, p.seq_kv);
  if (call.packed() && call.cu_seqlens_q.data && call.cu_seqlens_k.data) {
    p.packing = {integers_of(call.cu_seqlens_q), integers_of(call.cu_seqlens_k),
                 attention_axes(call.q, call.layout).shape[2], attention_axes(call.k, call.layout).shape[2]};
  }
  if (call.kv_lengths.present) p.masking.kv_lengths = {integers_of(call.kv_lengths)};
  int64_t ignored[4];
  if (call.mask.present) {
    p.masking.mask = {broadcast_view(call.mask, ignored), call.mask_block_q, call.mask_block_kv};
  }
  if (call.row_labels.present) set_intervals(call, &p.masking.intervals);
  if (call.bias.present) {
    p.score.bias = broadcast_view(call.bias, ignored);
    p.score.bias_dtype = call.bias.dtype;
  }
  p.score.scale = call.scale ? *call.scale : 1.0 / std::sqrt(double(p.dim));
  p.score.softcap = call.softcap;
  p.score.alibi = per_head(call.alibi_slopes);
  p.score.sinks = per_head(call.sinks);
  if (call.rng_state.present) {
    p.dropout = make_dropout(call.dropout_p, static_cast<const int64_t*>(call.rng_state.data),
                             call.rng_state.stride[0]);
  }
  return p;
}

}  // namespace fae
