// The hardware's fast functions.
#pragma once

#include <cmath>

#include "cuda/prim/device.h"

namespace fae::cuda {

// 2^x to 2 ulp; subnormal results are 0.
FAE_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

}  // namespace fae::cuda
