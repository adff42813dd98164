// How the micro-kernel multiplies: operand element, contraction step, accumulator.
#pragma once

#include "cpu/simd/vec.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

enum class Update { kStore, kAdd };  // C = AB, C += AB

// One step of depth covers kPair contraction elements; a_depth and ldb are per step,
// all strides count Operands (columns of B are kPair Operands wide when kPair > 1).
template <class P>
struct TileArgs {
  using Real = typename P::Vec::Elem;
  int64_t depth;
  const typename P::Operand* a;
  int64_t a_row;
  int64_t a_depth;
  const typename P::Operand* b;
  int64_t ldb;
  Real* c;
  int64_t ldc;
  int64_t first;  // steps of a longer sum that lie before these
};

// A product has an Operand type (what panels and row operands hold), the vector type
// of its accumulators, and moves kPair contraction elements per step. store() writes a
// vector of scores as row operands; store_lanes() writes a register of packed operands, store_lanes_n() its
// first lanes. exp2() is as exact as operands can hold. With kPair 2 there are also load_pairs(p, n), n
// operands of a row as pairs; interleave(even, odd, low, high), pairs of two rows; store_interleaved(p,
// even, odd), two vectors of scores as such; store_both(p, a, b), one behind the other; all_finite(r).
//
//   kTileRows, kTileVecs  the largest tile that is multiplied at a time: rows x vectors
//   kDepth                operands are padded with zeros to multiples of so many contraction elements
//   kTiles                there are tile registers: multiply() then takes the place of the loops of micro.h,
//                         and wants each row of A in one piece (a_depth = kPair)
//   Session               lives while a task multiplies
//
// One scalar times one vector per step:
template <class V>
struct FmaProduct {
  using Vec = V;
  using Operand = typename V::Elem;
  static constexpr int kPair = 1;
  static constexpr int kDepth = 1;
  static constexpr int kTileRows = V::kTileRows, kTileVecs = V::kTileVecs;
  static constexpr bool kTiles = false;
  struct Session {
    FAE_INLINE Session() {}
  };
  static constexpr int64_t kLongestSum = sizeof(Operand) == 8 ? 32 : 64;

  static FAE_INLINE typename V::Reg broadcast(const Operand* a) { return V::set1(*a); }
  static FAE_INLINE typename V::Reg load(const Operand* b) { return V::load(b); }
  static FAE_INLINE typename V::Reg exp2(typename V::Reg x) { return V::exp2(x); }
  static FAE_INLINE void store(Operand* p, typename V::Reg r) { V::store(p, r); }
  static FAE_INLINE void store_lanes(Operand* p, typename V::Reg r) { V::store(p, r); }
  static FAE_INLINE typename V::Reg multiply_add(typename V::Reg acc, typename V::Reg a, typename V::Reg b) {
    return V::fma(a, b, acc);
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
