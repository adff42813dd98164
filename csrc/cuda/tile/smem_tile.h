// A swizzled tile in shared memory.
#pragma once

#include "cuda/prim/shared.h"

namespace fae::cuda {

// A chunk that a lane reads, as tile and offset: tiles of one shape share the offsets, so that
// a lane keeps few of them.
struct LaneChunk {
  Smem<std::byte> tile;
  uint32_t offset;

  FAE_DEVICE Smem<std::byte> at() const { return tile + int64_t(offset); }
};

// kRows x kCols elements, row-major in chunks of 16 bytes. Chunks trade places within a
// row, by a pattern that differs in each of 8 consecutive rows: reading one chunk column
// of 8 rows (ldmatrix) touches every bank once, and so does writing a row.
template <class T, int kRowsOfTile, int kColsOfTile>
struct SmemTile {
  using Element = T;
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kCols = kColsOfTile;
  static constexpr int kChunk = 16 / int(sizeof(T));  // elements
  static constexpr int kChunks = kCols / kChunk;      // of a row
  static constexpr int kBytes = kRows * kCols * int(sizeof(T));
  static_assert(kCols % kChunk == 0 && kChunks % 4 == 0, "a row is a multiple of 64 bytes");

  Smem<std::byte> base;  // a multiple of 128 bytes

  FAE_DEVICE Smem<std::byte> chunk(int row, int index) const {
    return base + (row * kChunks + (index ^ swizzle(row))) * 16;
  }
  FAE_DEVICE Smem<T> at(int row, int col) const {
    return chunk(row, col / kChunk).template as<T>() + col % kChunk;
  }

  FAE_DEVICE LaneChunk lane_chunk(int row, int index) const {
    return {base, uint32_t(row * kChunks + (index ^ swizzle(row))) * 16};
  }

  // From a chunk at (r, i) to the one at (r + rows, i + chunks), for rows a multiple of 8 and
  // chunks without a bit in common with i. With constant arguments an instruction or two.
  static FAE_DEVICE LaneChunk move(LaneChunk from, int rows, int chunks) {
    return {from.tile, (from.offset ^ uint32_t((chunks & kSwizzleMask) * 16)) +
                           uint32_t((chunks & ~kSwizzleMask) * 16 + rows * kChunks * 16)};
  }
  // From a chunk in an even row to the same one in the row below.
  static FAE_DEVICE LaneChunk below(LaneChunk from) {
    return {from.tile, (from.offset ^ uint32_t(swizzle(1) * 16)) + kChunks * 16};
  }

 private:
  // Rows of whole 128-byte lines: row r starts in bank 0, so all 8 chunks must differ.
  // Rows of an odd number of half lines: neighbours start half a line apart already.
  static constexpr bool kWholeLines = kChunks % 8 == 0;
  static constexpr int kSwizzleMask = kWholeLines ? 7 : 3;
  static FAE_DEVICE constexpr int swizzle(int row) {
    if (!kWholeLines) return (row >> 1) & kSwizzleMask;
    if (sizeof(T) < 4) return row & kSwizzleMask;
    // 32-bit elements are also read down columns (rows 0, 2, 4, 6) and written in pairs (rows
    // 0, 1, 2, 3), 32 bytes of each row at a time: either four rows differ in the upper two bits.
    return (row << 1 & 4) | ((row << 1 ^ row >> 1) & 2) | (row & 1);
  }
};

}  // namespace fae::cuda
