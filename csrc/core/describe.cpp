#include "core/describe.h"

#include <cmath>

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

View4 view_of(const TensorDesc& t, Layout layout) {
  const Axes4 axes = attention_axes(t, layout);
  View4 view;
  view.data = t.data;
  for (int i = 0; i < 4; ++i) view.stride[i] = axes.stride[i];
  return view;
}

}  // namespace

Problem make_problem(const CallDesc& call) {
  const Axes4 q = attention_axes(call.q, call.layout);
  const Axes4 k = attention_axes(call.k, call.layout);
  const Axes4 v = attention_axes(call.v, call.layout);
  Problem p;
  p.dtype = call.q.dtype;
  p.batch = q.shape[0];
  p.heads_q = q.shape[1];
  p.seq_q = q.shape[2];
  p.dim = q.shape[3];
  p.heads_kv = k.shape[1];
  p.seq_kv = k.shape[2];
  p.dim_v = v.shape[3];
  p.q = view_of(call.q, call.layout);
  p.k = view_of(call.k, call.layout);
  p.v = view_of(call.v, call.layout);

  p.masking.band = make_band(call.causal, call.window_left, call.window_right, p.seq_q, p.seq_kv);
  if (call.kv_lengths.present) {
    p.masking.kv_lengths = {call.kv_lengths.data, call.kv_lengths.stride[0],
                            call.kv_lengths.dtype == DType::kInt64};
  }
  int64_t ignored[4];
  if (call.mask.present) p.masking.mask = broadcast_view(call.mask, ignored);
  if (call.bias.present) {
    p.score.bias = broadcast_view(call.bias, ignored);
    p.score.bias_dtype = call.bias.dtype;
  }
  p.score.scale = call.scale ? *call.scale : 1.0 / std::sqrt(double(p.dim));
  p.score.softcap = call.softcap;
  return p;
}

}  // namespace fae
