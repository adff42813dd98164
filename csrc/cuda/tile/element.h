// Single numbers in global memory, of a dtype known at run time.
#pragma once

#include "core/problem.h"
#include "cuda/prim/convert.h"
#include "cuda/prim/global.h"

namespace fae::cuda {

struct alignas(8) FloatPair { float x, y; };

// Numbers of 16 bits, of doubles, and of any dtype, in fp32. A finite value stays finite: of a bias, only
// -inf hides.
FAE_DEVICE float load_half_as_float(const void* data, DType dtype, int64_t index) {
  const uint16_t bits = load_global(static_cast<const uint16_t*>(data) + index);
  return dtype == DType::kFloat16 ? widen(Float16{bits}) : widen(BFloat16{bits});
}
FAE_DEVICE float load_double_as_float(const void* data, int64_t index) {
  const double x = load_global(static_cast<const double*>(data) + index);
  constexpr double kLargest = 3.4028234663852886e+38;
  if (x - x != 0) return float(x);
  return float(x < -kLargest ? -kLargest : x > kLargest ? kLargest : x);
}
FAE_DEVICE float load_as_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat64: return load_double_as_float(data, index);
    case DType::kFloat32: return load_global(static_cast<const float*>(data) + index);
    default: return load_half_as_float(data, dtype, index);
  }
}

FAE_DEVICE float load_head_value(const PerHead& values, int batch, int head) {
  return load_as_float(values.data, values.dtype, batch * values.stride[0] + head * values.stride[1]);
}

FAE_DEVICE void store_as(void* data, DType dtype, int64_t index, double x) {
  switch (dtype) {
    case DType::kFloat16: store_global(static_cast<Float16*>(data) + index, to_float16(float(x))); break;
    case DType::kBFloat16: store_global(static_cast<BFloat16*>(data) + index, to_bfloat16(float(x))); break;
    case DType::kFloat32: store_global(static_cast<float*>(data) + index, float(x)); break;
    default: store_global(static_cast<double*>(data) + index, x); break;
  }
}

// The log-sum-exp of query i of a head, in the width that goes with element type T.
template <class T>
FAE_DEVICE void store_lse(const RowValues<void>& to, int batch, int head, int i, double lse) {
  if (!to.present()) return;
  store_as(to.data, lse_dtype(DTypeOf<T>::value), to.index(batch, head, i), lse);
}

}  // namespace fae::cuda
