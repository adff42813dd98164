// AVX2 + FMA + F16C: 16 registers of 8 floats or 4 doubles.
#pragma once

#include <immintrin.h>

#include "cpu/simd/exp2.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// Lane masks for the first n of 8 32-bit or 4 64-bit lanes, read at an offset.
inline const int32_t* first_lanes_32(int n) {
  alignas(64) static const int32_t window[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  return window + 8 - n;
}

struct U64 {
  using Reg = __m256i;
  static constexpr int kWidth = 4;
  static FAE_INLINE Reg set1(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
  static FAE_INLINE Reg load(const uint64_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static FAE_INLINE void store(uint32_t* p, Reg r) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), r); }
  static FAE_INLINE Reg add(Reg a, Reg b) { return _mm256_add_epi64(a, b); }
  static FAE_INLINE Reg mul_low(Reg a, Reg b) { return _mm256_mul_epu32(a, b); }
  static FAE_INLINE Reg high(Reg a) { return _mm256_srli_epi64(a, 32); }
  static FAE_INLINE Reg bit_xor(Reg a, Reg b) { return _mm256_xor_si256(a, b); }
  static FAE_INLINE Reg pair_low(Reg a, Reg b) {
    return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa);
  }
  static FAE_INLINE Reg zip_low(Reg a, Reg b) { return _mm256_unpacklo_epi64(a, b); }
  static FAE_INLINE Reg zip_high(Reg a, Reg b) { return _mm256_unpackhi_epi64(a, b); }
};

struct F32 {
  using Elem = float;
  using Words = U64;
  using Reg = __m256;
  using Mask = __m256;
  static constexpr int kWidth = 8;
  // 6 x 2 accumulators + 2 columns + 1 broadcast row: 15 of 16 registers.
  static constexpr int kTileRows = 6;
  static constexpr int kTileVecs = 2;

  static FAE_INLINE __m256i first(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first_lanes_32(n)));
  }

  static FAE_INLINE Reg zero() { return _mm256_setzero_ps(); }
  static FAE_INLINE Reg set1(float x) { return _mm256_set1_ps(x); }
  static FAE_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static FAE_INLINE Reg load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static FAE_INLINE void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static FAE_INLINE void store_n(float* p, Reg r, int n) { _mm256_maskstore_ps(p, first(n), r); }

  static FAE_INLINE Reg widen(__m128i bits, BFloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static FAE_INLINE Reg widen(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }
  static FAE_INLINE __m128i narrow(Reg r, BFloat16) {
    // Round to nearest even by integer addition; a NaN is kept quiet instead.
    const __m256i u = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    return _mm256_castsi256_si128(packed);
  }
  static FAE_INLINE __m128i narrow(Reg r, Float16) {
    return _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <class Half>
  static FAE_INLINE Reg load(const Half* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{});
  }
  template <class Half>
  static FAE_INLINE Reg load_n(const Half* p, int n) {
    Half lanes[kWidth] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  template <class Half>
  static FAE_INLINE void store(Half* p, Reg r) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(r, Half{}));
  }
  template <class Half>
  static FAE_INLINE void store_n(Half* p, Reg r, int n) {
    Half lanes[kWidth];
    store(lanes, r);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

  static FAE_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static FAE_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static FAE_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static FAE_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static FAE_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static FAE_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static FAE_INLINE Mask less(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static FAE_INLINE Mask equal(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static FAE_INLINE Reg select(Mask m, Reg a, Reg b) { return _mm256_blendv_ps(b, a, m); }
  static FAE_INLINE Mask bytes_set(const uint8_t* p, int n) {
    uint64_t bytes = 0;
    if (n == kWidth) memcpy(&bytes, p, 8);
    else
      for (int i = 0; i < n; ++i) bytes |= uint64_t(p[i]) << (8 * i);
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes)));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(lanes, _mm256_setzero_si256()));
  }

  static FAE_INLINE Reg exp2(Reg x) {
    // The sum's low bits are the nearest integer and the exponent's bias; with -127 they are 0, and so is the
    // power. A NaN passes max, and what it is multiplied with does not matter.
    const Reg magic = set1(12582912.0f + 127), clamped = max(set1(-127.0f), x), shifted = add(clamped, magic);
    const Reg p = exp2_polynomial<F32>(sub(clamped, sub(shifted, magic)));
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
  }
  static FAE_INLINE float reduce_max(Reg r) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static FAE_INLINE float reduce_add(Reg r) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // The halves of a pair of registers come together by one shuffle and two blends.
  static FAE_INLINE Reg reduce_each(const Reg* r) {
    Reg half[4], quarter[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Reg crossed = _mm256_permute2f128_ps(r[i], r[i + 4], 0x21);
      half[i] = add(_mm256_blend_ps(r[i], r[i + 4], 0xf0), crossed);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Reg crossed = _mm256_shuffle_ps(half[i], half[i + 2], 0x4e);
      quarter[i] = add(_mm256_blend_ps(half[i], half[i + 2], 0xcc), crossed);
    }
    const Reg odd = _mm256_permute_ps(_mm256_blend_ps(quarter[1], quarter[0], 0xaa), 0xb1);
    return add(_mm256_blend_ps(quarter[0], quarter[1], 0xaa), odd);
  }

  static FAE_INLINE void transpose(Reg* r) {
    Reg t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // r[i + j]: column 4l + j of rows i..i+3, in 128-bit lane l
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
      t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) r[j] = t[j];
  }
};

