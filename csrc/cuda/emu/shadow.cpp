#include "cuda/emu/shadow.h"

#include "cuda/emu/fault.h"

namespace fae::cuda::emu {
namespace {

// A line in 64 bits: the file's name lies in the lower 48 of the address space.
uint64_t pack(const Where& where) {
  return (uint64_t(reinterpret_cast<uintptr_t>(where.file)) & 0xffffffffffffu) | uint64_t(where.line) << 48;
}

Where unpack(uint64_t packed) {
  return {reinterpret_cast<const char*>(uintptr_t(packed & 0xffffffffffffu)), int(packed >> 48)};
}

std::string who_text(int who) {
  if (who == kManyWarps) return "several warps";
  if (who >= kManyOfWarp) return "several threads of warp " + std::to_string(who - kManyOfWarp);
  return thread_text(who);
}

int warp_of(int who) { return who >= kManyOfWarp ? who - kManyOfWarp : who / 32; }

}  // namespace

void SharedShadow::start_block(uint32_t base, size_t bytes, bool races, const Clock& clock) {
  base_ = base;
  bytes_ = bytes;
  races_ = races;
  clock_ = &clock;
  const size_t cells = (bytes + kCell - 1) / kCell;
  if (wrote_.size() < cells) {
    data_.resize(cells * kCell);
    for (auto* stamps : {&wrote_, &read_, &wrote_at_, &read_at_}) stamps->resize(cells);
  }
}

std::string SharedShadow::bytes_text(uint32_t address, size_t bytes) const {
  const int64_t offset = int64_t(address) - int64_t(base_);
  return std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of shared memory";
}

size_t SharedShadow::check_place(uint32_t address, size_t bytes, int thread, const Where& where,
                                 const char* op) const {
  const uint64_t offset = uint64_t(address) - base_;  // wraps to something huge below the base
  if (offset > bytes_ || bytes > bytes_ - offset) {
    fault(thread, where,
          std::string(op) + " out of bounds: " + bytes_text(address, bytes) + ", of which the block has " +
              std::to_string(bytes_) + " bytes");
  }
  if (address % bytes != 0) {
    fault(thread, where,
          std::string(op) + " misaligned: " + bytes_text(address, bytes) + ", no multiple of " +
              std::to_string(bytes));
  }
  return size_t(offset) / kCell;
}

void SharedShadow::check_ordered_after_write(size_t cell, Stamp now, const Where& where,
                                             const char* op) const {
  const Stamp wrote = wrote_[cell];
  const int me = who_of(now), writer = who_of(wrote);
  const auto place = [&] { return bytes_text(base_ + uint32_t(cell * kCell), kCell); };
  if (wrote >= kPending) {
    fault(me, where,
          std::string(op) + " of " + place() + ", the destination of an asynchronous copy by " +
              thread_text(writer) + " (" + text(unpack(wrote_at_[cell])) + ") that was not waited for");
  }
  if (!races_ || writer == me) return;
  if (writer / 32 == me / 32 && phase_of(wrote) < phase_of(now)) return;
  fault(me, where,
        "race: " + std::string(op) + " of " + place() + ", written by " + thread_text(writer) + " at " +
            text(unpack(wrote_at_[cell])) + " with no barrier in between");
}

void SharedShadow::check_ordered_after_reads(size_t cell, Stamp now, const Where& where,
                                             const char* op) const {
  const Stamp read = read_[cell];
  const int me = who_of(now), reader = who_of(read);
  if (!races_ || reader == me) return;
  if (reader != kManyWarps && warp_of(reader) == me / 32 && phase_of(read) < phase_of(now)) return;
  fault(me, where,
        "race: " + std::string(op) + " of " + bytes_text(base_ + uint32_t(cell * kCell), kCell) +
            ", read by " + who_text(reader) + " at " + text(unpack(read_at_[cell])) +
            " with no barrier in between");
}

void SharedShadow::read(uint32_t address, size_t bytes, Stamp now, const Where& where, const char* op) {
  const size_t first = check_place(address, bytes, who_of(now), where, op);
  const uint64_t at = pack(where);
  const Stamp epoch_start = clock_->epoch_start, block_start = clock_->block_start;
  const int me = who_of(now);
  for (size_t cell = first; cell < first + bytes / kCell; ++cell) {
    const Stamp wrote = wrote_[cell];
    if (wrote < block_start) {
      fault(me, where,
            std::string(op) + " of uninitialised shared memory: " +
                bytes_text(base_ + uint32_t(cell * kCell), kCell) + " have not been written");
    }
    if (wrote >= epoch_start) check_ordered_after_write(cell, now, where, op);
    // One stamp stands for all readers that a later write could race with.
    Stamp& read = read_[cell];
    if (read >= epoch_start) {
      const int reader = who_of(read);
      if (reader == kManyWarps || read == now) continue;
      if (warp_of(reader) != me / 32) {
        read = clock_->stamp(kMaxPhase, kManyWarps);
      } else if (phase_of(read) < phase_of(now) || reader == me) {
        read = now;
      } else {
        read = clock_->stamp(phase_of(now), kManyOfWarp + me / 32);
      }
    } else {
      read = now;
    }
    read_at_[cell] = at;
  }
}

void SharedShadow::write(uint32_t address, size_t bytes, Stamp now, const Where& where, const char* op) {
  const size_t first = check_place(address, bytes, who_of(now), where, op);
  const uint64_t at = pack(where);
  const Stamp epoch_start = clock_->epoch_start;
  for (size_t cell = first; cell < first + bytes / kCell; ++cell) {
    if (wrote_[cell] >= epoch_start) check_ordered_after_write(cell, now, where, op);
    if (read_[cell] >= epoch_start) check_ordered_after_reads(cell, now, where, op);
    wrote_[cell] = now;
    wrote_at_[cell] = at;
  }
}

void SharedShadow::issue(uint32_t address, Stamp now, const Where& where, const char* op) {
  write(address, 16, now, where, op);
  const size_t first = (address - base_) / kCell;
  for (size_t cell = first; cell < first + 16 / kCell; ++cell) wrote_[cell] = kPending | Stamp(who_of(now));
}

void SharedShadow::land(uint32_t address, Stamp now, const Where& where) {
  const size_t first = (address - base_) / kCell;
  const uint64_t at = pack(where);
  for (size_t cell = first; cell < first + 16 / kCell; ++cell) {
    wrote_[cell] = now;
    wrote_at_[cell] = at;
  }
}

void SharedShadow::drop(uint32_t address) {
  const size_t first = (address - base_) / kCell;
  for (size_t cell = first; cell < first + 16 / kCell; ++cell) wrote_[cell] = 0;
}

}  // namespace fae::cuda::emu
