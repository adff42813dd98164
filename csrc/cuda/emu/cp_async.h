// Asynchronous copies: the destination is out of bounds for all until the wait.
#pragma once

#include <cstdint>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

void copy_async_16(uint32_t dst, const void* src, bool valid, Where where);
void copy_async_commit(Where where = Where::here());
void copy_async_wait(int pending, Where where = Where::here());

}  // namespace fae::cuda::emu
