// How the micro-kernel multiplies: operand element, contraction step, accumulator.
#pragma once

#include "cpu/simd/vec.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// A product has an Operand type (what panels and row operands hold), the vector type
// of its accumulators, and moves kPair contraction elements per step. store() writes a
// vector of scores as row operands; store_lanes() writes a register of packed operands.
// exp2() is as exact as operands can hold.
// One scalar times one vector per step:
template <class V>
struct FmaProduct {
  using Vec = V;
  using Operand = typename V::Elem;
  static constexpr int kPair = 1;
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
