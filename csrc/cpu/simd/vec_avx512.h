// AVX-512 (F, BW, DQ, VL): 32 registers of 16 floats or 8 doubles.
#pragma once

#include <immintrin.h>

#include "cpu/simd/exp2.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

struct U64 {
  using Reg = __m512i;
  static constexpr int kWidth = 8;
  static FAE_INLINE Reg set1(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
  static FAE_INLINE Reg load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static FAE_INLINE void store(uint32_t* p, Reg r) { _mm512_storeu_si512(p, r); }
  static FAE_INLINE Reg add(Reg a, Reg b) { return _mm512_add_epi64(a, b); }
  static FAE_INLINE Reg mul_low(Reg a, Reg b) { return _mm512_mul_epu32(a, b); }
  static FAE_INLINE Reg high(Reg a) { return _mm512_srli_epi64(a, 32); }
  static FAE_INLINE Reg bit_xor(Reg a, Reg b) { return _mm512_xor_si512(a, b); }
  static FAE_INLINE Reg pair_low(Reg a, Reg b) {
    return _mm512_mask_blend_epi32(0xaaaa, a, _mm512_slli_epi64(b, 32));
  }
  static FAE_INLINE Reg zip_low(Reg a, Reg b) { return _mm512_unpacklo_epi64(a, b); }
  static FAE_INLINE Reg zip_high(Reg a, Reg b) { return _mm512_unpackhi_epi64(a, b); }
};

struct F32 {
  using Elem = float;
  using Words = U64;
  using Reg = __m512;
  using Mask = __mmask16;
  static constexpr int kWidth = 16;
  // 6 x 4 accumulators + 4 columns + 1 broadcast row: 29 of 32 registers.
  static constexpr int kTileRows = 6;
  static constexpr int kTileVecs = 4;

  static FAE_INLINE Mask first(int n) { return Mask((1u << n) - 1u); }

  static FAE_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static FAE_INLINE Reg set1(float x) { return _mm512_set1_ps(x); }
  static FAE_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static FAE_INLINE Reg load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static FAE_INLINE void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static FAE_INLINE void store_n(float* p, Reg r, int n) { _mm512_mask_storeu_ps(p, first(n), r); }