struct F64 {
  using Elem = double;
  using Words = U64;
  using Reg = __m256d;
  using Mask = __m256d;
  static constexpr int kWidth = 4;
  static constexpr int kTileRows = 6;
  static constexpr int kTileVecs = 2;

  // Pairs of 32-bit lanes make 64-bit ones.
  static FAE_INLINE __m256i first(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first_lanes_32(2 * n)));
  }

  static FAE_INLINE Reg zero() { return _mm256_setzero_pd(); }
  static FAE_INLINE Reg set1(double x) { return _mm256_set1_pd(x); }
  static FAE_INLINE Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static FAE_INLINE Reg load_n(const double* p, int n) { return _mm256_maskload_pd(p, first(n)); }
  static FAE_INLINE void store(double* p, Reg r) { _mm256_storeu_pd(p, r); }
  static FAE_INLINE void store_n(double* p, Reg r, int n) { _mm256_maskstore_pd(p, first(n), r); }
  static FAE_INLINE Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static FAE_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static FAE_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static FAE_INLINE Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static FAE_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static FAE_INLINE Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static FAE_INLINE Mask less(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
  static FAE_INLINE Mask equal(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
  static FAE_INLINE Reg select(Mask m, Reg a, Reg b) { return _mm256_blendv_pd(b, a, m); }
  static FAE_INLINE Mask bytes_set(const uint8_t* p, int n) {
    uint32_t bytes = 0;
    for (int i = 0; i < n; ++i) bytes |= uint32_t(p[i]) << (8 * i);
    const __m256i lanes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(int(bytes)));
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(lanes, _mm256_setzero_si256()));
  }

  static FAE_INLINE Reg exp2(Reg x) {
    const Reg magic = set1(6755399441055744.0 + 1023), clamped = max(set1(-1023.0), x);
    const Reg shifted = add(clamped, magic);
    const Reg p = exp2_polynomial<F64>(sub(clamped, sub(shifted, magic)));
    return mul(p, _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(shifted), 52)));
  }
  static FAE_INLINE double reduce_max(Reg r) {
    const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(r), _mm256_extractf128_pd(r, 1));
    return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
  }
  static FAE_INLINE double reduce_add(Reg r) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(r), _mm256_extractf128_pd(r, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
  static FAE_INLINE Reg reduce_each(const Reg* r) {
    const Reg a = _mm256_hadd_pd(r[0], r[1]), b = _mm256_hadd_pd(r[2], r[3]);
    return add(_mm256_permute2f128_pd(a, b, 0x21), _mm256_blend_pd(a, b, 0xc));
  }
  static FAE_INLINE void transpose(Reg* r) {
    const Reg a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    const Reg c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
