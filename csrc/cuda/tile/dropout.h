// Which probabilities of a tile dropout keeps: Philox (core/philox.h) on the accumulators of one warp.
//
// Four neighbouring keys of a row share one run of Philox, and lie in two lanes, or four where keys are rows.
// Each of these lanes runs it for other rows and keys, and they exchange the outcomes as bits.
#pragma once

#include "cuda/prim/warp.h"
#include "cuda/tile/score.h"

namespace fae::cuda {

FAE_DEVICE PhiloxKey load_dropout_key(const Dropout& dropout) {
  return call_key(uint64_t(load_global(dropout.state)),
                  uint64_t(load_global(dropout.state + dropout.state_stride)));
}

// A bit for each word that reaches the threshold. A call, for tiles leave it few registers, and its price is
// small beside that of the rounds.
FAE_DEVICE_COLD uint32_t kept_words(PhiloxWords counter, PhiloxKey key, uint32_t threshold) {
  const PhiloxWords words = philox(counter, key);
  uint32_t kept = 0;
  FAE_UNROLL
  for (int i = 0; i < 4; ++i) kept |= uint32_t(words.x[i] >= threshold) << i;
  return kept;
}

// A bit for each of the keys [4 quad, 4 quad + 4) that query row r of a tile keeps.
FAE_DEVICE uint32_t kept_keys(const ScoreTile& tile, PhiloxKey key, int r, int quad) {
  return kept_words({{uint32_t(quad), uint32_t(tile.rows.query(r)),
                      uint32_t(tile.sequence.head() + tile.rows.head(r)), uint32_t(tile.sequence.batch())}},
                    key, tile.problem.dropout.threshold);
}

// Bit 4 n + e: whether element e of part n of an accumulator of 16 rows is kept; see score.h for `row` and
// `column`. For a warp.
template <bool kTransposed, int kN>
FAE_DEVICE uint32_t kept_elements(const ScoreTile& tile, int row, int column) {
  static_assert(4 * kN <= 32, "a bit for each element");
  const PhiloxKey key = load_dropout_key(tile.problem.dropout);
  const int g = lane_index() / 4, t = lane_index() % 4;
  uint32_t own = 0, kept = 0;
  if constexpr (!kTransposed) {
    // Of two lanes, the first has keys 0 and 1 of rows g and g + 8, and runs for row g.
    const int turn = t % 2;
    const int quad = (tile.key + column) / 4 + t / 2;
    FAE_NO_UNROLL
    for (int n = 0; n < kN; ++n) {
      own |= kept_keys(tile, key, row + 8 * turn + g, quad + 2 * n) << (4 * n);
    }
    const uint32_t other = shuffle_xor(own, 1);
    const uint32_t top = turn ? other : own, bottom = turn ? own : other;
    constexpr uint32_t kPairs = 0x33333333u;
    kept = (top >> 2 * turn & kPairs) | (bottom >> 2 * turn & kPairs) << 2;
  } else {
    // Of four lanes, each has one key of a quad and of the one 8 keys on, of two rows, and runs for one of
    // these four.
    const int turn = g % 4;
    const int quad = (tile.key + row) / 4 + g / 4 + turn / 2 * 2;
    FAE_NO_UNROLL
    for (int n = 0; n < kN; ++n) {
      own |= kept_keys(tile, key, column + 8 * n + 2 * t + turn % 2, quad) << (4 * n);
    }
    constexpr uint32_t kSingles = 0x11111111u;
    FAE_UNROLL
    for (int i = 0; i < 4; ++i) kept |= (shuffle_xor(own, 4 * i) >> turn & kSingles) << (turn ^ i);
  }
  return kept;
}

// P of what is not kept becomes 0. What is kept is scaled in the end, with its sums.
template <int kN>
FAE_DEVICE void drop(FragC (&p)[kN], uint32_t kept) {
  FAE_UNROLL
  for (int n = 0; n < kN; ++n) {
    FAE_UNROLL
    for (int e = 0; e < 4; ++e) p[n][e] = kept >> (4 * n + e) & 1 ? p[n][e] : 0.0f;
  }
}

// Gradients of P after dropout become those of P before.
template <int kN>
FAE_DEVICE void scale_kept(FragC (&dp)[kN], uint32_t kept, float keep_scale) {
  FAE_UNROLL
  for (int n = 0; n < kN; ++n) {
    FAE_UNROLL
    for (int e = 0; e < 4; ++e) dp[n][e] *= kept >> (4 * n + e) & 1 ? keep_scale : 0.0f;
  }
}

// What a row's accumulated values are multiplied with in the end. Of a row that saw nothing they are 0, and
// stay so.
template <bool kModified>
FAE_DEVICE float result_factor(const Dropout& dropout, float sum) {
  return (kModified ? float(dropout.keep_scale) : 1.0f) / (sum == 0 ? 1.0f : sum);
}

}  // namespace fae::cuda
