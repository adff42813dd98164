// The register tile: C[rows][columns] (+)= A[rows][depth] * B[depth][columns].
//
// Every matrix product of attention, forward and backward, goes through this one
// kernel; only what A and B point to differs. A is read by broadcast, so both of
// its strides are free: P^T costs no transposition. B is a packed panel.
#pragma once

#include "cpu/gemm/product.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, Update kUpdate, int kRows, int kVecs>
void tile_product(const TileArgs<P>& args) {
  using V = typename P::Vec;
  using Reg = typename V::Reg;
  constexpr int64_t kStep = int64_t(V::kWidth) * P::kPair;
  Reg acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) acc[r][j] = V::zero();
  }
  const typename P::Operand* a = args.a;
  const typename P::Operand* b = args.b;
  const int64_t a_row = args.a_row, a_depth = args.a_depth, ldb = args.ldb;
  for (int64_t d = args.depth; d > 0; --d) {
    Reg column[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) column[j] = P::load(b + j * kStep);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Reg row = P::broadcast(a + r * a_row);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[r][j] = P::multiply_add(acc[r][j], row, column[j]);
    }
    a += a_depth;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      auto* c = args.c + r * args.ldc + j * V::kWidth;
      if constexpr (kUpdate == Update::kAdd) acc[r][j] = V::add(V::load(c), acc[r][j]);
      V::store(c, acc[r][j]);
    }
  }
}

// All tile shapes up to the full one, as [rows - 1][vecs - 1].
template <class P, Update kUpdate>
struct TileTable {
  using Fn = void (*)(const TileArgs<P>&);
  Fn fn[P::kTileRows][P::kTileVecs];

  template <int kRows, int kVecs>
  constexpr void fill() {
    fn[kRows - 1][kVecs - 1] = &tile_product<P, kUpdate, kRows, kVecs>;
    if constexpr (kVecs > 1) fill<kRows, kVecs - 1>();
    else if constexpr (kRows > 1) fill<kRows - 1, P::kTileVecs>();
  }
  constexpr TileTable() : fn() { fill<P::kTileRows, P::kTileVecs>(); }
};

// Long sums are taken in pieces of P::kLongestSum steps: rounding errors of a running sum
// grow with its length, those of a sum of sums far less. They end at whole multiples in the longer sum, so
// that leaving out steps of zeros before the first one changes no bit.
template <class P, Update kUpdate>
FAE_INLINE void multiply_tile(int rows, int vecs, TileArgs<P> args) {
  if constexpr (P::kTiles) {
    P::template multiply<kUpdate>(rows, vecs, args);
  } else {
    static constexpr TileTable<P, kUpdate> first{};
    static constexpr TileTable<P, Update::kAdd> further{};
    int64_t left = args.depth;
    const int64_t piece = P::kLongestSum - args.first % P::kLongestSum;
    args.depth = left < piece ? left : piece;
    first.fn[rows - 1][vecs - 1](args);
    while ((left -= args.depth) > 0) {
      args.a += args.depth * args.a_depth;
      args.b += args.depth * args.ldb;
      args.depth = left < P::kLongestSum ? left : P::kLongestSum;
      further.fn[rows - 1][vecs - 1](args);
    }
  }
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
