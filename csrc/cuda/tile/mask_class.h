// What a warp's part of the bool mask says about its part of a tile, before scores are made.
#pragma once

#include "cuda/prim/warp.h"
#include "cuda/tile/score.h"

namespace fae::cuda {

// Class of rows [row, row + kRows) against keys [column, column + kKeys) of a tile by the mask
// alone, over those that exist. For a warp; reads 16 mask bytes at a time where it can.
template <int kRows, int kKeys>
FAE_DEVICE TileClass classify_mask(const ScoreTile& tile, int row, int column) {
  static_assert(kKeys % 16 == 0);
  const View4& mask = tile.problem.masking.mask;
  const auto* const data = static_cast<const uint8_t*>(mask.data);
  const bool one_row = mask.stride[2] == 0 && (mask.stride[1] == 0 || tile.rows.group == 1);
  const int rows_left = tile.row_count - row, keys_left = tile.kv_length - tile.key - column;
  const int rows = one_row ? (rows_left < 1 ? 0 : 1) : rows_left < kRows ? rows_left : kRows;
  const int keys = keys_left < kKeys ? keys_left : kKeys;
  bool any_visible = false, any_hidden = false;
  for (int i = lane_index(); i < rows * (kKeys / 16); i += kWarpSize) {
    const int r = row + i / (kKeys / 16), j = i % (kKeys / 16) * 16;
    const uint8_t* const p = data + tile.offset(mask, r, column + j);
    if (mask.stride[3] == 1 && j + 16 <= keys && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      const Vec16 bytes = load_global(reinterpret_cast<const Vec16*>(p));
      FAE_UNROLL
      for (int w = 0; w < 4; ++w) {
        any_visible |= bytes.word[w] != 0;
        any_hidden |= bytes.word[w] != 0x01010101u;
      }
    } else {
      for (int e = 0; e < 16 && j + e < keys; ++e) {
        (load_global(p + e * mask.stride[3]) ? any_visible : any_hidden) = true;
      }
    }
  }
  if (warp_ballot(any_visible) == 0) return TileClass::kSkip;
  return warp_ballot(any_hidden) ? TileClass::kPartial : TileClass::kFull;
}

}  // namespace fae::cuda
