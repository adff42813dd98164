// Polynomials for 2^f on [-0.5, 0.5], constrained to be exactly 1 at 0.
//
// Minimax in relative error (Remez by iteratively reweighted least squares):
// degree 6: 2.0e-9, degree 11: 3.4e-18; both below a quarter ulp of their type.
#pragma once

#include "cpu/simd/vec.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class V>
FAE_INLINE typename V::Reg horner(typename V::Reg x, const typename V::Elem* coefficients, int degree) {
  typename V::Reg p = V::set1(coefficients[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) p = V::fma(p, x, V::set1(coefficients[i]));
  return p;
}

template <class V>
FAE_INLINE typename V::Reg exp2_polynomial(typename V::Reg f) {
  if constexpr (sizeof(typename V::Elem) == 4) {
    constexpr float c[] = {1.0f,
                           0.6931472028555155f,
                           0.2402264791358508f,
                           0.05550332470110194f,
                           0.009618437359738564f,
                           0.0013398874829603454f,
                           0.000153533622493863f};
    return horner<V>(f, c, 6);
  } else {
    constexpr double c[] = {1.0,
                            0.6931471805599453,
                            0.2402265069591013,
                            0.055504108664820084,
                            0.009618129107594102,
                            0.001333355814677364,
                            0.00015403530457131862,
                            1.5252733494030438e-05,
                            1.3215435273503322e-06,
                            1.0178199217166364e-07,
                            7.073784631818522e-09,
                            4.4348215647934546e-10};
    return horner<V>(f, c, 11);
  }
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
