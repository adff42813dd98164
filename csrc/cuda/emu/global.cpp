#include "cuda/emu/global.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda/emu/block.h"
#include "cuda/emu/ranges.h"

namespace fae::cuda::emu {
namespace {

// Who, in the stamp of an addition: it commutes with others of its kind.
constexpr int kAdded = 4095;

std::string bytes_text(const void* address, size_t bytes, const Range* range) {
  char hex[32];
  snprintf(hex, sizeof hex, "%p", address);
  std::string text = std::to_string(bytes) + " bytes at " + hex;
  if (range) {
    text += ", offset " + std::to_string(int64_t(reinterpret_cast<uintptr_t>(address) - range->begin)) +
            " of '" + range->name + "'";
  }
  return text;
}

// The distance to a range tells which one was missed.
[[noreturn]] void fault_unregistered(const void* address, size_t bytes, const Where& where, const char* op) {
  const auto at = int64_t(reinterpret_cast<uintptr_t>(address));
  const Range* nearest = nullptr;
  int64_t best = 4096;
  for (const auto& range : global_memory().ranges()) {
    const int64_t before = int64_t(range->begin) - at, after = at - int64_t(range->end);
    const int64_t distance = std::max({before, after, int64_t(0)});
    if (distance < best) best = distance, nearest = range.get();
  }
  std::string what = std::string(op) + " out of bounds: " + bytes_text(address, bytes, nearest);
  if (nearest) what += ", which has " + std::to_string(nearest->end - nearest->begin) + " bytes";
  if (nearest && best == 0) what += ": between its elements, or past the end";
  fault(where, what);
}

bool contains(const Range& range, uintptr_t at, size_t bytes) {
  if (at < range.begin || at > range.end || bytes > range.end - at) return false;
  if (range.member.empty()) return true;
  for (size_t i = at - range.begin; i < at - range.begin + bytes; i += range.element_bytes) {
    if (!range.member[i]) return false;
  }
  return range.member[at - range.begin + bytes - 1];
}

Range* find(const void* address, size_t bytes, bool writable) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  GlobalMemory& memory = global_memory();
  const auto fits = [&](const Range& r) {
    return contains(r, at, bytes) && (!writable || r.access == Access::kReadWrite);
  };
  if (memory.last_hit && fits(*memory.last_hit)) return memory.last_hit;
  for (const auto& range : memory.ranges()) {
    if (fits(*range)) return memory.last_hit = range.get();
  }
  return nullptr;
}

void check_aligned(const void* address, size_t bytes, const Where& where, const char* op) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fault(where, std::string(op) + " misaligned: " + bytes_text(address, bytes, find(address, bytes, false)) +
                   ", no multiple of " + std::to_string(bytes));
}

int64_t block_of(Stamp stamp) {
  const auto& blocks = launch_clock().blocks;
  const auto after = std::upper_bound(blocks.begin(), blocks.end(), std::pair(epoch_of(stamp), INT64_MAX));
  return after == blocks.begin() ? -1 : (after - 1)->second;
}

std::string writer_text(Stamp stamp) {
  const int who = who_of(stamp);
  return (who == kAdded ? "some thread" : thread_text(who)) + " of block " + std::to_string(block_of(stamp));
}

Range& check_store(void* address, size_t bytes, const Where& where, const char* op) {
  check_aligned(address, bytes, where, op);
  if (Range* const range = find(address, bytes, true)) return *range;
  if (const Range* const range = find(address, bytes, false)) {
    fault(where, std::string(op) + " to read-only memory: " + bytes_text(address, bytes, range));
  }
  fault_unregistered(address, bytes, where, op);
}

}  // namespace

LaunchClock& launch_clock() {
  thread_local LaunchClock clock;
  return clock;
}

void check_load(const void* address, size_t bytes, const Where& where, const char* op) {
  check_aligned(address, bytes, where, op);
  const Range* const range = find(address, bytes, false);
  if (!range) fault_unregistered(address, bytes, where, op);
  if (range->access == Access::kRead && range->set.empty()) return;
  const size_t offset = reinterpret_cast<uintptr_t>(address) - range->begin;
  for (size_t i = offset; !range->set.empty() && i < offset + bytes; ++i) {
    if (!range->set[i]) {
      fault(where, std::string(op) + " of uninitialised global memory: " + bytes_text(address, bytes, range));
    }
  }
  // Loads may come from a cache that does not see this launch's writes, whoever's they are.
  for (size_t i = offset / Range::kGranule; i <= (offset + bytes - 1) / Range::kGranule; ++i) {
    if (range->wrote.empty() || range->wrote[i] < launch_clock().start) continue;
    fault(where, std::string(op) + " of " + bytes_text(address, bytes, range) +
                     ", written in the same launch by " + writer_text(range->wrote[i]));
  }
}

void load_global(void* value, const void* address, size_t bytes, Where where) {
  Thread& me = running_thread();
  ++instructions().load_global;
  check_load(address, bytes, where, "load_global");
  if (me.block->options.count) {
    me.block->recorder.note(me.index, Space::kGlobal, "load_global", where,
                            reinterpret_cast<uintptr_t>(address), uint32_t(bytes));
  }
  memcpy(value, address, bytes);
}

