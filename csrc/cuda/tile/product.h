// Products of one warp over tiles in shared memory.
#pragma once

#include "cuda/tile/frag.h"

namespace fae::cuda {

template <int kM, int kN>
FAE_DEVICE void clear(FragC (&c)[kM][kN]) {
  FAE_UNROLL
  for (int m = 0; m < kM; ++m) {
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) {
      FAE_UNROLL
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0;
    }
  }
}

// c += a b^T over all columns of both tiles: c's rows are a's from `row` on, its columns b's
// rows from `column` on. kBFirst: rounded as the transpose of b a^T is.
template <class T, bool kBFirst = false, int kM, int kN, class TileA, class TileB>
FAE_DEVICE void multiply_rows(FragC (&c)[kM][kN], const TileA& a, int row, const TileB& b, int column,
                              bool fast) {
  using M = Mma<T>;
  static_assert(TileA::kCols == TileB::kCols && kN % 2 == 0);
  const LaneChunk lane_a = M::a_rows(a, row), lane_b = M::b_rows(b, column);
  FAE_UNROLL
  for (int depth = 0; depth < TileA::kCols; depth += M::kStep) {
    typename M::A fa[kM];
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) M::template load_a_rows<TileA>(fa[m], lane_a, 16 * m, depth, fast);
    FAE_UNROLL
    for (int n = 0; n < kN; n += 2) {
      typename M::B fb[2];
      M::template load_b_rows<TileB>(fb, lane_b, 8 * n, depth, fast);
      FAE_UNROLL
      for (int m = 0; m < kM; ++m) {
        M::template multiply<kBFirst>(c[m][n], fa[m], fb[0], fast);
        M::template multiply<kBFirst>(c[m][n + 1], fa[m], fb[1], fast);
      }
    }
  }
}

// c += a^T b over kDepth rows of both tiles: c's rows are a's columns from `row` on, its
// columns b's from `column` on.
template <class T, int kDepth, int kM, int kN, class TileA, class TileB>
FAE_DEVICE void multiply_columns(FragC (&c)[kM][kN], const TileA& a, int row, const TileB& b, int column,
                                 bool fast) {
  using M = Mma<T>;
  static_assert(kN % 2 == 0);
  const LaneChunk lane_a = M::a_columns(a, row),
                  lane_b = TileB::move(M::b_columns(b), 0, column / TileB::kChunk);
  FAE_UNROLL
  for (int depth = 0; depth < kDepth; depth += M::kStep) {
    typename M::A fa[kM];
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) M::template load_a_columns<TileA>(fa[m], lane_a, depth, 16 * m, fast);
    FAE_UNROLL
    for (int n = 0; n < kN; n += 2) {
      typename M::B fb[2];
      M::template load_b_columns<TileB>(fb, lane_b, depth, 8 * n, fast);
      FAE_UNROLL
      for (int m = 0; m < kM; ++m) {
        M::multiply(c[m][n], fa[m], fb[0], fast);
        M::multiply(c[m][n + 1], fa[m], fb[1], fast);
      }
    }
  }
}

// c += a b where a is an accumulator (kDepth columns) and b a tile of kDepth rows.
template <class T, int kM, int kDepthBlocks, int kN, class TileB>
FAE_DEVICE void accumulate(FragC (&c)[kM][kN], const FragC (&a)[kM][kDepthBlocks], const TileB& b,
                           bool fast) {
  using M = Mma<T>;
  constexpr int kSteps = kDepthBlocks * 8 / M::kStep;
  static_assert(kN % 2 == 0 && TileB::kRows == kDepthBlocks * 8);
  const LaneChunk lane_b = M::b_columns(b);
  if constexpr (DTypeOf<T>::value == DType::kFloat32) {
    // Long sums are taken in pieces, one a tile, or their rounding errors would show in fp32.
    typename M::A fa[kM][kSteps];
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int step = 0; step < kSteps; ++step) M::from_accumulator(fa[m][step], a[m], step, fast);
    }
    FAE_UNROLL
    for (int n = 0; n < kN; n += 2) {
      FragC piece[kM][2];
      clear(piece);
      FAE_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        typename M::B fb[2];
        M::template load_b_columns<TileB>(fb, lane_b, step * M::kStep, 8 * n, fast);
        FAE_UNROLL
        for (int m = 0; m < kM; ++m) {
          M::multiply(piece[m][0], fa[m][step], fb[0], fast);
          M::multiply(piece[m][1], fa[m][step], fb[1], fast);
        }
      }
      FAE_UNROLL
      for (int m = 0; m < kM; ++m) {
        FAE_UNROLL
        for (int e = 0; e < 4; ++e) {
          c[m][n][e] += piece[m][0][e];
          c[m][n + 1][e] += piece[m][1][e];
        }
      }
    }
  } else {
    FAE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      typename M::A fa[kM];
      FAE_UNROLL
      for (int m = 0; m < kM; ++m) M::from_accumulator(fa[m], a[m], step, fast);
      FAE_UNROLL
      for (int n = 0; n < kN; n += 2) {
        typename M::B fb[2];
        M::template load_b_columns<TileB>(fb, lane_b, step * M::kStep, 8 * n, fast);
        FAE_UNROLL
        for (int m = 0; m < kM; ++m) {
          M::multiply(c[m][n], fa[m], fb[0], fast);
          M::multiply(c[m][n + 1], fa[m], fb[1], fast);
        }
      }
    }
  }
}

}  // namespace fae::cuda
