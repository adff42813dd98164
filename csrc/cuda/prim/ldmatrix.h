// Warp-wide loads of four 8 x 8 matrices of 16-bit elements from shared memory (PTX
// ldmatrix, sm_75). Lane 8 m + r gives the address of row r (16 bytes, aligned) of matrix m.
#pragma once

#include "cuda/prim/shared.h"

#if !defined(__CUDACC__)
#include "cuda/emu/ldmatrix.h"
#endif

namespace fae::cuda {

#if defined(__CUDACC__)

// Register m of lane l: elements (l / 4, 2 (l % 4)) and the next in the row of matrix m.
FAE_DEVICE void ldmatrix_x4(uint32_t (&out)[4], Smem<std::byte> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row.address));
}

// The same of the transposed matrices: elements (2 (l % 4), l / 4) and the next in the column.
FAE_DEVICE void ldmatrix_x4_transposed(uint32_t (&out)[4], Smem<std::byte> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row.address));
}

#else

inline void ldmatrix_x4(uint32_t (&out)[4], Smem<std::byte> row, emu::Where where = emu::Where::here()) {
  emu::ldmatrix_x4(out, row.address, false, where);
}

inline void ldmatrix_x4_transposed(uint32_t (&out)[4], Smem<std::byte> row,
                                   emu::Where where = emu::Where::here()) {
  emu::ldmatrix_x4(out, row.address, true, where);
}

#endif

}  // namespace fae::cuda
