// The source of every decision that a seed determines.
#pragma once

#include <cstdint>

namespace fae::cuda::emu {

class Random {
 public:
  void seed(uint64_t a, uint64_t b) {
    state_ = mix(mix(a + 0x9e3779b97f4a7c15u) ^ (b * 0xd1342543de82ef95u + 1));
    if (!state_) state_ = 1;
  }

  uint64_t next() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }

  uint64_t below(uint64_t n) { return (next() >> 11) % n; }

 private:
  static uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint64_t state_ = 1;
};

}  // namespace fae::cuda::emu
