#include "cuda/emu/warp.h"

#include <type_traits>

#include "cuda/emu/block.h"
#include "cuda/emu/thread.h"

namespace fae::cuda::emu {
namespace {

// What a lane hands in, and gets back.
template <class T>
struct Exchange {
  T value;
  int source;  // lane
  T result;
};

template <class T>
T exchange(Op op, T value, int source, const Where& where) {
  Exchange<T> mine{value, source, {}};
  this_block().wait_in_warp(op, where, &mine, [](Thread* lanes, Block&) {
    ++instructions().shuffle;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      auto* const to = static_cast<Exchange<T>*>(lanes[lane].args);
      to->result = static_cast<const Exchange<T>*>(lanes[to->source].args)->value;
    }
  });
  return mine.result;
}

template <class T>
T exchange_xor(T value, int mask, const Where& where) {
  if (mask < 0 || mask >= int(kLanes))
    fault(where, "shuffle_xor by " + std::to_string(mask) + ", not 0 to 31");
  return exchange(Op::kShuffleXor, value, int(running_thread().lane()) ^ mask, where);
}

}  // namespace

float shuffle_xor(float value, int mask, Where where) { return exchange_xor(value, mask, where); }
int shuffle_xor(int value, int mask, Where where) { return exchange_xor(value, mask, where); }
double shuffle_xor(double value, int mask, Where where) { return exchange_xor(value, mask, where); }
uint32_t shuffle_xor(uint32_t value, int mask, Where where) { return exchange_xor(value, mask, where); }

float shuffle(float value, int lane, Where where) {
  if (lane < 0 || lane >= int(kLanes))
    fault(where, "shuffle from lane " + std::to_string(lane) + ", not 0 to 31");
  return exchange(Op::kShuffle, value, lane, where);
}

uint32_t warp_ballot(bool value, Where where) {
  struct Vote {
    bool value;
    uint32_t result;
  } mine{value, 0};
  this_block().wait_in_warp(Op::kBallot, where, &mine, [](Thread* lanes, Block&) {
    ++instructions().ballot;
    uint32_t all = 0;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      all |= uint32_t(static_cast<const Vote*>(lanes[lane].args)->value) << lane;
    }
    for (uint32_t lane = 0; lane < kLanes; ++lane) static_cast<Vote*>(lanes[lane].args)->result = all;
  });
  return mine.result;
}

void warp_barrier(Where where) {
  this_block().wait_in_warp(Op::kWarpBarrier, where, nullptr, [](Thread* lanes, Block& block) {
    ++instructions().warp_barrier;
    uint32_t& phase = block.warp[lanes[0].warp()].phase;
    if (++phase == kMaxPhase) fault(lanes[0].where, "too many warp barriers between two block barriers");
  });
}

void block_barrier(Where where) { this_block().wait_in_block(Op::kBlockBarrier, where, false); }
bool block_any(bool value, Where where) { return this_block().wait_in_block(Op::kBlockAny, where, value); }

}  // namespace fae::cuda::emu
