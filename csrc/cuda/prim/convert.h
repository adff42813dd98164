// Conversions between fp32 and the matrix units' operand formats.
#pragma once

#include "core/dtype.h"
#include "cuda/prim/device.h"

namespace fae::cuda {

#if defined(__CUDACC__)

// Two values rounded to nearest even; the first in the lower half.
FAE_DEVICE uint32_t pack_pair(BFloat16, float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

FAE_DEVICE uint32_t pack_pair(Float16, float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

FAE_DEVICE float widen(BFloat16 x) { return to_float(x); }
FAE_DEVICE float widen(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

// fp32 bits rounded to TF32's 10 fraction bits, to nearest, ties away from zero.
FAE_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

#else

inline uint32_t pack_pair(BFloat16, float first, float second) {
  return uint32_t(to_bfloat16(first).bits) | uint32_t(to_bfloat16(second).bits) << 16;
}

inline uint32_t pack_pair(Float16, float first, float second) {
  return uint32_t(to_float16(first).bits) | uint32_t(to_float16(second).bits) << 16;
}

inline float widen(BFloat16 x) { return to_float(x); }
inline float widen(Float16 x) { return to_float(x); }

inline uint32_t to_tf32(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  // Infinities and NaNs keep what TF32 has room for; anything else rounds by its magnitude.
  return (u & 0x7f800000u) == 0x7f800000u ? (u & 0x007fffffu ? 0x7fffffffu : u) : (u + 0x1000u) & ~0x1fffu;
}

#endif

}  // namespace fae::cuda
