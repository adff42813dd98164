// Probabilities and score gradients of the backward pass, in place on accumulators.
#pragma once

#include "cuda/prim/math.h"
#include "cuda/tile/dropout.h"

namespace fae::cuda {

// exp(score - lse) of a score value; 0 for -inf. lse_low: what rounding lse to fp32 left over.
FAE_DEVICE float probability(float s, float natural, float lse, float lse_low) {
  return exp2_fast((__builtin_fmaf(s, natural, -lse) - lse_low) * kLog2E);
}

// Whether lse in fp32 is too coarse for the kernels of T and its lse_low counts: always in fp32, and
// for rows far from 0, which in 16 bits a bias makes (a row at finfo.min).
template <class T, bool kModified>
constexpr bool kNeedsLow = sizeof(T) == 4 || kModified;

// Columns are packed rows, `at` the place of the first in the statistics.
template <bool kLow, int kN>
FAE_DEVICE void probabilities_transposed(FragC (&s)[1][kN], const RowStats& stats, int64_t at,
                                         float natural) {
  const float* const lse = stats.lse + at + 2 * (lane_index() % 4);
  const float* const low = kLow ? stats.lse_low + at + 2 * (lane_index() % 4) : nullptr;
  FAE_UNROLL
  for (int n = 0; n < kN; ++n) {
    const FloatPair l = load_global(reinterpret_cast<const FloatPair*>(lse + 8 * n));
    FloatPair rest{0, 0};
    if constexpr (kLow) rest = load_global(reinterpret_cast<const FloatPair*>(low + 8 * n));
    FAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      s[0][n][2 * half] = probability(s[0][n][2 * half], natural, l.x, rest.x);
      s[0][n][2 * half + 1] = probability(s[0][n][2 * half + 1], natural, l.y, rest.y);
    }
  }
}

// dP becomes dS = P (dP - delta).
template <int kN>
FAE_DEVICE void gradients_transposed(FragC (&dp)[1][kN], const FragC (&p)[1][kN], const RowStats& stats,
                                     int64_t at) {
  const float* const delta = stats.delta + at + 2 * (lane_index() % 4);
  FAE_UNROLL
  for (int n = 0; n < kN; ++n) {
    const FloatPair d = load_global(reinterpret_cast<const FloatPair*>(delta + 8 * n));
    FAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      dp[0][n][2 * half] = p[0][n][2 * half] * (dp[0][n][2 * half] - d.x);
      dp[0][n][2 * half + 1] = p[0][n][2 * half + 1] * (dp[0][n][2 * half + 1] - d.y);
    }
  }
}

template <int kM, int kN>
FAE_DEVICE void multiply_elements(FragC (&a)[kM][kN], const FragC (&b)[kM][kN]) {
  FAE_UNROLL
  for (int m = 0; m < kM; ++m) {
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) {
      FAE_UNROLL
      for (int e = 0; e < 4; ++e) a[m][n][e] *= b[m][n][e];
    }
  }
}

template <int kM, int kN>
FAE_DEVICE void copy(FragC (&to)[kM][kN], const FragC (&from)[kM][kN]) {
  FAE_UNROLL
  for (int m = 0; m < kM; ++m) {
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) {
      FAE_UNROLL
      for (int e = 0; e < 4; ++e) to[m][n][e] = from[m][n][e];
    }
  }
}

// Statistics of the rows lane / 4 and lane / 4 + 8 of a warp.
struct LaneRowStats { float lse[2], lse_low[2], delta[2]; };

// `at`: the place of the warp's first row.
template <bool kLow>
FAE_DEVICE LaneRowStats load_row_stats(const RowStats& stats, int64_t at) {
  LaneRowStats rows;
  FAE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = at + 8 * half + lane_index() / 4;
    rows.lse[half] = load_global(stats.lse + row);
    rows.lse_low[half] = kLow ? load_global(stats.lse_low + row) : 0.0f;
    rows.delta[half] = load_global(stats.delta + row);
  }
  return rows;
}

// From dot products s and dP to dS, in place of dP, for rows that are packed query rows. dS is that of the
// scores; `slope`: as in finish_scores.
template <bool kModified, int kN>
FAE_DEVICE void score_gradients(FragC (&s)[1][kN], FragC (&dp)[1][kN], FragC (*slope)[kN],
                                const LaneRowStats& stats, const ScoreTile& tile, int row, bool partial,
                                bool masked) {
  if (kModified || partial || masked) {
    finish_scores<kModified, false>(s, slope, tile, row, 0, partial, masked);
  }
  if constexpr (kModified) {
    const Dropout& dropout = tile.problem.dropout;
    if (dropout.present()) {
      scale_kept(dp[0], kept_elements<false, kN>(tile, row, 0), float(dropout.keep_scale));
    }
  }
  FAE_UNROLL
  for (int n = 0; n < kN; ++n) {
    FAE_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float p = probability(s[0][n][e], tile.scale.natural, stats.lse[e / 2], stats.lse_low[e / 2]);
      // Whatever dP and delta are, a hidden score has no gradient.
      dp[0][n][e] = s[0][n][e] == kHidden ? 0.0f : p * (dp[0][n][e] - stats.delta[e / 2]);
    }
  }
}

// Adds dS times the distance of ALiBi, over this thread's part of the rows lane / 4 and lane / 4 + 8 from
// `row` on.
template <int kN>
FAE_DEVICE void add_distances(float (&sum)[2], const FragC (&ds)[1][kN], const ScoreTile& tile, int row) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  FAE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float ahead = float(tile.diagonal(row + 8 * half + g) - 2 * t);
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) {
      FAE_UNROLL
      for (int e = 0; e < 2; ++e) {
        sum[half] = __builtin_fmaf(ds[0][n][2 * half + e], fabsf(ahead - float(8 * n + e)), sum[half]);
      }
    }
  }
}

}  // namespace fae::cuda
