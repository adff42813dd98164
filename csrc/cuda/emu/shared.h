// Shared memory accesses of one thread, each checked.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

// The address of the block's first byte: a multiple of 128 that differs between seeds.
uint32_t shared_base();

void load_shared(void* value, uint32_t address, size_t bytes, Where where);
void store_shared(uint32_t address, const void* value, size_t bytes, Where where);

}  // namespace fae::cuda::emu
