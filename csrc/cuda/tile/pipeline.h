// A ring of shared memory slots that asynchronous copies fill ahead of use.
#pragma once

#include "cuda/prim/cp_async.h"

namespace fae::cuda {

// Items 0, 1, 2, ... of a sequence occupy slot (item % kSlots), each filled by one commit
// group. A block uses one item at a time, so one barrier per item does both: it publishes
// the item, and tells that everybody has left the one before, whose slot is filled next.
//
//   start(load);  for each item: { slot = next(load); use slot; }
//
// load(slot) begins to fill a slot with the next item of the sequence, or does nothing
// after the last.
template <int kSlots, int kSlotBytes>
class Pipeline {
  static_assert(kSlots >= 2);

 public:
  static constexpr int kBytes = kSlots * kSlotBytes;

  explicit FAE_DEVICE Pipeline(Smem<std::byte> base) : base_(base) {}

  template <class Load>
  FAE_DEVICE void start(Load&& load) {
    FAE_NO_UNROLL
    for (int i = 0; i < kSlots - 1; ++i) fill(load);
  }

  template <class Load>
  FAE_DEVICE Smem<std::byte> next(Load&& load) {
    copy_async_wait<kSlots - 2>();
    block_barrier();
    const Smem<std::byte> slot = base_ + use_ * kSlotBytes;
    use_ = use_ + 1 == kSlots ? 0 : use_ + 1;
    fill(load);
    return slot;
  }

 private:
  template <class Load>
  FAE_DEVICE void fill(Load&& load) {
    load(base_ + fill_ * kSlotBytes);
    // Also when nothing was loaded: waiting counts groups.
    copy_async_commit();
    fill_ = fill_ + 1 == kSlots ? 0 : fill_ + 1;
  }

  Smem<std::byte> base_;
  int use_ = 0;
  int fill_ = 0;
};

}  // namespace fae::cuda
