// From dot products to scores: scale, softcap, ALiBi, bias, band, lengths and bool mask on the
// accumulators of one warp.
#pragma once

#include "cuda/params.h"
#include "cuda/prim/global.h"
#include "cuda/prim/warp.h"
#include "cuda/tile/element.h"
#include "cuda/tile/frag.h"
#include "cuda/tile/rows.h"

namespace fae::cuda {

constexpr float kHidden = -__builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;

// Where a tile of scores lies: packed query rows x keys from `key` on, of one K/V head.
struct ScoreTile {
  const Problem& problem;
  const ScoreScale& scale;
  int batch;
  int head;  // first query head of the group
  PackedRows rows;
  int row_count;  // rows of the tile that exist
  int key;
  int kv_length;

  // Keys that row r sees by band and length, relative to `key`; empty for a row that does
  // not exist.
  FAE_DEVICE void visible(int r, int* begin, int* end) const {
    const int i = rows.query(r);
    const KeyRange seen = visible_keys(problem.masking.band, kv_length, i, i + 1);
    *begin = int((seen.begin < seen.end ? seen.begin : seen.end) - key);
    *end = r < row_count ? int(seen.end) - key : *begin;
  }
  // The key, relative to `key`, that ALiBi finds at no distance from row r.
  FAE_DEVICE int diagonal(int r) const { return rows.query(r) + int(problem.seq_kv - problem.seq_q) - key; }
  // Element offset of (row r, `key` + column) in a mask or bias.
  FAE_DEVICE int64_t offset(const View4& view, int r, int column) const {
    return view.offset(batch, head + rows.head(r), rows.query(r)) + int64_t(key + column) * view.stride[3];
  }
};

// Below, an accumulator begins at `row` and `column` of a tile. Its rows are packed query
// rows and its columns keys; kTransposed: the other way round.

// Hides what band and length do.
template <bool kTransposed, int kM, int kN>
FAE_DEVICE void hide_outside(FragC (&s)[kM][kN], const ScoreTile& tile, int row, int column) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  if constexpr (!kTransposed) {
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        int begin, end;
        tile.visible(row + 16 * m + 8 * half + g, &begin, &end);
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
        tile.visible(column + 8 * n + 2 * t + e, &begin, &end);
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
      slope_[i] = load_head_value(tile.problem.score.alibi, tile.batch, tile.head + tile.rows.head(r));
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
  const View4& mask = p.masking.mask;
  if (partial || masked || (kModified && p.score.bias.present())) {
    hide_outside<kTransposed>(s, tile, row, column);
  }
  if (masked) {
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
    } else if (dtype == DType::kBFloat16) {
      const auto* data = static_cast<const BFloat16*>(bias.data);
      for_each_visible<kTransposed>(s, bias, tile, row, column,
                                    [=](float& x, int64_t at) { add(x, to_float(load_global(data + at))); });
    } else {
      for_each_visible<kTransposed>(s, bias, tile, row, column, [=, &bias](float& x, int64_t at) {
        add(x, load_as_float(bias.data, dtype, at));
      });
    }
  }
}

// Whether band, length and mask let the first row of `tile` see key `tile.key`.
FAE_DEVICE bool sees_key(const ScoreTile& tile) {
  const View4& mask = tile.problem.masking.mask;
  int begin, end;
  tile.visible(0, &begin, &end);
  return begin <= 0 && end > 0 &&
         (!mask.present() ||
          load_global(static_cast<const uint8_t*>(mask.data) + tile.offset(mask, 0, 0)) != 0);
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
    const float slope = load_head_value(mod.alibi, tile.batch, tile.head + tile.rows.head(0));
    score.value = with_alibi(score.value, slope, float(tile.diagonal(0)));
  }
  const float bias = pair_bias(tile);
  score.value = bias == kHidden ? kHidden : score.value + bias;
  return score;
}

}  // namespace fae::cuda