  static FAE_INLINE Reg widen(__m256i bits, BFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static FAE_INLINE Reg widen(__m256i bits, Float16) { return _mm512_cvtph_ps(bits); }
  static FAE_INLINE __m256i narrow(Reg r, BFloat16) {
    // Round to nearest even by integer addition; a NaN is kept quiet instead.
    const __m512i u = _mm512_castps_si512(r);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const Mask nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static FAE_INLINE __m256i narrow(Reg r, Float16) {
    return _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <class Half>
  static FAE_INLINE Reg load(const Half* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{});
  }
  template <class Half>
  static FAE_INLINE Reg load_n(const Half* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), Half{});
  }
  template <class Half>
  static FAE_INLINE void store(Half* p, Reg r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(r, Half{}));
  }
  template <class Half>
  static FAE_INLINE void store_n(Half* p, Reg r, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(r, Half{}));
  }

  static FAE_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static FAE_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static FAE_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static FAE_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static FAE_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static FAE_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static FAE_INLINE Mask less(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static FAE_INLINE Mask equal(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static FAE_INLINE Reg select(Mask m, Reg a, Reg b) { return _mm512_mask_blend_ps(m, b, a); }
  static FAE_INLINE Mask bytes_set(const uint8_t* p, int n) {
    return Mask(_mm_test_epi8_mask(_mm_maskz_loadu_epi8(first(n), p), _mm_set1_epi8(-1)));
  }

  // vreduceps gives x - round(x), and 0 for an infinity; vscalefps underflows to 0.
  static FAE_INLINE Reg fraction(Reg x) {
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static FAE_INLINE Reg exp2(Reg x) {
    const Reg f = fraction(x);
    return _mm512_scalef_ps(exp2_polynomial<F32>(f), _mm512_sub_ps(x, f));
  }
  static FAE_INLINE float reduce_max(Reg r) { return _mm512_reduce_max_ps(r); }
  static FAE_INLINE float reduce_add(Reg r) { return _mm512_reduce_add_ps(r); }

  // The halves of a pair of registers come together by one shuffle and one or two blends.
  template <class Op>
  static FAE_INLINE Reg combine_each(const Reg* r, Op&& op) {
    Reg half[8], quarter[4], eighth[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      half[i] = op(select(0xff00, r[i + 8], r[i]), _mm512_shuffle_f32x4(r[i], r[i + 8], 0x4e));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Reg crossed = select(0xf0f0, half[i], half[i + 4]);
      quarter[i] = op(select(0xf0f0, half[i + 4], half[i]), _mm512_shuffle_f32x4(crossed, crossed, 0xb1));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      eighth[i] =
          op(select(0xcccc, quarter[i + 2], quarter[i]), _mm512_shuffle_ps(quarter[i], quarter[i + 2], 0x4e));
    }
    const Reg odd = _mm512_permute_ps(select(0xaaaa, eighth[0], eighth[1]), 0xb1);
    return op(select(0xaaaa, eighth[1], eighth[0]), odd);
  }
  static FAE_INLINE Reg reduce_each(const Reg* r) { return combine_each(r, add); }
  static FAE_INLINE Reg max_each(const Reg* r) { return combine_each(r, max); }

  static FAE_INLINE void transpose(Reg* r) {
    Reg t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // r[i + j]: column 4l + j of rows i..i+3, in lane l
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // gather lane l of the four row groups
      t[j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
      t[4 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
      t[8 + j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
      t[12 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      r[j] = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x88);
      r[8 + j] = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xdd);
      r[4 + j] = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x88);
      r[12 + j] = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xdd);
    }
  }
};

struct F64 {
  using Elem = double;
  using Words = U64;
  using Reg = __m512d;
  using Mask = __mmask8;
  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 6;
  static constexpr int kTileVecs = 4;

  static FAE_INLINE Mask first(int n) { return Mask((1u << n) - 1u); }

  static FAE_INLINE Reg zero() { return _mm512_setzero_pd(); }
  static FAE_INLINE Reg set1(double x) { return _mm512_set1_pd(x); }
  static FAE_INLINE Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static FAE_INLINE Reg load_n(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static FAE_INLINE void store(double* p, Reg r) { _mm512_storeu_pd(p, r); }
  static FAE_INLINE void store_n(double* p, Reg r, int n) { _mm512_mask_storeu_pd(p, first(n), r); }
  static FAE_INLINE Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static FAE_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static FAE_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static FAE_INLINE Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static FAE_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static FAE_INLINE Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static FAE_INLINE Mask less(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static FAE_INLINE Mask equal(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
  static FAE_INLINE Reg select(Mask m, Reg a, Reg b) { return _mm512_mask_blend_pd(m, b, a); }
  static FAE_INLINE Mask bytes_set(const uint8_t* p, int n) {
    return Mask(_mm_test_epi8_mask(_mm_maskz_loadu_epi8(first(n), p), _mm_set1_epi8(-1)));
  }
  static FAE_INLINE Reg exp2(Reg x) {
    const Reg f = _mm512_reduce_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_pd(exp2_polynomial<F64>(f), _mm512_sub_pd(x, f));
  }
  static FAE_INLINE double reduce_max(Reg r) { return _mm512_reduce_max_pd(r); }
  static FAE_INLINE double reduce_add(Reg r) { return _mm512_reduce_add_pd(r); }

  static FAE_INLINE Reg reduce_each(const Reg* r) {
    Reg half[4], quarter[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      half[i] = add(select(0xf0, r[i + 4], r[i]), _mm512_shuffle_f64x2(r[i], r[i + 4], 0x4e));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Reg crossed = select(0xcc, half[i], half[i + 2]);
      quarter[i] = add(select(0xcc, half[i + 2], half[i]), _mm512_shuffle_f64x2(crossed, crossed, 0xb1));
    }
    const Reg odd = _mm512_permute_pd(select(0xaa, quarter[0], quarter[1]), 0x55);
    return add(select(0xaa, quarter[1], quarter[0]), odd);
  }
  static FAE_INLINE void transpose(Reg* r) {
    Reg t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {  // lane l of t[i + j]: column 2l + j of rows i, i+1
      t[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Reg even_a = _mm512_shuffle_f64x2(t[j], t[2 + j], 0x88);
      const Reg even_b = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0x88);
      const Reg odd_a = _mm512_shuffle_f64x2(t[j], t[2 + j], 0xdd);
      const Reg odd_b = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0xdd);
      r[j] = _mm512_shuffle_f64x2(even_a, even_b, 0x88);
      r[4 + j] = _mm512_shuffle_f64x2(even_a, even_b, 0xdd);
      r[2 + j] = _mm512_shuffle_f64x2(odd_a, odd_b, 0x88);
      r[6 + j] = _mm512_shuffle_f64x2(odd_a, odd_b, 0xdd);
    }
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
