// Which element of a matrix each register of each lane holds, as functions: the layouts of
// PTX's ldmatrix .m8n8 .b16 and mma .m16n8k16 (16-bit) and .m16n8k8 (TF32).
#pragma once

namespace fae::cuda::emu {

struct Element {
  int row;
  int column;
  friend constexpr bool operator==(Element a, Element b) { return a.row == b.row && a.column == b.column; }
};

// Both kinds of halves below: 0 is the lower 16 bits.

// Element of matrix `m` in register m of a lane after ldmatrix, or after ldmatrix .trans.
constexpr Element ldmatrix_element(int lane, int half, bool transposed) {
  const Element e{lane / 4, lane % 4 * 2 + half};
  return transposed ? Element{e.column, e.row} : e;
}

// Accumulator, 16 x 8.
constexpr Element mma_d(int lane, int e) { return {lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2}; }

// 16-bit A, 16 x 16 (row, depth).
constexpr Element mma_a16(int lane, int reg, int half) {
  return {lane / 4 + reg % 2 * 8, lane % 4 * 2 + reg / 2 * 8 + half};
}

// 16-bit B, 16 x 8 (depth, column).
constexpr Element mma_b16(int lane, int reg, int half) { return {lane % 4 * 2 + reg * 8 + half, lane / 4}; }

// TF32 A, 16 x 8 (row, depth).
constexpr Element mma_a32(int lane, int reg) { return {lane / 4 + reg % 2 * 8, lane % 4 + reg / 2 * 4}; }

// TF32 B, 8 x 8 (depth, column).
constexpr Element mma_b32(int lane, int reg) { return {lane % 4 + reg * 4, lane / 4}; }

}  // namespace fae::cuda::emu
