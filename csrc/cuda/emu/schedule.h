// Which thread of a block goes next. Internal.
#pragma once

#include <cstdint>

#include "cuda/emu/random.h"

namespace fae::cuda::emu {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxWarps = 32;

// Whenever the lanes of a warp are let go together, they will go in a random order. Between
// two lanes of a warp the schedule may turn to other warps; how willingly differs by block,
// from at every second turn to only when the warp waits for the block.
class Schedule {
 public:
  void start_launch(uint64_t seed) {
    if (orders_set_ && seed == seed_) return;
    seed_ = seed;
    orders_set_ = true;
    random_.seed(seed, 0);
    for (auto& order : orders_) {
      for (uint32_t i = 0; i < kLanes; ++i) {  // insertion into a random permutation of those before
        const uint32_t j = uint32_t(random_.below(i + 1));
        order[i] = order[j];
        order[j] = uint8_t(i);
      }
    }
  }

  void start_block(uint64_t block, uint32_t warps) {
    constexpr uint32_t kStay[] = {128, 240, 252, 256};
    random_.seed(seed_, block + 1);
    stay_ = kStay[random_.below(4)];
    ready_count_ = 0;
    for (uint32_t w = 0; w < warps; ++w) {
      turns_[w].next = kLanes;
      release(w);
    }
  }

  // All lanes of a warp that waited can go on.
  void release(uint32_t warp) {
    Turn& turn = turns_[warp];
    turn.order = orders_[random_.next() >> 58];
    turn.next = 0;
    turn.slot = ready_count_;
    ready_[ready_count_++] = uint8_t(warp);
  }

  // The next thread after one of `warp`, or -1 when all wait.
  int32_t next(uint32_t warp) {
    const uint64_t dice = random_.next();
    if (turns_[warp].next == kLanes || (dice & 255) >= stay_) {
      if (!ready_count_) return -1;
      warp = ready_[((dice >> 32) * ready_count_) >> 32];
    }
    Turn& turn = turns_[warp];
    const uint32_t lane = turn.order[turn.next++];
    if (turn.next == kLanes) {
      const uint8_t last = ready_[--ready_count_];
      ready_[turn.slot] = last;
      turns_[last].slot = turn.slot;
    }
    return int32_t(warp * kLanes + lane);
  }

  // Whether a thread that is not running has had its turn since its warp was let go.
  bool waits(uint32_t thread) const {
    const Turn& turn = turns_[thread / kLanes];
    for (uint32_t i = turn.next; i < kLanes; ++i) {
      if (turn.order[i] == thread % kLanes) return false;
    }
    return true;
  }

  Random& random() { return random_; }

 private:
  struct Turn {
    const uint8_t* order = nullptr;
    uint32_t next = kLanes;  // position in `order`
    uint32_t slot = 0;       // in `ready_`, while lanes are left
  };

  uint64_t seed_ = 0;
  bool orders_set_ = false;
  uint32_t stay_ = 0;  // of 256
  Random random_;
  uint8_t orders_[64][kLanes];
  Turn turns_[kMaxWarps];
  uint8_t ready_[kMaxWarps];  // warps with lanes that can run
  uint32_t ready_count_ = 0;
};

}  // namespace fae::cuda::emu
