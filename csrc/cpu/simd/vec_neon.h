// NEON, baseline of aarch64: 32 registers of 4 floats or 2 doubles.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/exp2.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

struct U64 {
  using Reg = uint64x2_t;
  static constexpr int kWidth = 2;
  static FAE_INLINE Reg set1(uint64_t x) { return vdupq_n_u64(x); }
  static FAE_INLINE Reg load(const uint64_t* p) { return vld1q_u64(p); }
  static FAE_INLINE void store(uint32_t* p, Reg r) { vst1q_u32(p, vreinterpretq_u32_u64(r)); }
  static FAE_INLINE Reg add(Reg a, Reg b) { return vaddq_u64(a, b); }
  static FAE_INLINE Reg mul_low(Reg a, Reg b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
  static FAE_INLINE Reg high(Reg a) { return vshrq_n_u64(a, 32); }
  static FAE_INLINE Reg bit_xor(Reg a, Reg b) { return veorq_u64(a, b); }
  static FAE_INLINE Reg pair_low(Reg a, Reg b) { return vsliq_n_u64(a, b, 32); }
  static FAE_INLINE Reg zip_low(Reg a, Reg b) { return vzip1q_u64(a, b); }
  static FAE_INLINE Reg zip_high(Reg a, Reg b) { return vzip2q_u64(a, b); }
};

struct F32 {
  using Elem = float;
  using Words = U64;
  using Reg = float32x4_t;
  using Mask = uint32x4_t;
  static constexpr int kWidth = 4;
  // 4 x 4 accumulators + 4 columns + 4 rows: 24 of 32 registers. Compilers load all rows
  // ahead of the products (by element), so that 6 rows would spill accumulators.
  static constexpr int kTileRows = 4;
  static constexpr int kTileVecs = 4;

  static FAE_INLINE Reg zero() { return vdupq_n_f32(0.0f); }
  static FAE_INLINE Reg set1(float x) { return vdupq_n_f32(x); }

