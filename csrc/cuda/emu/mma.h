// Matrix multiply-add of a warp.
#pragma once

#include <cstdint>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      Where where = Where::here());
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       Where where = Where::here());
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      Where where = Where::here());

}  // namespace fae::cuda::emu
