// AVX-512 BF16: a pair of products per lane and step (vdpbf16ps).
#pragma once

#include "cpu/gemm/product.h"
#include "cpu/simd/vec_avx512.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

struct Bf16DotProduct {
  using Vec = F32;
  using Operand = BFloat16;
  using Reg = __m512;  // 16 pairs, when it holds operands
  static constexpr int kPair = 2;
  static constexpr int kDepth = 2;
  static constexpr int kTileRows = F32::kTileRows, kTileVecs = F32::kTileVecs;
  static constexpr bool kTiles = false;
  struct Session {
    FAE_INLINE Session() {}
  };
  static constexpr int64_t kLongestSum = 1 << 20;  // operands are far coarser than the sum

  static FAE_INLINE Reg broadcast(const BFloat16* a) {
    int pair;
    memcpy(&pair, a, sizeof(pair));
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static FAE_INLINE Reg load(const BFloat16* b) { return _mm512_castsi512_ps(_mm512_loadu_si512(b)); }
  static FAE_INLINE Reg multiply_add(Reg acc, Reg a, Reg b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }

  // Degree 4, 2.8e-6 relative: a thousandth of what rounding to bf16 then loses.
  static FAE_INLINE Reg exp2(Reg x) {
    constexpr float c[] = {1.0f, 0.6931241929732577f, 0.24024098627253826f, 0.05590642834068685f,
                           0.009582853433786913f};
    const Reg f = F32::fraction(x);
    return _mm512_scalef_ps(horner<F32>(f, c, 4), _mm512_sub_ps(x, f));
  }
  static FAE_INLINE void store(BFloat16* p, Reg r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(r));
  }
  static FAE_INLINE void store_both(BFloat16* p, Reg first, Reg second) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
  // p[2 * lane] = even, p[2 * lane + 1] = odd
  static FAE_INLINE void store_interleaved(BFloat16* p, Reg even, Reg odd) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    // Word order 0, 16, 1, 17, ...: even's 16 results lie below odd's.
    alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(order), halves));
  }
  static FAE_INLINE __mmask32 first(int n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1u; }
  static FAE_INLINE Reg load_pairs(const BFloat16* p, int n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first(n), p));
  }
  static FAE_INLINE void store_lanes(BFloat16* p, Reg r) { _mm512_storeu_si512(p, _mm512_castps_si512(r)); }
  static FAE_INLINE void store_lanes_n(BFloat16* p, Reg r, int n) {
    _mm512_mask_storeu_epi16(p, first(n), _mm512_castps_si512(r));
  }
  static FAE_INLINE bool all_finite(Reg r) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_castps_si512(r), exponent), exponent) == 0;
  }
  // Columns 0..31 of two rows -> columns 0..15 and 16..31 as (even, odd) pairs.
  static FAE_INLINE void interleave(Reg even, Reg odd, Reg* low, Reg* high) {
    const __m512i a = _mm512_castps_si512(even), b = _mm512_castps_si512(odd);
    const __m512i lo = _mm512_unpacklo_epi16(a, b), hi = _mm512_unpackhi_epi16(a, b);
    // unpack works within 128-bit lanes: lo holds columns 8l..8l+3, hi 8l+4..8l+7.
    const __m512i first_half = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second_half = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    *low = _mm512_castsi512_ps(_mm512_permutex2var_epi64(lo, first_half, hi));
    *high = _mm512_castsi512_ps(_mm512_permutex2var_epi64(lo, second_half, hi));
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