  static FAE_INLINE Reg load(const float* p) { return vld1q_f32(p); }
  static FAE_INLINE void store(float* p, Reg r) { vst1q_f32(p, r); }
  static FAE_INLINE Reg load(const BFloat16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(load_bits(p), 16));
  }
  static FAE_INLINE void store(BFloat16* p, Reg r) {
    // Round to nearest even by integer addition; a NaN is kept quiet instead.
    const uint32x4_t u = vreinterpretq_u32_f32(r);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    store_bits(p, vshrn_n_u32(vbslq_u32(vceqq_f32(r, r), rounded, quiet), 16));
  }
  static FAE_INLINE Reg load(const Float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_bits(p))); }
  static FAE_INLINE void store(Float16* p, Reg r) { store_bits(p, vreinterpret_u16_f16(vcvt_f16_f32(r))); }

  template <class S>
  static FAE_INLINE Reg load_n(const S* p, int n) {
    S lanes[kWidth] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  template <class S>
  static FAE_INLINE void store_n(S* p, Reg r, int n) {
    S lanes[kWidth];
    store(lanes, r);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

  static FAE_INLINE Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static FAE_INLINE Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static FAE_INLINE Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static FAE_INLINE Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static FAE_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  // Not FMAX, which returns NaN where either side is NaN.
  static FAE_INLINE Reg max(Reg a, Reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static FAE_INLINE Mask less(Reg a, Reg b) { return vcltq_f32(a, b); }
  static FAE_INLINE Mask equal(Reg a, Reg b) { return vceqq_f32(a, b); }
  static FAE_INLINE Reg select(Mask m, Reg a, Reg b) { return vbslq_f32(m, a, b); }
  static FAE_INLINE Mask bytes_set(const uint8_t* p, int n) {
    uint32_t bytes = 0;
    if (n == kWidth) memcpy(&bytes, p, 4);
    else
      for (int i = 0; i < n; ++i) bytes |= uint32_t(p[i]) << (8 * i);
    const uint32x4_t lanes = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
    return vtstq_u32(lanes, lanes);
  }

  static FAE_INLINE Reg exp2(Reg x) {
    // Below the smallest normal exponent the result is 0; a NaN passes max and mask.
    const Reg smallest = set1(-126.0f);
    const Reg clamped = max(smallest, x);
    const Reg n = vrndnq_f32(clamped);
    const Reg p = exp2_polynomial<F32>(sub(clamped, n));
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    const Reg scaled = mul(p, vreinterpretq_f32_s32(power));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(scaled), less(x, smallest)));
  }
  static FAE_INLINE float reduce_max(Reg r) { return vmaxvq_f32(r); }
  static FAE_INLINE float reduce_add(Reg r) { return vaddvq_f32(r); }
  static FAE_INLINE Reg reduce_each(const Reg* r) {
    return vpaddq_f32(vpaddq_f32(r[0], r[1]), vpaddq_f32(r[2], r[3]));
  }

  static FAE_INLINE void transpose(Reg* r) {
    // Two-by-two blocks of lanes first, then two-by-two blocks of those.
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1]));
    const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3]));
    const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
    r[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    r[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    r[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    r[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
  }

 private:
  // Through memcpy: storage types and uint16_t must not alias.
  template <class Half>
  static FAE_INLINE uint16x4_t load_bits(const Half* p) {
    uint64_t bits;
    memcpy(&bits, p, sizeof(bits));
    return vcreate_u16(bits);
  }
  template <class Half>
  static FAE_INLINE void store_bits(Half* p, uint16x4_t bits) {
    const uint64_t word = vget_lane_u64(vreinterpret_u64_u16(bits), 0);
    memcpy(p, &word, sizeof(word));
  }
};

struct F64 {
  using Elem = double;
  using Words = U64;
  using Reg = float64x2_t;
  using Mask = uint64x2_t;
  static constexpr int kWidth = 2;
  static constexpr int kTileRows = 4;
  static constexpr int kTileVecs = 4;

  static FAE_INLINE Reg zero() { return vdupq_n_f64(0.0); }
  static FAE_INLINE Reg set1(double x) { return vdupq_n_f64(x); }
  static FAE_INLINE Reg load(const double* p) { return vld1q_f64(p); }
  static FAE_INLINE Reg load_n(const double* p, int n) {
    if (n >= 2) return load(p);
    return n == 1 ? vsetq_lane_f64(p[0], zero(), 0) : zero();
  }
  static FAE_INLINE void store(double* p, Reg r) { vst1q_f64(p, r); }
  static FAE_INLINE void store_n(double* p, Reg r, int n) {
    if (n >= 2) store(p, r);
    else if (n == 1) p[0] = vgetq_lane_f64(r, 0);
  }
  static FAE_INLINE Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  static FAE_INLINE Reg sub(Reg a, Reg b) { return vsubq_f64(a, b); }
  static FAE_INLINE Reg mul(Reg a, Reg b) { return vmulq_f64(a, b); }
  static FAE_INLINE Reg div(Reg a, Reg b) { return vdivq_f64(a, b); }
  static FAE_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static FAE_INLINE Reg max(Reg a, Reg b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
  static FAE_INLINE Mask less(Reg a, Reg b) { return vcltq_f64(a, b); }
  static FAE_INLINE Mask equal(Reg a, Reg b) { return vceqq_f64(a, b); }
  static FAE_INLINE Reg select(Mask m, Reg a, Reg b) { return vbslq_f64(m, a, b); }
  static FAE_INLINE Mask bytes_set(const uint8_t* p, int n) {
    const uint64_t first = n > 0 && p[0] ? ~uint64_t(0) : 0, second = n > 1 && p[1] ? ~uint64_t(0) : 0;
    return vcombine_u64(vcreate_u64(first), vcreate_u64(second));
  }

  static FAE_INLINE Reg exp2(Reg x) {
    const Reg smallest = set1(-1022.0);
    const Reg clamped = max(smallest, x);
    const Reg n = vrndnq_f64(clamped);
    const Reg p = exp2_polynomial<F64>(sub(clamped, n));
    const int64x2_t power = vshlq_n_s64(vaddq_s64(vcvtq_s64_f64(n), vdupq_n_s64(1023)), 52);
    const Reg scaled = mul(p, vreinterpretq_f64_s64(power));
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(scaled), less(x, smallest)));
  }
  static FAE_INLINE double reduce_max(Reg r) { return vmaxvq_f64(r); }
  static FAE_INLINE double reduce_add(Reg r) { return vaddvq_f64(r); }
  static FAE_INLINE Reg reduce_each(const Reg* r) { return vpaddq_f64(r[0], r[1]); }

  static FAE_INLINE void transpose(Reg* r) {
    const Reg a = vtrn1q_f64(r[0], r[1]);
    r[1] = vtrn2q_f64(r[0], r[1]);
    r[0] = a;
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
