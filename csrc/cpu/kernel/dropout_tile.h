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
    static_assert(kCounters % (kSideBySide * U::kWidth) == 0);
    // Lanes of a register in the order in which zip_low() and zip_high() bring them side by side.
    uint64_t order[U::kWidth];
    for (int l = 0; l < U::kWidth; ++l) order[l] = uint64_t(l % 2 * (U::kWidth / 2) + l / 2);
    for (int c = 0; c < kCounters; c += kSideBySide * U::kWidth) {
      Reg x[kSideBySide][4];
      for (int i = 0; i < kSideBySide; ++i) {
        x[i][0] = U::add(U::load(order), U::set1(first + uint32_t(c + i * U::kWidth)));
        x[i][1] = U::set1(c1);
        x[i][2] = U::set1(c2);
        x[i][3] = U::set1(c3);
      }
      uint32_t k0 = key_.k0, k1 = key_.k1;
#pragma GCC unroll 7
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
        const Reg first_words = U::pair_low(x[i][0], x[i][1]), last_words = U::pair_low(x[i][2], x[i][3]);
        uint32_t* const to = word + 4 * (c + i * U::kWidth);
        U::store(to, U::zip_low(first_words, last_words));
        U::store(to + 2 * U::kWidth, U::zip_high(first_words, last_words));
      }
    }
  }

  const Dropout& dropout_;
  PhiloxKey key_;
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
