#include "cuda/emu/cp_async.h"

#include <cstring>

#include "cuda/emu/block.h"
#include "cuda/emu/ranges.h"

namespace fae::cuda::emu {

void copy_async_16(uint32_t dst, const void* src, bool valid, Where where) {
  Thread& me = running_thread();
  Block& block = *me.block;
  ++instructions().copy_async;
  if (valid) check_load(src, 16, where, "copy_async_16");
  block.shared.issue(dst, block.stamp(me.index), where, "copy_async_16");
  if (block.options.count) {
    block.recorder.note(me.index, Space::kShared, "copy_async_16", where, dst, 16);
    if (valid) {
      block.recorder.note(me.index, Space::kGlobal, "copy_async_16", where, reinterpret_cast<uintptr_t>(src),
                          16);
    }
  }
  AsyncCopy copy{dst, valid, false, static_cast<const std::byte*>(src), where, {}};
  // The source is read at any time between the issue and the wait.
  if (valid && (block.schedule.random().next() >> 63)) {
    copy.read = true;
    memcpy(copy.data, src, 16);
  }
  me.copies.push_back(copy);
}

void copy_async_commit(Where) {
  Thread& me = running_thread();
  ++instructions().copy_async_commit;
  me.groups.push_back(me.copies.size());
}

void copy_async_wait(int pending, Where) {
  Thread& me = running_thread();
  Block& block = *me.block;
  ++instructions().copy_async_wait;
  if (me.groups.size() <= size_t(pending)) return;
  const size_t done_groups = me.groups.size() - size_t(pending);
  const size_t done = me.groups[done_groups - 1];
  const Stamp now = block.stamp(me.index);
  for (size_t i = 0; i < done; ++i) {
    const AsyncCopy& copy = me.copies[i];
    block.shared.land(copy.dst, now, copy.where);
    std::byte* const to = block.shared.data(copy.dst);
    if (!copy.valid) {
      memset(to, 0, 16);
    } else if (copy.read) {
      memcpy(to, copy.data, 16);
    } else {
      check_load(copy.src, 16, copy.where, "copy_async_16");  // something may have written it since
      memcpy(to, copy.src, 16);
    }
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + int64_t(done));
  me.groups.erase(me.groups.begin(), me.groups.begin() + int64_t(done_groups));
  for (size_t& end : me.groups) end -= done;
}

}  // namespace fae::cuda::emu
