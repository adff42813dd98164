// From dot products to scores: scale, softcap, ALiBi, bias, band, lengths and bool mask on the
// accumulators of one warp.
#pragma once

#include "cuda/params.h"
#include "cuda/prim/global.h"
#include "cuda/prim/warp.h"
#include "cuda/tile/element.h"
#include "cuda/tile/frag.h"
#include "cuda/tile/sequence.h"

namespace fae::cuda {

constexpr float kHidden = -__builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;

// As Intervals::label and bound.
FAE_DEVICE int load_label(const Intervals& x, int m, int batch, int query) {
  return load_global(x.labels + m * x.label_stride[0] + batch * x.label_stride[1] +
                     query * x.label_stride[2]);
}
FAE_DEVICE int load_bound(const Intervals& x, int m, int batch, int key, int side) {
  return load_global(x.bounds + m * x.bound_stride[0] + batch * x.bound_stride[1] + key * x.bound_stride[2] +
                     side * x.bound_stride[3]);
}

// Where a tile of scores lies: packed query rows x keys from `key` on, of one K/V head.
struct ScoreTile {
  const Problem& problem;
  const ScoreScale& scale;
  TileSequence sequence;
  PackedRows rows;
  int row_count;  // rows of the tile that exist
  int key;

  // Keys that row r sees by the band of its sequence and length, relative to `key`; empty for a
  // row that does not exist.
  FAE_DEVICE void visible(const Band& its_band, int kv_length, int r, int* begin, int* end) const {
    const int i = rows.query(r);
    const KeyRange seen = visible_keys(its_band, kv_length, i, i + 1);
    *begin = int((seen.begin < seen.end ? seen.begin : seen.end) - key);
    *end = r < row_count ? int(seen.end) - key : *begin;
  }
  // The key, relative to `key`, that ALiBi finds at no distance from row r.
  FAE_DEVICE int diagonal(int r) const { return rows.query(r) + sequence.shift() - key; }
  // The same for rare paths, see opaque.
  FAE_DEVICE ScoreTile rarely() const {
    ScoreTile same = *this;
    same.key = opaque(key);
    return same;
  }
  // Element offset of (row r, `key` + column) in a mask or bias.
  FAE_DEVICE int64_t offset(const View4& view, int r, int column) const {
    return view.offset(sequence.batch(), sequence.head() + rows.head(r), rows.query(r)) +
           int64_t(key + column) * view.stride[3];
  }
  // The same in a mask of blocks.
  FAE_DEVICE int64_t block_offset(const BoolMask& mask, int r, int column) const {
    const unsigned block_q = unsigned(mask.block_q), block_kv = unsigned(mask.block_kv);
    return mask.offset(sequence.batch(), sequence.head() + rows.head(r), unsigned(rows.query(r)) / block_q) +
           int64_t(unsigned(key + column) / block_kv) * mask.stride[3];
  }
  FAE_DEVICE int bound(const Intervals& x, int m, int column, int side) const {
    return load_bound(x, m, sequence.batch(), key + column, side);
  }
  // Whether intervals and a mask of blocks let row r see the key; neither needs to exist.
  FAE_DEVICE bool sees_by_ranges(int r, int column) const {
    if (r >= row_count || key + column >= sequence.kv_length()) return false;
    const Intervals& x = problem.masking.intervals;
    const int query = rows.query(r);
    bool seen = true;
    FAE_NO_UNROLL
    for (int m = 0; m < x.count; ++m) {
      const int label = load_label(x, m, sequence.batch(), query);
      seen &= bound(x, m, column, 0) <= label && label < bound(x, m, column, 1);
    }
    const BoolMask& mask = problem.masking.mask;
    if (mask.present() && !mask.dense()) {
      seen &= load_global(static_cast<const uint8_t*>(mask.data) + block_offset(mask, r, column)) != 0;
    }
    return seen;
  }
};

// Below, an accumulator begins at `row` and `column` of a tile. Its rows are packed query
// rows and its columns keys; kTransposed: the other way round.

// Hides what band and length do.
template <bool kTransposed, int kM, int kN>
FAE_DEVICE void hide_outside(FragC (&s)[kM][kN], const ScoreTile& tile, int row, int column) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const Band band = tile.sequence.band();
  const int kv_length = tile.sequence.kv_length();
  if constexpr (!kTransposed) {
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        int begin, end;
        tile.visible(band, kv_length, row + 16 * m + 8 * half + g, &begin, &end);
        FAE_UNROLL
        for (int n = 0; n < kN; ++n) {
          FAE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int j = column + 8 * n + 2 * t + e;
            if (j < begin || j >= end) s[m][n][2 * half + e] = kHidden;
          }
        }
      }
    }
  } else {
    static_assert(kM == 1);
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) {
      FAE_UNROLL
      for (int e = 0; e < 2; ++e) {
        int begin, end;
        tile.visible(band, kv_length, column + 8 * n + 2 * t + e, &begin, &end);
        FAE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int j = row + 8 * half + g;
          if (j < begin || j >= end) s[0][n][2 * half + e] = kHidden;
        }
      }
    }
  }
}

