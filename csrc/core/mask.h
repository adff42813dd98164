// Which keys a query may see: a diagonal band, a key length, a bool mask, intervals.
#pragma once

#include <cstdint>

#include "core/hd.h"
#include "core/tensor_view.h"

namespace fae {

enum class Causal : uint8_t { kNone, kBottomRight, kTopLeft };

// Half-open range of keys.
struct KeyRange {
  int64_t begin;
  int64_t end;
  FAE_HD bool empty() const { return begin >= end; }
};

// Causal masks and windows are one thing: query i sees keys in [i + lo, i + hi].
// kUnbounded is far beyond any length, and far from overflow when i is added.
struct Band {
  static constexpr int64_t kUnbounded = int64_t(1) << 60;
  int64_t lo = -kUnbounded;
  int64_t hi = kUnbounded;

  FAE_HD bool unbounded() const { return lo == -kUnbounded && hi == kUnbounded; }
};

// window_left and window_right follow the API: -1 means unbounded on that side.
// Windows are shifted by seq_kv - seq_q whatever the causal alignment is.
FAE_HD inline Band make_band(Causal causal, int64_t window_left, int64_t window_right, int64_t seq_q,
                             int64_t seq_kv) {
  const int64_t shift = seq_kv - seq_q;
  Band band;
  // A window longer than any sequence is the same as none; this keeps sums small.
  if (window_left >= 0 && window_left < Band::kUnbounded / 2) band.lo = shift - window_left;
  if (window_right >= 0 && window_right < Band::kUnbounded / 2) band.hi = shift + window_right;
  if (causal != Causal::kNone) {
    const int64_t diagonal = causal == Causal::kBottomRight ? shift : 0;
    if (diagonal < band.hi) band.hi = diagonal;
  }
  // A window that ends before it begins (top-left causal, far right window): nobody sees
  // anything, said so that several rows together see nothing either.
  if (band.lo > band.hi) band = {Band::kUnbounded, -Band::kUnbounded};
  return band;
}

// What the band of each sequence is made from.
struct BandRule {
  Causal causal = Causal::kNone;
  int64_t window_left = -1, window_right = -1;

  FAE_HD Band of(int64_t seq_q, int64_t seq_kv) const {
    return make_band(causal, window_left, window_right, seq_q, seq_kv);
  }
};

enum class TileClass : uint8_t { kSkip, kFull, kPartial };

// int32 or int64 values, read where they are needed.
struct Integers {
  const void* data = nullptr;
  int64_t stride = 0;
  bool is_int64 = false;

  FAE_HD bool present() const { return data != nullptr; }
  FAE_HD int64_t at(int64_t index) const {
    return is_int64 ? static_cast<const int64_t*>(data)[index * stride]
                    : int64_t(static_cast<const int32_t*>(data)[index * stride]);
  }
};

// kv_lengths, one per batch; values are clamped to [0, seq_kv].
struct Lengths : Integers {
  FAE_HD int64_t at(int64_t b, int64_t seq_kv) const {
    if (!data) return seq_kv;
    const int64_t n = Integers::at(b);
    return n < 0 ? 0 : (n > seq_kv ? seq_kv : n);
  }
};

// Query i sees key j only where bounds[m][b][j][0] <= labels[m][b][i] < bounds[m][b][j][1], for each
// m < count. Documents, trees and prefixes are such masks, in memory linear in the lengths.
struct Intervals {
  const int32_t* labels = nullptr;      // (count, batch, seq_q)
  const int32_t* bounds = nullptr;      // (count, batch, seq_kv, 2)
  int64_t label_stride[3] = {0, 0, 0};  // stride 0 where it broadcasts
  int64_t bound_stride[4] = {0, 0, 0, 0};
  int64_t count = 0;

  FAE_HD bool present() const { return count > 0; }
  FAE_HD int32_t label(int64_t m, int64_t b, int64_t i) const {
    return labels[m * label_stride[0] + b * label_stride[1] + i * label_stride[2]];
  }
  FAE_HD int32_t bound(int64_t m, int64_t b, int64_t j, int side) const {
    return bounds[m * bound_stride[0] + b * bound_stride[1] + j * bound_stride[2] + side * bound_stride[3]];
  }
  FAE_HD bool sees(int64_t b, int64_t i, int64_t j) const {
    for (int64_t m = 0; m < count; ++m) {
      const int32_t x = label(m, b, i);
      if (x < bound(m, b, j, 0) || x >= bound(m, b, j, 1)) return false;
    }
    return true;
  }
};

// One byte per block of queries and keys, 0 = hidden; a block of 1 by 1 is a dense mask.
struct BoolMask : View4 {  // (batch, head_q, query block, key block)
  int64_t block_q = 1, block_kv = 1;

  FAE_HD bool dense() const { return block_q == 1 && block_kv == 1; }
  // Of the row of query i.
  FAE_HD const uint8_t* row(int64_t b, int64_t head_q, int64_t i) const {
    return static_cast<const uint8_t*>(data) + offset(b, head_q, i / block_q);
  }
  FAE_HD bool sees(int64_t b, int64_t head_q, int64_t i, int64_t j) const {
    return row(b, head_q, i)[j / block_kv * stride[3]] != 0;
  }
};

struct Masking {
  Band band;  // of sequences without lengths of their own, see Sequence
  Lengths kv_lengths;
  BoolMask mask;
  Intervals intervals;

  // Masks that hide ranges of keys from a query rather than single ones.
  FAE_HD bool has_ranges() const { return intervals.present() || (mask.present() && !mask.dense()); }
};

// Keys that at least one query in [q_begin, q_end) may see under band and length.
FAE_HD inline KeyRange visible_keys(const Band& band, int64_t kv_length, int64_t q_begin, int64_t q_end) {
  int64_t begin = q_begin + band.lo;
  int64_t end = q_end - 1 + band.hi + 1;
  if (begin < 0) begin = 0;
  if (end > kv_length) end = kv_length;
  return {begin, end < begin ? begin : end};
}

// Queries that may see at least one key in [k_begin, k_end); the transpose of the above.
FAE_HD inline KeyRange seeing_queries(const Band& band, int64_t seq_q, int64_t k_begin, int64_t k_end) {
  int64_t begin = k_begin - band.hi;
  int64_t end = k_end - 1 - band.lo + 1;
  if (begin < 0) begin = 0;
  if (end > seq_q) end = seq_q;
  return {begin, end < begin ? begin : end};
}

// Class of the tile queries [q_begin, q_end) x keys [k_begin, k_end).
FAE_HD inline TileClass classify(const Band& band, int64_t kv_length, int64_t q_begin, int64_t q_end,
                                 int64_t k_begin, int64_t k_end) {
  const KeyRange seen = visible_keys(band, kv_length, q_begin, q_end);
  if (seen.empty() || seen.end <= k_begin || seen.begin >= k_end) return TileClass::kSkip;
  // Every query sees every key when the most restricted query on each side does.
  const bool full = q_end - 1 + band.lo <= k_begin && q_begin + band.hi >= k_end - 1 && k_end <= kv_length;
  return full ? TileClass::kFull : TileClass::kPartial;
}

}  // namespace fae