void store_global(void* address, const void* value, size_t bytes, Where where) {
  Thread& me = running_thread();
  Block& block = *me.block;
  ++instructions().store_global;
  Range& range = check_store(address, bytes, where, "store_global");
  const size_t offset = reinterpret_cast<uintptr_t>(address) - range.begin;
  const Stamp now = block.stamp(me.index);
  const bool same = memcmp(address, value, bytes) == 0;
  for (size_t i = offset / Range::kGranule; i <= (offset + bytes - 1) / Range::kGranule; ++i) {
    const Stamp wrote = range.wrote[i];
    const bool mine = wrote >= block.clock.block_start && who_of(wrote) == int(me.index);
    if (wrote >= launch_clock().start && !mine && bytes >= Range::kGranule) {
      const bool added = who_of(wrote) == kAdded;
      if (added || (!same && block.options.races)) {
        fault(where, "race: store_global of " + bytes_text(address, bytes, &range) +
                         (added ? ", added to by " : ", written with another value by ") +
                         writer_text(wrote) + " in the same launch");
      }
    }
    range.wrote[i] = now;
  }
  if (!range.set.empty()) std::fill_n(range.set.begin() + int64_t(offset), bytes, true);
  if (block.options.count) {
    block.recorder.note(me.index, Space::kGlobal, "store_global", where, reinterpret_cast<uintptr_t>(address),
                        uint32_t(bytes));
  }
  memcpy(address, value, bytes);
}

void add_global(float* address, float value, Where where) {
  Thread& me = running_thread();
  Block& block = *me.block;
  ++instructions().add_global;
  Range& range = check_store(address, 4, where, "add_global");
  const size_t offset = reinterpret_cast<uintptr_t>(address) - range.begin;
  for (size_t i = 0; !range.set.empty() && i < 4; ++i) {
    if (!range.set[offset + i]) {
      fault(where, "add_global to uninitialised global memory: " + bytes_text(address, 4, &range));
    }
  }
  const Stamp now = block.clock.stamp(0, kAdded);
  for (size_t i = offset / Range::kGranule; i < (offset + 4) / Range::kGranule; ++i) {
    const Stamp wrote = range.wrote[i];
    if (wrote >= launch_clock().start && who_of(wrote) != kAdded) {
      const bool mine = wrote >= block.clock.block_start && who_of(wrote) == int(me.index);
      if (!mine) {
        fault(where, "race: add_global to " + bytes_text(address, 4, &range) + ", written by " +
                         writer_text(wrote) + " in the same launch");
      }
    }
    range.wrote[i] = now;
  }
  if (block.options.count) {
    block.recorder.note(me.index, Space::kGlobal, "add_global", where, reinterpret_cast<uintptr_t>(address),
                        4);
  }
  float sum;
  memcpy(&sum, address, 4);
  sum += value;
  memcpy(address, &sum, 4);
}

GlobalMemory::GlobalMemory() = default;
GlobalMemory::~GlobalMemory() = default;

int GlobalMemory::add(const void* data, const Extent& extent, const std::string& name, Access access,
                      Contents contents) {
  auto range = std::make_unique<Range>();
  range->id = next_id_++;
  range->name = name;
  range->access = access;
  range->element_bytes = extent.element_bytes;
  range->begin = reinterpret_cast<uintptr_t>(data);
  int64_t elements = 1, last = 0;
  for (int i = 0; i < extent.rank; ++i) {
    elements *= extent.shape[i];
    last += (extent.shape[i] - 1) * extent.stride[i];
  }
  const size_t span = elements > 0 ? size_t(last + 1) * extent.element_bytes : 0;
  range->end = range->begin + span;
  if (span > size_t(elements) * extent.element_bytes) {
    range->member.assign(span, false);
    int64_t index[Extent::kMaxRank] = {};
    for (int64_t n = 0; n < elements; ++n) {
      int64_t offset = 0;
      for (int i = 0; i < extent.rank; ++i) offset += index[i] * extent.stride[i];
      std::fill_n(range->member.begin() + offset * int64_t(extent.element_bytes), extent.element_bytes, true);
      for (int i = extent.rank - 1; i >= 0 && ++index[i] == extent.shape[i]; --i) index[i] = 0;
    }
  }
  if (contents == Contents::kUnset) range->set.assign(span, false);
  if (access == Access::kReadWrite) range->wrote.assign(span / Range::kGranule + 1, 0);
  ranges_.push_back(std::move(range));
  return ranges_.back()->id;
}

void GlobalMemory::remove(int id) {
  last_hit = nullptr;
  for (size_t i = 0; i < ranges_.size(); ++i) {
    if (ranges_[i]->id == id) {
      ranges_.erase(ranges_.begin() + int64_t(i));
      return;
    }
  }
}

void GlobalMemory::clear() {
  last_hit = nullptr;
  ranges_.clear();
}

int64_t GlobalMemory::first_unset(int id) const {
  for (const auto& range : ranges_) {
    if (range->id != id) continue;
    for (size_t i = 0; i < range->set.size(); ++i) {
      if (!range->set[i] && (range->member.empty() || range->member[i])) return int64_t(i);
    }
  }
  return -1;
}

GlobalMemory& global_memory() {
  thread_local GlobalMemory memory;
  return memory;
}

}  // namespace fae::cuda::emu