// fn(x, offset, pitch) for the visible elements x of an accumulator and their offsets in `view`.
template <bool kTransposed, int kM, int kN, class Fn>
FAE_DEVICE void for_each_visible(FragC (&s)[kM][kN], const View4& view, const ScoreTile& tile, int row,
                                 int column, Fn&& fn) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int64_t pitch = view.stride[3];
  if constexpr (!kTransposed) {
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t start = tile.offset(view, row + 16 * m + 8 * half + g, column + 2 * t);
        FAE_UNROLL
        for (int n = 0; n < kN; ++n) {
          FAE_UNROLL
          for (int e = 0; e < 2; ++e) {
            float& x = s[m][n][2 * half + e];
            if (x != kHidden) fn(x, start + (8 * n + e) * pitch);
          }
        }
      }
    }
  } else {
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) {
      FAE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int64_t start = tile.offset(view, column + 8 * n + 2 * t + e, row + g);
        FAE_UNROLL
        for (int half = 0; half < 2; ++half) {
          float& x = s[0][n][2 * half + e];
          if (x != kHidden) fn(x, start + 8 * half * pitch);
        }
      }
    }
  }
}

// ALiBi of up to 64 rows: each lane has the numbers of one or two, and hands them to those who ask.
template <int kRows>
class RowSlopes {
  static constexpr int kInLane = (kRows + kWarpSize - 1) / kWarpSize;

 public:
  // Of rows [row, row + kRows) of a tile.
  FAE_DEVICE RowSlopes(const ScoreTile& tile, int row) {
    FAE_UNROLL
    for (int i = 0; i < kInLane; ++i) {
      const int r = row + kWarpSize * i + lane_index() % (kRows < kWarpSize ? kRows : kWarpSize);
      slope_[i] = load_head_value(tile.problem.score.alibi, tile.sequence.batch(),
                                  tile.sequence.head() + tile.rows.head(r));
      diagonal_[i] = float(tile.diagonal(r));
    }
  }
  // Of row `base` + `offset` of them; base is a multiple of 8, and a constant, and offset less than 8. All
  // lanes ask together.
  FAE_DEVICE float slope(int base, int offset) const {
    return shuffle(slope_[base / kWarpSize], base % kWarpSize + offset);
  }
  FAE_DEVICE float diagonal(int base, int offset) const {
    return shuffle(diagonal_[base / kWarpSize], base % kWarpSize + offset);
  }

 private:
  float slope_[kInLane], diagonal_[kInLane];
};

FAE_DEVICE float with_alibi(float score, float slope, float distance) {
  return __builtin_fmaf(-slope, fabsf(distance), score);
}

template <bool kTransposed, int kM, int kN>
FAE_DEVICE void add_alibi(FragC (&s)[kM][kN], const ScoreTile& tile, int row, int column) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  if constexpr (!kTransposed) {
    const RowSlopes<16 * kM> rows(tile, row);
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float slope = rows.slope(16 * m + 8 * half, g);
        const float ahead = rows.diagonal(16 * m + 8 * half, g) - float(column + 2 * t);
        FAE_UNROLL
        for (int n = 0; n < kN; ++n) {
          FAE_UNROLL
          for (int e = 0; e < 2; ++e) {
            float& x = s[m][n][2 * half + e];
            x = with_alibi(x, slope, ahead - float(8 * n + e));
          }
        }
      }
    }
  } else {
    const RowSlopes<8 * kN> rows(tile, column);
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) {
      FAE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float slope = rows.slope(8 * n, 2 * t + e);
        const float ahead = rows.diagonal(8 * n, 2 * t + e) - float(row + g);
        FAE_UNROLL
        for (int half = 0; half < 2; ++half) {
          float& x = s[0][n][2 * half + e];
          x = with_alibi(x, slope, ahead - float(8 * half));
        }
      }
    }
  }
}

// Hides what intervals and a mask of blocks do. Rows and keys that do not exist are hidden.
template <bool kTransposed, int kM, int kN>
FAE_DEVICE void hide_by_ranges(FragC (&s)[kM][kN], const ScoreTile& from, int row, int column) {
  const ScoreTile tile = from.rarely();
  const int g = lane_index() / 4, t = lane_index() % 4;
  // A bit each, found out one after the other: unrolled, this would be most of a kernel.
  static_assert(4 * kM * kN <= 64);
  uint64_t hidden = 0;
  FAE_NO_UNROLL
  for (int at = 0; at < 4 * kM * kN; ++at) {
    const int i = at / (2 * kN), n = at % (2 * kN);
    const int down = row + 8 * i + g, across = column + n / 2 * 8 + 2 * t + n % 2;
    const bool seen = kTransposed ? tile.sees_by_ranges(across, down) : tile.sees_by_ranges(down, across);
    hidden |= uint64_t(!seen) << at;
  }
  FAE_UNROLL
  for (int i = 0; i < 2 * kM; ++i) {
    FAE_UNROLL
    for (int n = 0; n < 2 * kN; ++n) {
      if (hidden >> (2 * kN * i + n) & 1) s[i / 2][n / 2][i % 2 * 2 + n % 2] = kHidden;
    }
  }
}

