#include "cuda/emu/shared.h"

#include <cstring>

#include "cuda/emu/block.h"

namespace fae::cuda::emu {

uint32_t shared_base() { return this_block().shared.base(); }

void load_shared(void* value, uint32_t address, size_t bytes, Where where) {
  Thread& me = running_thread();
  Block& block = *me.block;
  ++instructions().load_shared;
  block.shared.read(address, bytes, block.stamp(me.index), where, "load_shared");
  if (block.options.count) {
    block.recorder.note(me.index, Space::kShared, "load_shared", where, address, uint32_t(bytes));
  }
  memcpy(value, block.shared.data(address), bytes);
}

void store_shared(uint32_t address, const void* value, size_t bytes, Where where) {
  Thread& me = running_thread();
  Block& block = *me.block;
  ++instructions().store_shared;
  block.shared.write(address, bytes, block.stamp(me.index), where, "store_shared");
  if (block.options.count) {
    block.recorder.note(me.index, Space::kShared, "store_shared", where, address, uint32_t(bytes));
  }
  memcpy(block.shared.data(address), value, bytes);
}

}  // namespace fae::cuda::emu
