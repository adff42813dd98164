// Which probabilities of a row dropout keeps.
#pragma once

#include "core/problem.h"
#include "cpu/simd/vec.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// Philox (core/philox.h) for one row: many counters side by side, which compilers make vectors of.
class DropoutRow {
  static constexpr int kCounters = 16;

 public:
  DropoutRow(const Dropout& dropout, PhiloxKey key) : dropout_(dropout), key_(key) {}

  // factor[j]: keep_scale where key k_begin + j of the row (b, head, query) is kept, else 0, for
  // j < keys. k_begin is a multiple of 4; factor has room for whole groups of 4 kCounters.
  template <class Real>
  void factors(int64_t b, int64_t head, int64_t query, int64_t k_begin, int64_t keys, Real* factor) const {
    const Real kept = Real(dropout_.keep_scale);
    for (int64_t j = 0; j < keys; j += 4 * kCounters) {
      uint32_t word[4][kCounters];
      words(uint32_t((k_begin + j) / 4), uint32_t(query), uint32_t(head), uint32_t(b), word);
      for (int c = 0; c < kCounters; ++c) {
        for (int w = 0; w < 4; ++w) factor[j + 4 * c + w] = word[w][c] >= dropout_.threshold ? kept : Real(0);
      }
    }
  }
  static int64_t room(int64_t keys) { return round_up(keys, 4 * kCounters); }

 private:
  void words(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t (&x)[4][kCounters]) const {
    for (int c = 0; c < kCounters; ++c) {
      x[0][c] = first + uint32_t(c);
      x[1][c] = c1;
      x[2][c] = c2;
      x[3][c] = c3;
    }
    uint32_t k0 = key_.k0, k1 = key_.k1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int c = 0; c < kCounters; ++c) {
        const uint64_t p0 = uint64_t(kPhiloxM0) * x[0][c], p1 = uint64_t(kPhiloxM1) * x[2][c];
        const uint32_t x1 = x[1][c], x3 = x[3][c];
        x[0][c] = uint32_t(p1 >> 32) ^ x1 ^ k0;
        x[1][c] = uint32_t(p1);
        x[2][c] = uint32_t(p0 >> 32) ^ x3 ^ k1;
        x[3][c] = uint32_t(p0);
      }
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
  }

  const Dropout& dropout_;
  PhiloxKey key_;
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
