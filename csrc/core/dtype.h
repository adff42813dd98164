// Element types, and the scalar conversions between storage and arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/hd.h"

namespace fae {

// kOther stands for every dtype a caller can hand in and no kernel takes; the
// describer keeps its name for the error text.
enum class DType : uint8_t { kFloat16, kBFloat16, kFloat32, kFloat64, kBool, kInt32, kInt64, kOther };

constexpr bool is_floating(DType t) { return t <= DType::kFloat64; }

constexpr int64_t size_of(DType t) {
  switch (t) {
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat64:
    case DType::kInt64: return 8;
    default: return 1;
  }
}

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBool: return "bool";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    default: return "an unsupported dtype";
  }
}

// Storage of a 16-bit float: bits with a meaning, no arithmetic of their own.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class To, class From>
FAE_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FAE_HD inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FAE_HD inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Scaling by 2^112 moves the exponent bias from 15 to 127, subnormals included.
  const float scaled = bit_cast<float>(magnitude << 13) * 5.192296858534828e+33f;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
}

FAE_HD inline float to_float(float x) { return x; }
FAE_HD inline double to_float(double x) { return x; }

// Round to nearest even; NaN stays NaN.
FAE_HD inline BFloat16 to_bfloat16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

FAE_HD inline Float16 to_float16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float adder align and round the mantissa.
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}

// Storage type <-> DType, for code that is generic over storage.
template <class T> struct DTypeOf;
template <> struct DTypeOf<Float16> { static constexpr DType value = DType::kFloat16; };
template <> struct DTypeOf<BFloat16> { static constexpr DType value = DType::kBFloat16; };
template <> struct DTypeOf<float> { static constexpr DType value = DType::kFloat32; };
template <> struct DTypeOf<double> { static constexpr DType value = DType::kFloat64; };

template <class T> FAE_HD inline T from_double(double x);
template <> FAE_HD inline double from_double<double>(double x) { return x; }
template <> FAE_HD inline float from_double<float>(double x) { return float(x); }
template <> FAE_HD inline BFloat16 from_double<BFloat16>(double x) { return to_bfloat16(float(x)); }
template <> FAE_HD inline Float16 from_double<Float16>(double x) { return to_float16(float(x)); }

// Reads element i of a floating array whose dtype is known at run time only.
FAE_HD inline double load_as_double(const void* data, DType t, int64_t i) {
  switch (t) {
    case DType::kFloat16: return to_float(static_cast<const Float16*>(data)[i]);
    case DType::kBFloat16: return to_float(static_cast<const BFloat16*>(data)[i]);
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    default: return static_cast<const double*>(data)[i];
  }
}

FAE_HD inline void store_from_double(void* data, DType t, int64_t i, double x) {
  switch (t) {
    case DType::kFloat16: static_cast<Float16*>(data)[i] = to_float16(float(x)); break;
    case DType::kBFloat16: static_cast<BFloat16*>(data)[i] = to_bfloat16(float(x)); break;
    case DType::kFloat32: static_cast<float*>(data)[i] = float(x); break;
    default: static_cast<double*>(data)[i] = x; break;
  }
}

}  // namespace fae
