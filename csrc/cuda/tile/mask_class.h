// What masks other than bands say about a tile before its scores are made.
#pragma once

#include "cuda/prim/warp.h"
#include "cuda/tile/score.h"

namespace fae::cuda {

FAE_DEVICE int warp_min(int x) {
  FAE_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other = shuffle_xor(x, mask);
    x = other < x ? other : x;
  }
  return x;
}

// The lowest and highest label of queries [begin, end), of which there are some. For a warp.
struct LabelRange { int lowest, highest; };
FAE_DEVICE LabelRange label_range(const Intervals& x, int m, int batch, int begin, int end) {
  LabelRange range{0x7fffffff, -0x7fffffff};
  int inverse = 0x7fffffff;  // ~label: what is lowest of it is highest of the label
  FAE_NO_UNROLL
  for (int i = begin + lane_index(); i < end; i += kWarpSize) {
    const int label = load_label(x, m, batch, i);
    range.lowest = label < range.lowest ? label : range.lowest;
    inverse = ~label < inverse ? ~label : inverse;
  }
  return {warp_min(range.lowest), ~warp_min(inverse)};
}

// By the intervals alone.
template <int kRows, int kKeys>
FAE_DEVICE TileClass classify_intervals(const ScoreTile& tile, int row, int column) {
  const Intervals& x = tile.problem.masking.intervals;
  const int rows_left = tile.row_count - row;
  if (rows_left < 1) return TileClass::kSkip;
  const int begin = tile.rows.query(row),
            end = tile.rows.query(row + (rows_left < kRows ? rows_left : kRows) - 1) + 1;
  bool all = true;
  FAE_NO_UNROLL
  for (int m = 0; m < x.count; ++m) {
    const LabelRange range = label_range(x, m, tile.sequence.batch(), begin, end);
    bool some_here = false, all_here = true;
    FAE_NO_UNROLL
    for (int c = column + lane_index(); c < column + kKeys && tile.key + c < tile.sequence.kv_length();
         c += kWarpSize) {
      const int low = tile.bound(x, m, c, 0), high = tile.bound(x, m, c, 1);
      some_here |= low <= range.highest && range.lowest < high;
      all_here &= low <= range.lowest && range.highest < high;
    }
    if (warp_ballot(some_here) == 0) return TileClass::kSkip;
    all &= warp_ballot(!all_here) == 0;
  }
  return all ? TileClass::kFull : TileClass::kPartial;
}

// By a mask of blocks alone. Where several heads share the tile, all of a group count.
template <int kRows, int kKeys>
FAE_DEVICE TileClass classify_blocks(const ScoreTile& tile, int row, int column) {
  const BoolMask& mask = tile.problem.masking.mask;
  const int rows_left = tile.row_count - row, keys_left = tile.sequence.kv_length() - tile.key - column;
  if (rows_left < 1 || keys_left < 1) return TileClass::kSkip;
  const unsigned block_q = unsigned(mask.block_q), block_kv = unsigned(mask.block_kv);
  const int first_row = int(unsigned(tile.rows.query(row)) / block_q);
  const int last_row =
      int(unsigned(tile.rows.query(row + (rows_left < kRows ? rows_left : kRows) - 1)) / block_q);
  const int first = tile.key + column, last = first + (keys_left < kKeys ? keys_left : kKeys) - 1;
  const int first_column = int(unsigned(first) / block_kv);
  const int columns = int(unsigned(last) / block_kv) + 1 - first_column;
  const int heads = mask.stride[1] == 0 ? 1 : tile.rows.group;
  const int count = (last_row + 1 - first_row) * columns * heads;
  bool any_visible = false, any_hidden = false;
  FAE_NO_UNROLL
  for (int i = lane_index(); i < count; i += kWarpSize) {
    const int r = i / columns;
    const int64_t at =
        mask.offset(tile.sequence.batch(), tile.sequence.head() + r % heads, first_row + r / heads) +
        (first_column + i % columns) * mask.stride[3];
    (load_global(static_cast<const uint8_t*>(mask.data) + at) ? any_visible : any_hidden) = true;
  }
  if (warp_ballot(any_visible) == 0) return TileClass::kSkip;
  return warp_ballot(any_hidden) ? TileClass::kPartial : TileClass::kFull;
}

// By a mask of an element each; reads 16 of its bytes at a time where it can.
template <int kRows, int kKeys>
FAE_DEVICE TileClass classify_elements(const ScoreTile& tile, int row, int column) {
  static_assert(kKeys % 16 == 0);
  const BoolMask& mask = tile.problem.masking.mask;
  const auto* const data = static_cast<const uint8_t*>(mask.data);
  const bool one_row = mask.stride[2] == 0 && (mask.stride[1] == 0 || tile.rows.group == 1);
  const int rows_left = tile.row_count - row, keys_left = tile.sequence.kv_length() - tile.key - column;
  const int rows = one_row ? (rows_left < 1 ? 0 : 1) : rows_left < kRows ? rows_left : kRows;
  const int keys = keys_left < kKeys ? keys_left : kKeys;
  bool any_visible = false, any_hidden = false;
  FAE_NO_UNROLL
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
      FAE_NO_UNROLL
      for (int e = 0; e < 16 && j + e < keys; ++e) {
        (load_global(p + e * mask.stride[3]) ? any_visible : any_hidden) = true;
      }
    }
  }
  if (warp_ballot(any_visible) == 0) return TileClass::kSkip;
  return warp_ballot(any_hidden) ? TileClass::kPartial : TileClass::kFull;
}

