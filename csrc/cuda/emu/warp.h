// Exchanges between the lanes of a warp. Each waits until all 32 have come to the same line.
#pragma once

#include <cstdint>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

void warp_barrier(Where where = Where::here());
float shuffle_xor(float value, int mask, Where where = Where::here());
int shuffle_xor(int value, int mask, Where where = Where::here());
double shuffle_xor(double value, int mask, Where where = Where::here());
uint32_t shuffle_xor(uint32_t value, int mask, Where where = Where::here());
float shuffle(float value, int lane, Where where = Where::here());
uint32_t warp_ballot(bool value, Where where = Where::here());

}  // namespace fae::cuda::emu
