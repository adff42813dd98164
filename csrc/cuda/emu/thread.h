// The running CUDA thread, and the barriers of its block.
#pragma once

#include <cstdint>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

int thread_index();
int64_t block_index();

void block_barrier(Where where = Where::here());
bool block_any(bool value, Where where = Where::here());

}  // namespace fae::cuda::emu
