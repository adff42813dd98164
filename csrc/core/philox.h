// Counter-based random numbers: which probabilities dropout keeps.
//
// Philox4x32 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011) with seven rounds.
// The counter is the place of a probability, so the numbers depend on nothing else: not on tiles,
// threads, or whether it is the forward or the backward pass.
#pragma once

#include <cstdint>

#include "core/hd.h"

namespace fae {

struct PhiloxKey { uint32_t k0, k1; };
struct PhiloxWords { uint32_t x[4]; };

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

FAE_HD inline PhiloxWords philox(PhiloxWords counter, PhiloxKey key) {
  PhiloxWords c = counter;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = uint64_t(kPhiloxM0) * c.x[0], b = uint64_t(kPhiloxM1) * c.x[2];
    c = {
        {uint32_t(b >> 32) ^ c.x[1] ^ key.k0, uint32_t(b), uint32_t(a >> 32) ^ c.x[3] ^ key.k1, uint32_t(a)}};
    key.k0 += kPhiloxW0;
    key.k1 += kPhiloxW1;
  }
  return c;
}

// The key of a call: its seed and offset, mixed.
FAE_HD inline PhiloxKey call_key(uint64_t seed, uint64_t offset) {
  const PhiloxWords mixed =
      philox({{uint32_t(offset), uint32_t(offset >> 32), 0, 0}}, {uint32_t(seed), uint32_t(seed >> 32)});
  return {mixed.x[0], mixed.x[1]};
}

// Dropout of probabilities: the one of (batch b, query head h, query i, key j) is kept when word
// j % 4 of philox({j / 4, i, h, b}) reaches `threshold`, and then multiplied by keep_scale.
struct Dropout {
  const int64_t* state = nullptr;  // (2,): seed, offset; on the device of the tensors. None: no dropout
  int64_t state_stride = 1;
  uint32_t threshold = 0;
  double keep_scale = 1.0;

  FAE_HD bool present() const { return state != nullptr; }
  // Reads the state.
  FAE_HD PhiloxKey key() const { return call_key(uint64_t(state[0]), uint64_t(state[state_stride])); }
  FAE_HD bool keeps(PhiloxKey key, int64_t b, int64_t h, int64_t i, int64_t j) const {
    const PhiloxWords words = philox({{uint32_t(j / 4), uint32_t(i), uint32_t(h), uint32_t(b)}}, key);
    return words.x[j % 4] >= threshold;
  }
};

inline Dropout make_dropout(double p, const int64_t* state, int64_t state_stride) {
  Dropout dropout;
  dropout.state = state;
  dropout.state_stride = state_stride;
  const double threshold = p * 4294967296.0;
  dropout.threshold = threshold >= 4294967295.0 ? 4294967295u : uint32_t(threshold);
  dropout.keep_scale = 1.0 / (1.0 - p);
  return dropout;
}

}  // namespace fae
