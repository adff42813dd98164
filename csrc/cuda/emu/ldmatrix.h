// Four 8 x 8 matrices of 16-bit elements from shared memory to the registers of a warp.
#pragma once

#include <cstdint>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

void ldmatrix_x4(uint32_t (&out)[4], uint32_t row, bool transposed, Where where);

}  // namespace fae::cuda::emu
