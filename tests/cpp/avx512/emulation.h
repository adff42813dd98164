// The AVX-512 and AMX intrinsics that the kernels use, for processors with AVX2 alone.
//
// Included ahead of an isa/*.cpp or a probe (-include), so that these are compiled as they are and every
// instruction of theirs has its meaning from Intel's manual, rounding included. Vectors are the compiler's
// own of 64 bytes, which it makes of two registers. See run_avx512.sh.
#pragma once

#include "cpu/isa/prologue.h"

#undef FAE_TARGET_BEGIN
#define FAE_TARGET_BEGIN(features)                          \
  FAE_PRAGMA(GCC diagnostic ignored "-Wpsabi")              \
  FAE_PRAGMA(GCC diagnostic ignored "-Wignored-attributes") \
  FAE_PRAGMA(GCC push_options) FAE_PRAGMA(GCC target("avx2,fma,f16c"))

FAE_TARGET_BEGIN("")

namespace fae_avx512 {

#define FAE_EMULATED inline __attribute__((always_inline))
#define FAE_EMULATED_CALL inline __attribute__((noinline))  // of many instructions, compiled once

typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class To, class From>
FAE_EMULATED To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// One instruction of 256 bits on either half.
template <class Vector, class Half>
struct Halves {
  Half half[2];
  explicit FAE_EMULATED Halves(Vector v) { memcpy(half, &v, sizeof(v)); }
  FAE_EMULATED Halves() {}
  FAE_EMULATED Vector whole() const { return bits_of<Vector>(half); }
};
using Singles = Halves<__m512, __m256>;
using Doubles = Halves<__m512d, __m256d>;

// Lane masks as bits and as lanes of ones.
FAE_EMULATED i32x16 lanes_of(__mmask16 mask) {
  const i32x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (bit & int32_t(mask)) != 0;
}
FAE_EMULATED i64x8 lanes_of(__mmask8 mask) {
  const i64x8 bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return (bit & int64_t(mask)) != 0;
}
FAE_EMULATED __mmask16 mask_of(i32x16 lanes) {
  const Singles h(bits_of<__m512>(lanes));
  return __mmask16(_mm256_movemask_ps(h.half[0]) | _mm256_movemask_ps(h.half[1]) << 8);
}
FAE_EMULATED __mmask8 mask_of(i64x8 lanes) {
  const Doubles h(bits_of<__m512d>(lanes));
  return __mmask8(_mm256_movemask_pd(h.half[0]) | _mm256_movemask_pd(h.half[1]) << 4);
}
template <int kPredicate, class V>
FAE_EMULATED auto compare(V a, V b) {
  static_assert(kPredicate == _CMP_LT_OQ || kPredicate == _CMP_EQ_OQ || kPredicate == _CMP_UNORD_Q);
  if constexpr (kPredicate == _CMP_LT_OQ) return mask_of(a < b);
  else if constexpr (kPredicate == _CMP_EQ_OQ) return mask_of(a == b);
  else return mask_of((a != a) | (b != b));
}
FAE_EMULATED __mmask32 equal_words(__m512i a, __m512i b) {
  const i16x32 lanes = bits_of<i16x32>(a) == bits_of<i16x32>(b);
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= uint32_t(lanes[i] & 1) << i;
  return mask;
}
FAE_EMULATED __mmask16 test_bytes(__m128i a, __m128i b) {
  return __mmask16(~_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128())));
}

// Memory. What a mask leaves out is not touched.
template <class V, class T>
FAE_EMULATED V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class V, class T>
FAE_EMULATED void store(T* p, V v) {
  memcpy(p, &v, sizeof(v));
}
template <class V, class Element, class T>
FAE_EMULATED_CALL V load_masked(uint64_t mask, const T* p) {
  Element lanes[sizeof(V) / sizeof(Element)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(Element); ++i) {
    if (mask >> i & 1) memcpy(lanes + i, reinterpret_cast<const Element*>(p) + i, sizeof(Element));
  }
  return bits_of<V>(lanes);
}
template <class Element, class T, class V>
FAE_EMULATED_CALL void store_masked(T* p, uint64_t mask, V v) {
  Element lanes[sizeof(V) / sizeof(Element)];
  memcpy(lanes, &v, sizeof(v));
  for (size_t i = 0; i < sizeof(V) / sizeof(Element); ++i) {
    if (mask >> i & 1) memcpy(reinterpret_cast<Element*>(p) + i, lanes + i, sizeof(Element));
  }
}

