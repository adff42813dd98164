#include "core/overlap.h"

namespace fae {
namespace {

bool has_elements(const TensorDesc& t) {
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] == 0) return false;
  }
  return true;
}

int64_t stride_bytes(const TensorDesc& t, int axis) { return t.stride[axis] * size_of(t.dtype); }

// Bytes from the first to past the last element, over the axes that step by less than
// `period`; -1 when another axis does not step by whole periods.
int64_t span_within(const TensorDesc& t, int64_t period) {
  int64_t span = size_of(t.dtype);
  for (int i = 0; i < t.rank; ++i) {
    const int64_t step = stride_bytes(t, i);
    if (t.shape[i] == 1 || step == 0) continue;
    if (step < period) span += (t.shape[i] - 1) * step;
    else if (step % period != 0) return -1;
  }
  return span;
}

// Whether all elements of a lie, modulo `period`, beside all elements of b: then no
// element of the one can be an element of the other.
bool apart_modulo(const TensorDesc& a, const TensorDesc& b, int64_t period) {
  const int64_t span_a = span_within(a, period), span_b = span_within(b, period);
  if (span_a < 0 || span_b < 0) return false;
  const auto step = uintptr_t(period);
  const uintptr_t start_a = reinterpret_cast<uintptr_t>(a.data) % step;
  const uintptr_t start_b = reinterpret_cast<uintptr_t>(b.data) % step;
  const auto a_to_b = int64_t((start_b + step - start_a) % step);
  return span_a <= a_to_b && a_to_b + span_b <= period;
}

}  // namespace

bool overlaps_itself(const TensorDesc& t) {
  if (!has_elements(t)) return false;
  // In order of stride, every axis must step over all that the smaller ones span.
  int64_t span = 1;
  bool used[TensorDesc::kMaxRank] = {};
  for (int n = 0; n < t.rank; ++n) {
    int smallest = -1;
    for (int i = 0; i < t.rank; ++i) {
      if (!used[i] && (smallest < 0 || t.stride[i] < t.stride[smallest])) smallest = i;
    }
    used[smallest] = true;
    if (t.shape[smallest] == 1) continue;
    if (t.stride[smallest] < span) return true;
    span += (t.shape[smallest] - 1) * t.stride[smallest];
  }
  return false;
}

bool share_memory(const TensorDesc& a, const TensorDesc& b) {
  if (!a.data || !b.data || !has_elements(a) || !has_elements(b)) return false;
  constexpr int64_t kWhole = int64_t(1) << 62;
  const auto first_a = reinterpret_cast<uintptr_t>(a.data), first_b = reinterpret_cast<uintptr_t>(b.data);
  if (first_a + uintptr_t(span_within(a, kWhole)) <= first_b ||
      first_b + uintptr_t(span_within(b, kWhole)) <= first_a) {
    return false;
  }
  for (const TensorDesc* t : {&a, &b}) {
    for (int i = 0; i < t->rank; ++i) {
      const int64_t period = stride_bytes(*t, i);
      if (t->shape[i] > 1 && period > 0 && apart_modulo(a, b, period)) return false;
    }
  }
  return true;
}

}  // namespace fae
