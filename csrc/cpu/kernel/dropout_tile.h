// Which probabilities of a row dropout keeps.
#pragma once

#include "core/problem.h"
#include "cpu/simd/vec.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// Philox (core/philox.h) for one row. Its words are the low halves of 64-bit lanes, where a product needs no
// shuffling; what is in the high halves is of no matter until the end.
// U: the vectors.
template <class U>
class DropoutRow {
  static constexpr int kCounters = 16;

 public:
  DropoutRow(const Dropout& dropout, PhiloxKey key) : dropout_(dropout), key_(key) {}

  // factor[j]: keep_scale where key k_begin + j of the row (b, head, query) is kept, else 0, for
  // j < keys. k_begin is a multiple of 4; factor has room for whole groups of 4 kCounters.
  template <class Real>
  void factors(int64_t b, int64_t head, int64_t query, int64_t k_begin, int64_t keys, Real* factor) const {
    const Real kept = Real(dropout_.keep_scale);
    const uint32_t threshold = dropout_.threshold;
    for (int64_t j = 0; j < keys; j += 4 * kCounters) {
      uint32_t word[4 * kCounters];
      words(uint32_t((k_begin + j) / 4), uint32_t(query), uint32_t(head), uint32_t(b), word);
      for (int i = 0; i < 4 * kCounters; ++i) factor[j + i] = word[i] >= threshold ? kept : Real(0);
    }
  }
  static int64_t room(int64_t keys) { return round_up(keys, 4 * kCounters); }

 private:
  using Reg = typename U::Reg;
  static constexpr int kSideBySide = U::kWidth == 1 ? 1 : 2;  // so that products overlap

  // word[4 c + w]: word w of counter (first + c, c1, c2, c3).
  void words(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t (&word)[4 * kCounters]) const {
    uint64_t pairs[2][kCounters];
    for (int c = 0; c < kCounters; ++c) pairs[0][c] = uint32_t(first + uint32_t(c));
    for (int c = 0; c < kCounters; c += kSideBySide * U::kWidth) {
      Reg x[kSideBySide][4];
      for (int i = 0; i < kSideBySide; ++i) {
        x[i][0] = U::load(pairs[0] + c + i * U::kWidth);
        x[i][1] = U::set1(c1);
        x[i][2] = U::set1(c2);
        x[i][3] = U::set1(c3);
      }
      uint32_t k0 = key_.k0, k1 = key_.k1;
      for (int round = 0; round < kPhiloxRounds; ++round) {
        for (int i = 0; i < kSideBySide; ++i) {
          const Reg a = U::mul_low(U::set1(kPhiloxM0), x[i][0]);
          const Reg b = U::mul_low(U::set1(kPhiloxM1), x[i][2]);
          x[i][0] = U::bit_xor(U::bit_xor(U::high(b), x[i][1]), U::set1(k0));
          x[i][1] = b;
          x[i][2] = U::bit_xor(U::bit_xor(U::high(a), x[i][3]), U::set1(k1));
          x[i][3] = a;
        }
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
      }
      for (int i = 0; i < kSideBySide; ++i) {
        U::store(pairs[0] + c + i * U::kWidth, U::pair_low(x[i][0], x[i][1]));
        U::store(pairs[1] + c + i * U::kWidth, U::pair_low(x[i][2], x[i][3]));
      }
    }
    for (int c = 0; c < kCounters; ++c) {
      for (int half = 0; half < 2; ++half) {
        word[4 * c + 2 * half] = uint32_t(pairs[half][c]);
        word[4 * c + 2 * half + 1] = uint32_t(pairs[half][c] >> 32);
      }
    }
  }

  const Dropout& dropout_;
  PhiloxKey key_;
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