// Arithmetic.
FAE_EMULATED __m512 fma(__m512 a, __m512 b, __m512 c) {
  Singles x(a), y(b), z(c);
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole();
}
FAE_EMULATED __m512d fma(__m512d a, __m512d b, __m512d c) {
  Doubles x(a), y(b), z(c);
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_pd(x.half[i], y.half[i], z.half[i]);
  return z.whole();
}
// vreduceps, vreducepd: x less its nearest whole number; 0 for infinities.
FAE_EMULATED __m512 fraction(__m512 x) {
  Singles n(x);
  for (auto& half : n.half) half = _mm256_round_ps(half, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 whole = n.whole(), infinity = __m512{} + __builtin_inff(), zero{};
  return (x == infinity) | (x == -infinity) ? zero : x - whole;
}
FAE_EMULATED __m512d fraction(__m512d x) {
  Doubles n(x);
  for (auto& half : n.half) half = _mm256_round_pd(half, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512d whole = n.whole(), infinity = __m512d{} + __builtin_inf(), zero{};
  return (x == infinity) | (x == -infinity) ? zero : x - whole;
}
// vscalefps, vscalefpd: a 2^floor(b), rounded once.
template <class V, class Real>
FAE_EMULATED_CALL V scale(V a, V b) {
  constexpr int kLanes = int(sizeof(V) / sizeof(Real));
  Real x[kLanes], n[kLanes];
  memcpy(x, &a, sizeof(a));
  memcpy(n, &b, sizeof(b));
  for (int i = 0; i < kLanes; ++i) {
    const Real power = n[i] > 5000 ? Real(5000) : n[i] < -5000 ? Real(-5000) : n[i];
    x[i] = n[i] != n[i] ? n[i] : Real(scalbn(x[i], int(__builtin_floor(power))));
  }
  return bits_of<V>(x);
}
template <class V, class Fn>
FAE_EMULATED auto fold(V v, Fn&& fn) {  // halves together until one lane is left
  constexpr int kLanes = int(sizeof(v) / sizeof(v[0]));
  auto first = v[0];
  decltype(first) lanes[kLanes];
  memcpy(lanes, &v, sizeof(v));
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] = fn(lanes[i], lanes[i + n]);
  }
  return lanes[0];
}
template <class V>
FAE_EMULATED_CALL auto sum(V v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}
template <class V>
FAE_EMULATED_CALL auto maximum(V v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// 16-bit floats.
FAE_EMULATED __m512 from_half(__m256i bits) {
  Singles r;
  r.half[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
  r.half[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
  return r.whole();
}
FAE_EMULATED __m256i to_half(__m512 x) {
  constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const Singles h(x);
  return _mm256_set_m128i(_mm256_cvtps_ph(h.half[1], kRound), _mm256_cvtps_ph(h.half[0], kRound));
}
FAE_EMULATED u32x16 normal_or_zero(u32x16 x) {  // subnormal numbers count as 0 in the instructions on bf16
  const u32x16 sign = x & 0x80000000u;
  return (x & 0x7f800000u) == 0 ? sign : x;
}
FAE_EMULATED u16x16 to_bfloat16(__m512 x) {
  const u32x16 u = normal_or_zero(bits_of<u32x16>(x));
  const u32x16 rounded = u + 0x7fffu + (u >> 16 & 1u), quiet = u | 0x400000u;
  return __builtin_convertvector((x != x ? quiet : rounded) >> 16, u16x16);
}
FAE_EMULATED u16x32 to_bfloat16(__m512 high, __m512 low) {
  const u16x16 both[2] = {to_bfloat16(low), to_bfloat16(high)};
  return bits_of<u16x32>(both);
}
// vdpbf16ps: the products of odd elements first, each added with one rounding.
FAE_EMULATED __m512 dot_bfloat16(__m512 sum, u32x16 a, u32x16 b) {
  const auto value = [](u32x16 x) { return bits_of<__m512>(normal_or_zero(x)); };
  const auto flushed = [&](__m512 x) { return value(bits_of<u32x16>(x)); };
  sum = flushed(fma(value(a & 0xffff0000u), value(b & 0xffff0000u), flushed(sum)));
  return flushed(fma(value(a << 16), value(b << 16), sum));
}

// Lane orders: element i of the result is element index[i] of a, or of b from the number of lanes on.
template <int kImmediate>
FAE_EMULATED i32x16 quads_of_lanes() {  // vshuff32x4 in elements of 32 bits
  i32x16 index;
  for (int i = 0; i < 16; ++i) {
    const int lane = i / 4;
    index[i] = (kImmediate >> (2 * lane) & 3) * 4 + i % 4 + (lane >= 2 ? 16 : 0);
  }
  return index;
}
template <int kImmediate>
FAE_EMULATED i32x16 shuffled() {  // vshufps
  i32x16 index;
  for (int i = 0; i < 16; ++i)
    index[i] = i / 4 * 4 + (kImmediate >> (2 * (i % 4)) & 3) + (i % 4 >= 2 ? 16 : 0);
  return index;
}
template <int kImmediate>
FAE_EMULATED i32x16 permuted() {  // vpermilps
  i32x16 index;
  for (int i = 0; i < 16; ++i) index[i] = i / 4 * 4 + (kImmediate >> (2 * (i % 4)) & 3);
  return index;
}
template <int kImmediate>
FAE_EMULATED i64x8 permuted_pairs() {  // vpermilpd
  i64x8 index;
  for (int i = 0; i < 8; ++i) index[i] = i / 2 * 2 + (kImmediate >> i & 1);
  return index;
}
template <class Index, int kElements, int kHigh>
FAE_EMULATED Index unpacked() {  // vunpcklps and its kin: kElements to a lane of 128 bits
  Index index;
  constexpr int kAll = kElements * 4;
  for (int i = 0; i < kAll; ++i)
    index[i] = i / kElements * kElements + kHigh * kElements / 2 + i % kElements / 2 + (i % 2 ? kAll : 0);
  return index;
}
template <class V, class Index>
FAE_EMULATED V shuffle(V a, V b, Index index) {
  return bits_of<V>(__builtin_shuffle(bits_of<Index>(a), bits_of<Index>(b), index));
}

}  // namespace fae_avx512

FAE_TARGET_END

#include "avx512/intrinsics.h"
#include "avx512/tiles.h"
