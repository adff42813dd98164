// Matrix multiply-add of one warp, D += A B with fp32 accumulation (PTX mma.sync, sm_80).
//
// With g = lane / 4 and t = lane % 4, a lane holds (row, column):
//   D, 16 x 8:        d[0..3] = (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
//   16-bit A, 16 x 16: a[0..3] = pairs from (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8)
//   16-bit B, 16 x 8:  b[0..1] = pairs down from (2t, g) (2t + 8, g)
//   TF32 A, 16 x 8:    a[0..3] = (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)
//   TF32 B, 8 x 8:     b[0..1] = (t, g) (t + 4, g)
// The lower half of a register is the first of a pair.
#pragma once

#include "cuda/prim/device.h"

#if !defined(__CUDACC__)
#include "cuda/emu/mma.h"
#endif

namespace fae::cuda {

#if defined(__CUDACC__)

FAE_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FAE_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Operands are fp32 bits of which TF32 keeps the upper 19.
FAE_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

using emu::mma_m16n8k16_bf16;
using emu::mma_m16n8k16_f16;
using emu::mma_m16n8k8_tf32;

#endif

}  // namespace fae::cuda
