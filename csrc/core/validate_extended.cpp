// What can be wrong with ALiBi slopes, sinks, dropout, typed masks and packed sequences.
#include <cmath>
#include <cstring>

#include "core/checks.h"

namespace fae::checks {
namespace {

std::string list(const int64_t* shape, int64_t rank) { return shape_text(shape, rank); }

std::optional<CallError> check_shape(const Named& t, const char* axes, const int64_t* wanted, int rank) {
  if (!t.tensor->present) return std::nullopt;
  bool same = t.tensor->rank == rank;
  for (int axis = 0; same && axis < rank; ++axis) same = t.tensor->shape[axis] == wanted[axis];
  if (same) return std::nullopt;
  return value_error(quoted(t) + ", but must have shape " + axes + " = " + list(wanted, rank));
}

std::optional<CallError> check_intervals(const CallDesc& call, const CallSizes& sizes) {
  const TensorDesc &labels = call.row_labels, &bounds = call.key_bounds;
  if (labels.present != bounds.present) {
    return value_error(std::string(labels.present ? "row_labels" : "key_bounds") + " was given without " +
                       (labels.present ? "key_bounds" : "row_labels"));
  }
  if (!labels.present) return std::nullopt;
  const auto batches = [&](int64_t n) { return n == 1 || n == sizes.batch; };
  if (labels.rank != 3 || labels.shape[0] < 1 || !batches(labels.shape[1]) ||
      labels.shape[2] != sizes.seq_q) {
    return value_error(quoted({"row_labels", &labels}) +
                       ", but must have shape (n, batch or 1, seq_q) with " +
                       "batch = " + std::to_string(sizes.batch) + ", seq_q = " + std::to_string(sizes.seq_q));
  }
  if (bounds.rank != 4 || bounds.shape[0] != labels.shape[0] || !batches(bounds.shape[1]) ||
      bounds.shape[2] != sizes.seq_kv || bounds.shape[3] != 2) {
    return value_error(
        quoted({"key_bounds", &bounds}) +
        ", but must have shape (n, batch or 1, seq_kv, 2) with n = " + std::to_string(labels.shape[0]) +
        ", batch = " + std::to_string(sizes.batch) + ", seq_kv = " + std::to_string(sizes.seq_kv));
  }
  return std::nullopt;
}

std::optional<CallError> check_dropout(const CallDesc& call) {
  if (!std::isfinite(call.dropout_p) || call.dropout_p < 0 || call.dropout_p >= 1) {
    return value_error("dropout_p is " + std::to_string(call.dropout_p) + ", but must be in [0, 1)");
  }
  if (call.rng_state.present != (call.dropout_p > 0)) {
    return value_error(call.rng_state.present ? "rng_state was given, but dropout_p is 0"
                                              : "rng_state must be given where dropout_p is above 0");
  }
  const int64_t two = 2;
  return check_shape({"rng_state", &call.rng_state}, "(2,)", &two, 1);
}

}  // namespace

std::optional<CallError> check_starts(const Named& t, const Named& rows, int64_t max_length,
                                      const char* max_name) {
  const TensorDesc& x = *t.tensor;
  if (!x.present) return std::nullopt;
  if (x.rank != 1 || x.shape[0] < 1) {
    return value_error(quoted(t) + ", but must have shape (batch + 1,)");
  }
  if (max_length < -1) {
    return value_error(std::string(max_name) + " is " + std::to_string(max_length) +
                       ", but must be at least 0, or None");
  }
  if (!x.data || std::strcmp(x.device, "cpu") != 0) return std::nullopt;  // kernels stay within q and k
  const Integers starts{x.data, x.stride[0], x.dtype == DType::kInt64};
  const auto entry = [&](int64_t b) {
    return "entry " + std::to_string(b) + " is " + std::to_string(starts.at(b));
  };
  const std::string name = t.name;
  if (starts.at(0) != 0) return value_error(name + " must start with 0, but " + entry(0));
  const int64_t last = x.shape[0] - 1, total = rows.tensor->shape[0];
  for (int64_t b = 1; b <= last; ++b) {
    const int64_t length = starts.at(b) - starts.at(b - 1);
    if (length < 0) return value_error(name + " must not decrease, but " + entry(b - 1) + " and " + entry(b));
    if (starts.at(b) > total) {
      return value_error(name + " has entries up to " + std::to_string(starts.at(b)) + ", but " + rows.name +
                         " has only " + std::to_string(total) + " rows: its shape is " +
                         shape_text(*rows.tensor));
    }
    if (max_length >= 0 && length > max_length) {
      return value_error(name + " has a sequence of length " + std::to_string(length) + ", but " + max_name +
                         " is " + std::to_string(max_length));
    }
  }
  return std::nullopt;
}

std::optional<CallError> check_broadcast(const Named& t, const int64_t wanted[4], const char* axes) {
  if (!t.tensor->present) return std::nullopt;
  bool fits = t.tensor->rank <= 4;
  for (int axis = 0; fits && axis < t.tensor->rank; ++axis) {
    const int64_t size = t.tensor->shape[axis];
    fits = size == 1 || size == wanted[axis + 4 - t.tensor->rank];
  }
  if (fits) return std::nullopt;
  return value_error(quoted(t) + ", but must be broadcastable to " + axes + " = " + list(wanted, 4));
}

std::optional<CallError> check_extended_dtypes(const CallDesc& call) {
  for (const Named& t : {Named{"alibi_slopes", &call.alibi_slopes}, Named{"sinks", &call.sinks}}) {
    if (auto e = check_floating(t)) return e;
  }
  for (const Named& t : {Named{"row_labels", &call.row_labels}, Named{"key_bounds", &call.key_bounds}}) {
    if (t.tensor->present && t.tensor->dtype != DType::kInt32) {
      return CallError{Kind::kType,
                       std::string(t.name) + " has dtype " + dtype_text(*t.tensor) + ", but must be int32"};
    }
  }
  if (call.rng_state.present && call.rng_state.dtype != DType::kInt64) {
    return CallError{Kind::kType,
                     "rng_state has dtype " + dtype_text(call.rng_state) + ", but must be int64"};
  }
  if (auto e = check_integers({"cu_seqlens_q", &call.cu_seqlens_q})) return e;
  return check_integers({"cu_seqlens_k", &call.cu_seqlens_k});
}

std::optional<CallError> check_packing(const CallDesc& call) {
  const TensorDesc &starts_q = call.cu_seqlens_q, &starts_k = call.cu_seqlens_k;
  if (starts_q.present != starts_k.present) {
    return value_error(std::string(starts_q.present ? "cu_seqlens_q" : "cu_seqlens_k") +
                       " was given without " + (starts_q.present ? "cu_seqlens_k" : "cu_seqlens_q"));
  }
  if (!call.packed()) return std::nullopt;
  if (call.q.rank != 3 || call.layout != Layout::kBshd) {
    return value_error(quoted({"q", &call.q}) + ", but with cu_seqlens_q it must be (total_q, heads, dim)");
  }
  if (auto e = check_starts({"cu_seqlens_q", &starts_q}, {"q", &call.q}, call.max_seqlen_q, "max_seqlen_q"))
    return e;
  if (auto e = check_starts({"cu_seqlens_k", &starts_k}, {"k", &call.k}, call.max_seqlen_k, "max_seqlen_k"))
    return e;
  const int64_t same = starts_q.shape[0];
  return check_shape({"cu_seqlens_k", &starts_k}, "(batch + 1,)", &same, 1);
}

std::optional<CallError> check_extended(const CallDesc& call, const CallSizes& sizes) {
  if (call.mask_block_q < 1 || call.mask_block_kv < 1) {
    return value_error("mask_block_q and mask_block_kv are " + std::to_string(call.mask_block_q) + " and " +
                       std::to_string(call.mask_block_kv) + ", but must be at least 1");
  }
  const Named per_score[] = {{"mask", &call.mask}, {"bias", &call.bias}, {"row_labels", &call.row_labels}};
  for (const Named& t : per_score) {
    if (t.tensor->present && !(sizes.known_q && sizes.known_kv)) {
      return value_error(std::string(sizes.known_q ? "max_seqlen_k" : "max_seqlen_q") +
                         " must be given together with " + t.name +
                         ", where cu_seqlens are not to be read without waiting for the device");
    }
  }
  if (auto e = check_slopes(call.alibi_slopes, sizes.batch, sizes.heads_q)) return e;
  if (auto e = check_shape({"sinks", &call.sinks}, "(heads_q,)", &sizes.heads_q, 1)) return e;
  if (auto e = check_intervals(call, sizes)) return e;
  return check_dropout(call);
}

}  // namespace fae::checks
