// Plain C++: short arrays that any compiler can map to whatever vectors the baseline has.
#pragma once

#include "cpu/simd/exp2.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

struct U64 {
  using Reg = uint64_t;
  static constexpr int kWidth = 1;
  static FAE_INLINE Reg set1(uint64_t x) { return x; }
  static FAE_INLINE Reg load(const uint64_t* p) { return *p; }
  static FAE_INLINE void store(uint32_t* p, Reg r) {
    p[0] = uint32_t(r);
    p[1] = uint32_t(r >> 32);
  }
  static FAE_INLINE Reg add(Reg a, Reg b) { return a + b; }
  static FAE_INLINE Reg mul_low(Reg a, Reg b) { return uint64_t(uint32_t(a)) * uint32_t(b); }
  static FAE_INLINE Reg high(Reg a) { return a >> 32; }
  static FAE_INLINE Reg bit_xor(Reg a, Reg b) { return a ^ b; }
  static FAE_INLINE Reg pair_low(Reg a, Reg b) { return uint32_t(a) | b << 32; }
  static FAE_INLINE Reg zip_low(Reg a, Reg) { return a; }
  static FAE_INLINE Reg zip_high(Reg, Reg b) { return b; }
};

template <class Real, int kLanes>
struct ArrayVec {
  using Elem = Real;
  using Words = U64;
  static constexpr int kWidth = kLanes;
  static constexpr int kTileRows = 4;
  static constexpr int kTileVecs = 2;
  struct Reg { Real lane[kLanes]; };
  struct Mask { bool lane[kLanes]; };

  static FAE_INLINE Reg zero() { return set1(0); }
  static FAE_INLINE Reg set1(Real x) {
    Reg r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = x;
    return r;
  }
  template <class S>
  static FAE_INLINE Reg load(const S* p) {
    Reg r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = to_float(p[i]);
    return r;
  }
  template <class S>
  static FAE_INLINE Reg load_n(const S* p, int n) {
    Reg r = zero();
    for (int i = 0; i < n; ++i) r.lane[i] = to_float(p[i]);
    return r;
  }
  template <class S>
  static FAE_INLINE void store(S* p, Reg r) {
    store_n(p, r, kLanes);
  }
  template <class S>
  static FAE_INLINE void store_n(S* p, Reg r, int n) {
    for (int i = 0; i < n; ++i) p[i] = from_double<S>(double(r.lane[i]));
  }

#define FAE_LANES(type, result, expression)                       \
  type result;                                                    \
  for (int i = 0; i < kLanes; ++i) result.lane[i] = (expression); \
  return result
  static FAE_INLINE Reg add(Reg a, Reg b) { FAE_LANES(Reg, r, a.lane[i] + b.lane[i]); }
  static FAE_INLINE Reg sub(Reg a, Reg b) { FAE_LANES(Reg, r, a.lane[i] - b.lane[i]); }
  static FAE_INLINE Reg mul(Reg a, Reg b) { FAE_LANES(Reg, r, a.lane[i] * b.lane[i]); }
  static FAE_INLINE Reg div(Reg a, Reg b) { FAE_LANES(Reg, r, a.lane[i] / b.lane[i]); }
  static FAE_INLINE Reg fma(Reg a, Reg b, Reg c) { FAE_LANES(Reg, r, a.lane[i] * b.lane[i] + c.lane[i]); }
  static FAE_INLINE Reg max(Reg a, Reg b) {
    FAE_LANES(Reg, r, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]);
  }
  static FAE_INLINE Mask less(Reg a, Reg b) { FAE_LANES(Mask, m, a.lane[i] < b.lane[i]); }
  static FAE_INLINE Mask equal(Reg a, Reg b) { FAE_LANES(Mask, m, a.lane[i] == b.lane[i]); }
  static FAE_INLINE Reg select(Mask m, Reg a, Reg b) { FAE_LANES(Reg, r, m.lane[i] ? a.lane[i] : b.lane[i]); }
  static FAE_INLINE Mask bytes_set(const uint8_t* p, int n) { FAE_LANES(Mask, m, i < n && p[i] != 0); }
#undef FAE_LANES

  static FAE_INLINE Reg exp2(Reg x) {
    // Adding 1.5 * 2^mantissa rounds to an integer in the low bits. Below the smallest
    // normal exponent the result is 0; a NaN fails every comparison and stays.
    constexpr bool kSingle = sizeof(Real) == 4;
    constexpr Real kMagic = kSingle ? Real(12582912.0) : Real(6755399441055744.0);
    constexpr Real kSmallest = kSingle ? Real(-126) : Real(-1022);
    Reg f, power;
    for (int i = 0; i < kLanes; ++i) {
      const Real clamped = x.lane[i] < kSmallest ? kSmallest : x.lane[i];
      const Real shifted = clamped + kMagic;
      f.lane[i] = clamped - (shifted - kMagic);
      power.lane[i] = power_of_two(shifted);
    }
    const Reg p = exp2_polynomial<ArrayVec>(f);
    Reg r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = x.lane[i] < kSmallest ? Real(0) : p.lane[i] * power.lane[i];
    return r;
  }
  static FAE_INLINE Real reduce_max(Reg r) {
    Real m = r.lane[0];
    for (int i = 1; i < kLanes; ++i) m = r.lane[i] > m ? r.lane[i] : m;
    return m;
  }
  static FAE_INLINE Real reduce_add(Reg r) {
    Real s = 0;
    for (int i = 0; i < kLanes; ++i) s += r.lane[i];
    return s;
  }
  static FAE_INLINE Reg reduce_each(const Reg* r) {
    Reg sums;
    for (int i = 0; i < kLanes; ++i) sums.lane[i] = reduce_add(r[i]);
    return sums;
  }
  static FAE_INLINE void transpose(Reg* r) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const Real t = r[i].lane[j];
        r[i].lane[j] = r[j].lane[i];
        r[j].lane[i] = t;
      }
    }
  }

 private:
  // 2^n for a whole n within the normal range, from the bits of n + magic.
  static FAE_INLINE float power_of_two(float shifted) {
    return bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
  }
  static FAE_INLINE double power_of_two(double shifted) {
    return bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023u) << 52);
  }
};

using F32 = ArrayVec<float, 4>;
using F64 = ArrayVec<double, 2>;

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