struct Score {
  float value;  // as kernels hold it (see ScoreScale); -inf when hidden
  float slope;  // d score / d (scale * dot)
};

// Scale and softcap of one dot product.
FAE_DEVICE Score cap_score(float dot, const ScoreScale& scale, float cap) {
  const float x = dot * scale.modified_scale;
  if (!(cap > 0)) return {x, 1};
  const float capped = softcap_score(x, cap);
  return {capped, softcap_slope(capped, cap)};
}

// Dot products become scores, -inf where hidden. `partial`: band or length cut the tile;
// `masked`: its part of the bool mask is mixed. With kModified, `slope` (if there is one)
// receives d score / d (scale * dot).
template <bool kModified, bool kTransposed, int kM, int kN>
FAE_DEVICE void finish_scores(FragC (&s)[kM][kN], FragC (*slope)[kN], const ScoreTile& tile, int row,
                              int column, bool partial, bool masked) {
  const Problem& p = tile.problem;
  if constexpr (kModified) {
    const float cap = float(p.score.softcap);
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int n = 0; n < kN; ++n) {
        FAE_UNROLL
        for (int e = 0; e < 4; ++e) {
          const Score score = cap_score(s[m][n][e], tile.scale, cap);
          s[m][n][e] = score.value;
          if (slope) slope[m][n][e] = score.slope;
        }
      }
    }
  }
  if constexpr (kModified) {
    if (p.score.alibi.present()) add_alibi<kTransposed>(s, tile, row, column);
  }
  // Rows and keys that do not exist are hidden first: nothing is read for them below.
  const BoolMask& mask = p.masking.mask;
  if (partial || masked || (kModified && p.score.bias.present())) {
    hide_outside<kTransposed>(s, tile, row, column);
  }
  if (masked && p.masking.has_ranges()) hide_by_ranges<kTransposed>(s, tile, row, column);
  if (masked && mask.present() && mask.dense()) {
    const auto* data = static_cast<const uint8_t*>(mask.data);
    for_each_visible<kTransposed>(s, mask, tile, row, column, [data](float& x, int64_t at) {
      if (load_global(data + at) == 0) x = kHidden;
    });
  }
  if constexpr (kModified) {
    const View4& bias = p.score.bias;
    if (!bias.present()) return;
    const auto add = [](float& x, float y) { x = y == kHidden ? kHidden : x + y; };
    const DType dtype = p.score.bias_dtype;
    if (dtype == DType::kFloat32) {
      const auto* data = static_cast<const float*>(bias.data);
      for_each_visible<kTransposed>(s, bias, tile, row, column,
                                    [=](float& x, int64_t at) { add(x, load_global(data + at)); });
    } else if (dtype != DType::kFloat64) {
      for_each_visible<kTransposed>(s, bias, tile, row, column, [=, &bias](float& x, int64_t at) {
        add(x, load_half_as_float(bias.data, dtype, at));
      });
    } else {
      for_each_visible<kTransposed>(s, bias, tile, row, column, [=, &bias](float& x, int64_t at) {
        add(x, load_double_as_float(bias.data, at));
      });
    }
  }
}

// Whether band, length and masks let the first row of `tile` see key `tile.key`.
FAE_DEVICE bool sees_key(const ScoreTile& tile) {
  const Masking& masking = tile.problem.masking;
  const BoolMask& mask = masking.mask;
  int begin, end;
  tile.visible(tile.sequence.band(), tile.sequence.kv_length(), 0, &begin, &end);
  if (begin > 0 || end <= 0) return false;
  if (mask.present() && mask.dense() &&
      load_global(static_cast<const uint8_t*>(mask.data) + tile.offset(mask, 0, 0)) == 0) {
    return false;
  }
  return !masking.has_ranges() || tile.sees_by_ranges(0, 0);
}

// The bias of the first row of `tile` and key `tile.key`.
FAE_DEVICE float pair_bias(const ScoreTile& tile) {
  const ScoreMod& mod = tile.problem.score;
  if (!mod.bias.present()) return 0;
  return load_as_float(mod.bias.data, mod.bias_dtype, tile.offset(mod.bias, 0, 0));
}

// Score of the first row of `tile` and key `tile.key`.
template <bool kModified>
FAE_DEVICE Score pair_score(float dot, const ScoreTile& tile) {
  if (!sees_key(tile)) return {kHidden, 1};
  if (!kModified) return {dot, 1};
  const ScoreMod& mod = tile.problem.score;
  Score score = cap_score(dot, tile.scale, float(mod.softcap));
  if (mod.alibi.present()) {
    const float slope =
        load_head_value(mod.alibi, tile.sequence.batch(), tile.sequence.head() + tile.rows.head(0));
    score.value = with_alibi(score.value, slope, float(tile.diagonal(0)));
  }
  const float bias = pair_bias(tile);
  score.value = bias == kHidden ? kHidden : score.value + bias;
  return score;
}

}  // namespace fae::cuda
