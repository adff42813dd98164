// tanh to a few ulp over the whole range.
#pragma once

#include "cpu/simd/vec.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// Near 0 an odd minimax polynomial (4.4e-9 relative on |x| <= 0.625), elsewhere
// 1 - 2 / (exp(2|x|) + 1), which cancels nothing there.
template <class V>
FAE_INLINE typename V::Reg tanh(typename V::Reg x) {
  if constexpr (sizeof(typename V::Elem) == 4) {
    using Reg = typename V::Reg;
    const Reg square = V::mul(x, x);
    Reg q = V::set1(-0.005704913828019499f);
    q = V::fma(q, square, V::set1(0.020639024776668465f));
    q = V::fma(q, square, V::set1(-0.05373969692523265f));
    q = V::fma(q, square, V::set1(0.13331441993245835f));
    q = V::fma(q, square, V::set1(-0.33333281934958797f));
    const Reg near = V::fma(V::mul(x, square), q, x);
    const Reg magnitude = V::max(V::sub(V::zero(), x), x);
    // exp(-2|x|) never overflows: tanh = (1 - e) / (1 + e) = 2 / (1 + e) - 1.
    const Reg e = V::exp2(V::mul(magnitude, V::set1(-2.885390081777927f)));
    const Reg far = V::sub(V::div(V::set1(2.0f), V::add(V::set1(1.0f), e)), V::set1(1.0f));
    const Reg signed_far = V::select(V::less(x, V::zero()), V::sub(V::zero(), far), far);
    return V::select(V::less(magnitude, V::set1(0.625f)), near, signed_far);
  } else {
    double lanes[V::kWidth];
    V::store(lanes, x);
    for (double& lane : lanes) lane = ::tanh(lane);
    return V::load(lanes);
  }
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
