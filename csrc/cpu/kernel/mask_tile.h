// Which scores of a register tile are hidden: by band and length, by a bool mask, by intervals.
#pragma once

#include "cpu/kernel/rows.h"
#include "cpu/simd/vec.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// What is left of a tile's keys, and which masks still hide some of them.
struct TileMask {
  int64_t begin, end;  // keys that some row may see; empty: skip the tile
  bool by_mask = false, by_intervals = false;
  bool narrowed = false;  // begin and end are not those of band and length alone
  bool skip() const { return begin >= end; }
};

// The bool mask on (rows) x [k_begin, k_end), without reading scores.
inline TileClass classify_mask(const BoolMask& mask, int64_t b, const RowRef* rows, int row_count,
                               int64_t k_begin, int64_t k_end) {
  bool any_visible = false, any_hidden = false;
  const uint8_t* previous = nullptr;
  const int64_t first = k_begin / mask.block_kv, n = (k_end - 1) / mask.block_kv + 1 - first;
  for (int r = 0; r < row_count && !(any_visible && any_hidden); ++r) {
    const uint8_t* p = mask.row(b, rows[r].head, rows[r].query) + first * mask.stride[3];
    if (p == previous) continue;  // broadcast over queries
    previous = p;
    if (mask.stride[3] == 0) {
      (*p ? any_visible : any_hidden) = true;
      continue;
    }
    int64_t j = 0;
    if (mask.stride[3] == 1) {
      for (; j + 8 <= n; j += 8) {
        uint64_t bytes;
        memcpy(&bytes, p + j, 8);
        any_visible |= bytes != 0;
        any_hidden |= bytes != 0x0101010101010101ull;
      }
    }
    for (; j < n; ++j) {
      const bool visible = p[j * mask.stride[3]] != 0;
      any_visible |= visible;
      any_hidden |= !visible;
    }
  }
  return !any_visible ? TileClass::kSkip : any_hidden ? TileClass::kPartial : TileClass::kFull;
}

// Takes from both ends of the tile's keys what one interval mask hides from all rows, in steps of a few keys.
inline void narrow_by_interval(const Intervals& x, int64_t m, int64_t b, const RowRef* rows, int row_count,
                               TileMask* tile) {
  constexpr int64_t kSome = 16;
  int32_t lowest = x.label(m, b, rows[0].query), highest = lowest;
  for (int r = 1; r < row_count; ++r) {
    const int32_t label = x.label(m, b, rows[r].query);
    lowest = label < lowest ? label : lowest;
    highest = label > highest ? label : highest;
  }
  const int32_t* const bounds = x.bounds + m * x.bound_stride[0] + b * x.bound_stride[1];
  const int64_t key = x.bound_stride[2], side = x.bound_stride[3];
  int64_t begin = tile->end, end = tile->begin;
  for (int64_t j = tile->begin; j < tile->end; j += kSome) {
    const int64_t stop = j + kSome < tile->end ? j + kSome : tile->end;
    int seen_by_some = 0, seen_by_all = 1;
    for (int64_t i = j; i < stop; ++i) {
      const int32_t low = bounds[i * key], high = bounds[i * key + side];
      seen_by_some |= int(low <= highest) & int(lowest < high);
      seen_by_all &= int(low <= lowest) & int(highest < high);
    }
    if (!seen_by_all) tile->by_intervals = true;
    if (!seen_by_some) continue;
    if (begin > j) begin = j;
    end = stop;
  }
  tile->narrowed |= begin != tile->begin || end != tile->end;
  tile->begin = begin;
  tile->end = end;
}

// The masks of a problem on (rows) x [begin, end).
inline TileMask classify_masks(const Problem& p, int64_t b, const RowRef* rows, int row_count, int64_t begin,
                               int64_t end) {
  TileMask tile{begin, end};
  const Masking& masking = p.masking;
  for (int64_t m = 0; m < masking.intervals.count && !tile.skip(); ++m)
    narrow_by_interval(masking.intervals, m, b, rows, row_count, &tile);
  if (masking.mask.present() && !tile.skip()) {
    const TileClass found = classify_mask(masking.mask, b, rows, row_count, tile.begin, tile.end);
    if (found == TileClass::kSkip) tile.end = tile.begin;
    tile.by_mask = found == TileClass::kPartial;
  }
  return tile;
}

// Hides the columns of a row outside keys [begin, end), given relative to the tile.
template <class V>
FAE_INLINE void hide_outside(typename V::Elem* row, int64_t begin, int64_t end, int64_t columns) {
  const auto hidden = V::set1(typename V::Elem(-__builtin_inf()));
  int64_t j = 0;
  for (; j + V::kWidth <= begin; j += V::kWidth) V::store(row + j, hidden);
  if (j < begin) V::store_n(row + j, hidden, int(begin - j));
  for (j = end; j < columns && j % V::kWidth != 0; ++j) row[j] = typename V::Elem(-__builtin_inf());
  for (; j < columns; j += V::kWidth) V::store(row + j, hidden);
}

// Hides what the bool mask does of a row of scores for keys [k_begin, k_begin + keys).
template <class V>
void apply_mask_row(const BoolMask& mask, const uint8_t* row, int64_t k_begin, int64_t keys,
                    typename V::Elem* s) {
  using Real = typename V::Elem;
  constexpr Real kHidden = Real(-__builtin_inf());
  if (mask.block_kv != 1) {
    for (int64_t j = 0; j < keys;) {
      const int64_t block = (k_begin + j) / mask.block_kv;
      const int64_t block_end = (block + 1) * mask.block_kv - k_begin,
                    stop = block_end < keys ? block_end : keys;
      if (row[block * mask.stride[3]]) j = stop;
      else
        for (; j < stop; ++j) s[j] = kHidden;
    }
    return;
  }
  const int64_t stride = mask.stride[3];
  const auto hidden = V::set1(kHidden);
  uint8_t gathered[V::kWidth];
  for (int64_t j = 0; j < keys; j += V::kWidth) {
    const int lanes = int(keys - j < V::kWidth ? keys - j : V::kWidth);
    const uint8_t* visible = row + (k_begin + j) * stride;
    if (stride != 1) {
      for (int i = 0; i < lanes; ++i) gathered[i] = visible[i * stride];
      visible = gathered;
    }
    V::store(s + j, V::select(V::bytes_set(visible, lanes), V::load(s + j), hidden));
  }
}

template <class Real>
void apply_intervals_row(const Intervals& x, int64_t b, int64_t query, int64_t k_begin, int64_t keys,
                         Real* s) {
  const int64_t key = x.bound_stride[2], side = x.bound_stride[3];
  for (int64_t m = 0; m < x.count; ++m) {
    const int32_t label = x.label(m, b, query);
    const int32_t* const bounds = x.bounds + m * x.bound_stride[0] + b * x.bound_stride[1] + k_begin * key;
    for (int64_t j = 0; j < keys; ++j) {
      const bool seen = (bounds[j * key] <= label) & (label < bounds[j * key + side]);
      s[j] = seen ? s[j] : Real(-__builtin_inf());
    }
  }
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
