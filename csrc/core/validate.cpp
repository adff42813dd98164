// Everything that can be wrong with a call, in the order a reader would check it.
#include <cmath>
#include <cstring>

#include "core/checks.h"
#include "core/overlap.h"

namespace fae {
namespace {

constexpr int64_t kMaxDim = 1024;

using namespace checks;

// Every tensor of a call but q and out.
constexpr int kInputs = 12;
struct Inputs { Named list[kInputs]; };
Inputs inputs_of(const CallDesc& call) {
  return {{{"k", &call.k},
           {"v", &call.v},
           {"mask", &call.mask},
           {"bias", &call.bias},
           {"kv_lengths", &call.kv_lengths},
           {"alibi_slopes", &call.alibi_slopes},
           {"sinks", &call.sinks},
           {"rng_state", &call.rng_state},
           {"row_labels", &call.row_labels},
           {"key_bounds", &call.key_bounds},
           {"cu_seqlens_q", &call.cu_seqlens_q},
           {"cu_seqlens_k", &call.cu_seqlens_k}}};
}

const char* layout_text(int rank, Layout layout) {
  if (rank == 2) return "(seq, dim)";
  if (rank == 3) return layout == Layout::kBshd ? "(seq, heads, dim)" : "(heads, seq, dim)";
  return layout == Layout::kBshd ? "(batch, seq, heads, dim)" : "(batch, heads, seq, dim)";
}

std::optional<CallError> check_ranks(const CallDesc& call) {
  const int rank = call.q.rank;
  if (rank < 2 || rank > 4) {
    return CallError{Kind::kValue, quoted({"q", &call.q}) + ", but must have 2, 3 or 4 dimensions: " +
                                       layout_text(4, call.layout) + ", " + layout_text(3, call.layout) +
                                       " or " + layout_text(2, call.layout)};
  }
  for (const Named& t : {Named{"k", &call.k}, Named{"v", &call.v}, Named{"out", &call.out}}) {
    if (t.tensor->present && t.tensor->rank != rank) {
      return CallError{Kind::kValue, quoted(t) + ", but must have as many dimensions as q, which has shape " +
                                         shape_text(call.q)};
    }
  }
  return std::nullopt;
}

std::optional<CallError> check_dtypes(const CallDesc& call) {
  if (!is_floating(call.q.dtype)) {
    return CallError{Kind::kType, "q has dtype " + dtype_text(call.q) +
                                      ", but must be float16, bfloat16, float32 or float64"};
  }
  for (const Named& t : {Named{"k", &call.k}, Named{"v", &call.v}, Named{"out", &call.out}}) {
    if (t.tensor->present && t.tensor->dtype != call.q.dtype) {
      return CallError{Kind::kType, std::string(t.name) + " has dtype " + dtype_text(*t.tensor) +
                                        ", but must have q's dtype " + dtype_text(call.q)};
    }
  }
  if (call.mask.present && call.mask.dtype != DType::kBool) {
    return CallError{Kind::kType, "mask has dtype " + dtype_text(call.mask) +
                                      ", but must be bool (True = may attend); additive masks go to bias"};
  }
  if (call.bias.present && !is_floating(call.bias.dtype)) {
    return CallError{Kind::kType,
                     "bias has dtype " + dtype_text(call.bias) +
                         ", but must be float16, bfloat16, float32 or float64; bool masks go to mask"};
  }
  if (auto e = check_integers({"kv_lengths", &call.kv_lengths})) return e;
  return check_extended_dtypes(call);
}

std::optional<CallError> check_devices(const CallDesc& call) {
  for (const Named& t : inputs_of(call).list) {
    if (auto e = check_device(call.q, t)) return e;
  }
  return check_device(call.q, {"out", &call.out});
}

std::optional<CallError> check_shapes(const CallDesc& call) {
  const Axes4 q = attention_axes(call.q, call.layout);
  const Axes4 k = attention_axes(call.k, call.layout);
  const Axes4 v = attention_axes(call.v, call.layout);
  const std::string in_layout = std::string(" in layout ") + layout_text(call.q.rank, call.layout);
  const auto differs = [&](const Named& t, const char* axis, const Named& from) {
    return CallError{Kind::kValue, quoted(t) + in_layout + ", but its " + axis + " must equal that of " +
                                       from.name + ", which has shape " + shape_text(*from.tensor)};
  };
  const Named nq{"q", &call.q}, nk{"k", &call.k}, nv{"v", &call.v};
  if (k.shape[0] != q.shape[0]) return differs(nk, "batch", nq);
  if (v.shape[0] != q.shape[0]) return differs(nv, "batch", nq);
  if (k.shape[3] != q.shape[3]) return differs(nk, "head dim", nq);
  if (v.shape[1] != k.shape[1]) return differs(nv, "number of heads", nk);
  if (v.shape[2] != k.shape[2]) return differs(nv, "sequence length", nk);
  const int64_t heads_q = q.shape[1], heads_kv = k.shape[1];
  if (heads_kv == 0 ? heads_q != 0 : heads_q % heads_kv != 0) {
    return CallError{Kind::kValue, "q has " + std::to_string(heads_q) + " heads (shape " +
                                       shape_text(call.q) + "), but the number must be a multiple of the " +
                                       std::to_string(heads_kv) + " heads of k (shape " + shape_text(call.k) +
                                       ")"};
  }
  for (const auto& [t, dim] : {std::pair{nq, q.shape[3]}, std::pair{nv, v.shape[3]}}) {
    if (dim < 1 || dim > kMaxDim) {
      return CallError{Kind::kValue, quoted(t) + in_layout + ": its head dim is " + std::to_string(dim) +
                                         ", but must be between 1 and 1024"};
    }
  }
  return std::nullopt;
}

std::optional<CallError> check_out(const CallDesc& call) {
  if (!call.out.present) return std::nullopt;
  TensorDesc wanted = call.q;
  wanted.shape[wanted.rank - 1] = call.v.shape[call.v.rank - 1];
  for (int i = 0; i < wanted.rank; ++i) {
    if (call.out.shape[i] != wanted.shape[i]) {
      return CallError{Kind::kValue,
                       quoted({"out", &call.out}) + ", but must have shape " + shape_text(wanted)};
    }
  }
  if (overlaps_itself(call.out)) {
    TensorDesc strides = call.out;
    for (int i = 0; i < strides.rank; ++i) strides.shape[i] = strides.stride[i];
    return CallError{Kind::kValue,
                     quoted({"out", &call.out}) + " and strides " + shape_text(strides) +
                         ", so that several of its elements share memory; it must have none that do"};
  }
  const auto overlap = [&](const Named& t) -> std::optional<CallError> {
    if (!t.tensor->present || !share_memory(call.out, *t.tensor)) return std::nullopt;
    return value_error(quoted({"out", &call.out}) + " and overlaps the memory of " + t.name +
                       ", but must not overlap any input");
  };
  if (auto e = overlap({"q", &call.q})) return e;
  for (const Named& t : inputs_of(call).list) {
    if (auto e = overlap(t)) return e;
  }
  return std::nullopt;
}

}  // namespace

std::optional<CallError> validate(const CallDesc& call) {
  if (auto e = check_ranks(call)) return e;
  if (auto e = check_dtypes(call)) return e;
  if (auto e = check_devices(call)) return e;
  if (auto e = check_shapes(call)) return e;
  if (auto e = check_packing(call)) return e;
  const CallSizes n = sizes_of(call);
  if (auto e = check_extended(call, n)) return e;
  const int64_t scores[4] = {n.batch, n.heads_q, n.seq_q, n.seq_kv};
  if (call.mask_block_q == 1 && call.mask_block_kv == 1) {
    if (auto e = check_broadcast({"mask", &call.mask}, scores, "(batch, heads_q, seq_q, seq_kv)")) return e;
  } else {
    const int64_t blocks[4] = {n.batch, n.heads_q, (n.seq_q + call.mask_block_q - 1) / call.mask_block_q,
                               (n.seq_kv + call.mask_block_kv - 1) / call.mask_block_kv};
    if (auto e = check_broadcast({"mask", &call.mask}, blocks, "(batch, heads_q, blocks_q, blocks_kv)"))
      return e;
  }
  if (auto e = check_broadcast({"bias", &call.bias}, scores, "(batch, heads_q, seq_q, seq_kv)")) return e;
  if (call.kv_lengths.present && (call.kv_lengths.rank != 1 || call.kv_lengths.shape[0] != n.batch)) {
    return value_error(quoted({"kv_lengths", &call.kv_lengths}) + ", but must have shape (batch,) = (" +
                       std::to_string(n.batch) + ",)");
  }
  if (auto e = check_options(call.window_left, call.window_right, call.scale, call.softcap)) return e;
  return check_out(call);
}

}  // namespace fae