// Class of rows [row, row + kRows) against keys [column, column + kKeys) of a tile by all masks
// together, over those that exist. For a warp.
template <int kRows, int kKeys>
FAE_DEVICE TileClass classify_masks(const ScoreTile& from, int row, int column) {
  const ScoreTile tile = from.rarely();
  const Masking& masking = tile.problem.masking;
  TileClass found = TileClass::kFull;
  if (masking.intervals.present()) found = classify_intervals<kRows, kKeys>(tile, row, column);
  if (!masking.mask.present() || found == TileClass::kSkip) return found;
  const TileClass by_mask = masking.mask.dense() ? classify_elements<kRows, kKeys>(tile, row, column)
                                                 : classify_blocks<kRows, kKeys>(tile, row, column);
  return by_mask == TileClass::kFull ? found : by_mask;
}

// Takes from both ends of a range what `seen` says of no element: first in large steps, at last in steps of
// 16, or of 1 if `exactly`. For a block.
template <int kThreads, class Seen>
FAE_DEVICE KeyRange trim(KeyRange range, bool exactly, Seen&& seen) {
  FAE_NO_UNROLL
  for (int phase = 0; phase < (exactly ? 6 : 4); ++phase) {
    const int chunk = phase < 2 ? 4 * kThreads : phase < 4 ? 16 : 1;
    const bool front = phase % 2 == 0;
    while (!range.empty()) {
      const int64_t first = front ? range.begin : range.end - chunk;
      bool found = false;
      FAE_NO_UNROLL
      for (int i = thread_index(); i < chunk; i += kThreads) {
        if (first + i >= range.begin && first + i < range.end) found |= seen(int(first) + i);
      }
      if (block_any(found)) break;
      (front ? range.begin : range.end) += front ? chunk : -chunk;
    }
  }
  return range;
}

// Of a range along one axis of a mask of blocks (2: queries, 3: keys), from the first to the last that sees,
// in some head of a group, one of [begin, end) along the other axis. For a block.
template <int kThreads>
FAE_DEVICE KeyRange trim_by_blocks(const Problem& p, int batch, int head_kv, int begin, int end, int axis,
                                   KeyRange range) {
  const BoolMask& mask = p.masking.mask;
  if (!mask.present() || mask.dense() || range.empty() || begin >= end) return range;
  const int other = axis == 2 ? 3 : 2;
  const unsigned size = unsigned(axis == 2 ? mask.block_q : mask.block_kv);
  const unsigned other_size = unsigned(axis == 2 ? mask.block_kv : mask.block_q);
  const int heads = mask.stride[1] == 0 ? 1 : int(p.group());
  const int first_other = int(unsigned(begin) / other_size), last_other = int(unsigned(end - 1) / other_size);
  const auto any_seen = [&](int n) {
    FAE_NO_UNROLL
    for (int m = first_other; m <= last_other; ++m) {
      FAE_NO_UNROLL
      for (int h = 0; h < heads; ++h) {
        const int64_t at =
            mask.offset(batch, head_kv * p.group() + h, 0) + n * mask.stride[axis] + m * mask.stride[other];
        if (load_global(static_cast<const uint8_t*>(mask.data) + at)) return true;
      }
    }
    return false;
  };
  const KeyRange blocks =
      trim<kThreads>({unsigned(range.begin) / size, unsigned(range.end - 1) / size + 1}, true, any_seen);
  const int64_t first = blocks.begin * size, last = blocks.end * size;
  return {first > range.begin ? first : range.begin, last < range.end ? last : range.end};
}

// Of a range of keys, from the first to the last that queries [begin, end) of some head of a group see by
// intervals and blocks. For a block, before its loop: what lies outside is neither loaded nor looked at.
template <int kThreads>
FAE_DEVICE_COLD KeyRange trim_keys(const Problem& p, int batch, int head_kv, int begin, int end,
                                   KeyRange keys) {
  const Intervals& x = p.masking.intervals;
  FAE_NO_UNROLL
  for (int m = 0; m < x.count && begin < end; ++m) {
    const LabelRange range = label_range(x, m, batch, begin, end);
    keys = trim<kThreads>(keys, false, [&](int j) {
      return load_bound(x, m, batch, j, 0) <= range.highest && range.lowest < load_bound(x, m, batch, j, 1);
    });
  }
  return trim_by_blocks<kThreads>(p, batch, head_kv, begin, end, 3, keys);
}

// The transpose: of a range of queries, from the first to the last that sees one of keys [begin, end).
template <int kThreads>
FAE_DEVICE_COLD KeyRange trim_queries(const Problem& p, int batch, int head_kv, int begin, int end,
                                      KeyRange queries) {
  const Intervals& x = p.masking.intervals;
  FAE_NO_UNROLL
  for (int m = 0; m < x.count && begin < end; ++m) {
    int lowest = 0x7fffffff, inverse = 0x7fffffff;  // of what any of the keys may be seen by
    FAE_NO_UNROLL
    for (int j = begin + lane_index(); j < end; j += kWarpSize) {
      const int low = load_bound(x, m, batch, j, 0), high = load_bound(x, m, batch, j, 1);
      if (low >= high) continue;
      lowest = low < lowest ? low : lowest;
      inverse = ~high < inverse ? ~high : inverse;
    }
    const int low = warp_min(lowest), high = ~warp_min(inverse);
    queries = trim<kThreads>(queries, false, [&](int i) {
      const int label = load_label(x, m, batch, i);
      return low <= label && label < high;
    });
  }
  return trim_by_blocks<kThreads>(p, batch, head_kv, begin, end, 2, queries);
}

}  // namespace fae::cuda
