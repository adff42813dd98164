// Who has last written and read each piece of shared memory, and when. Internal.
//
// Time has two hands: the epoch moves with each barrier of a block (and with each new
// block), a warp's phase with each of its warp barriers. Of two accesses by different
// threads of a block the first is ordered before the second when the epoch has moved in
// between, or, within one warp, the phase. Nothing else orders memory: shuffles, ballots
// and matrix instructions do not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

// epoch (34 bits) | phase (18) | who (12); later is greater.
using Stamp = uint64_t;

constexpr int kWhoBits = 12, kPhaseBits = 18;
constexpr uint32_t kMaxPhase = (1u << kPhaseBits) - 1;
constexpr int kManyOfWarp = 1024;  // who: several threads of warp who - kManyOfWarp
constexpr int kManyWarps = 2048;   // who: threads of several warps
// The destination of an asynchronous copy that was not waited for, by thread who.
constexpr Stamp kPending = ~Stamp(0) << (kWhoBits + kPhaseBits);

constexpr int who_of(Stamp s) { return int(s & ((1u << kWhoBits) - 1)); }
constexpr uint32_t phase_of(Stamp s) { return uint32_t(s >> kWhoBits) & kMaxPhase; }
constexpr uint64_t epoch_of(Stamp s) { return s >> (kWhoBits + kPhaseBits); }

// Never goes back, through all blocks and launches of an OS thread: what was stamped before
// the block began counts as never written.
struct Clock {
  uint64_t epoch = 1;
  Stamp block_start = 0;
  Stamp epoch_start = 0;

  void start_block() {
    tick();
    block_start = epoch_start;
  }
  void tick() { epoch_start = Stamp(++epoch) << (kWhoBits + kPhaseBits); }
  Stamp stamp(uint32_t phase, int who) const {
    return epoch_start | Stamp(phase) << kWhoBits | Stamp(uint32_t(who));
  }
};

class SharedShadow {
 public:
  // Every byte unset. `base`: the first byte's address.
  void start_block(uint32_t base, size_t bytes, bool races, const Clock& clock);

  uint32_t base() const { return base_; }
  std::byte* data(uint32_t address) { return data_.data() + (address - base_); }

  // Throw a Fault when thread who_of(now) must not touch the `bytes` (2, 4, 8 or 16) at
  // `address`, else take note of the access. `op` names the primitive.
  void read(uint32_t address, size_t bytes, Stamp now, const Where& where, const char* op);
  void write(uint32_t address, size_t bytes, Stamp now, const Where& where, const char* op);
  // An asynchronous copy of 16 bytes: issued, and later waited for by the same thread.
  void issue(uint32_t address, Stamp now, const Where& where, const char* op);
  void land(uint32_t address, Stamp now, const Where& where);
  // One that nobody has waited for, at the end of its block.
  void drop(uint32_t address);

 private:
  static constexpr size_t kCell = 2;  // bytes that are told apart: the smallest access

  size_t check_place(uint32_t address, size_t bytes, int thread, const Where& where, const char* op) const;
  void check_ordered_after_write(size_t cell, Stamp now, const Where& where, const char* op) const;
  void check_ordered_after_reads(size_t cell, Stamp now, const Where& where, const char* op) const;
  std::string bytes_text(uint32_t address, size_t bytes) const;

  uint32_t base_ = 0;
  size_t bytes_ = 0;
  bool races_ = true;
  const Clock* clock_ = nullptr;
  std::vector<std::byte> data_;
  // Per cell: the last write and the reads since the last barrier, and their lines.
  std::vector<Stamp> wrote_, read_;
  std::vector<uint64_t> wrote_at_, read_at_;
};

}  // namespace fae::cuda::emu
