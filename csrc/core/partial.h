// Partial softmax results form a monoid: (max, sum, weighted values).
#pragma once

#include <cmath>
#include <limits>

#include "core/hd.h"

namespace fae {

// State of one row over some of its keys; the empty element is {-inf, 0}. The
// weighted values live with whoever owns the row and are scaled by the factors.
template <class Real>
struct SoftmaxState {
  Real max = -std::numeric_limits<Real>::infinity();
  Real sum = 0;  // of exp(score - max)
};

template <class Real>
struct MergeFactors {
  Real a;
  Real b;
};

// The state of a's and b's keys together, and what to multiply each side's unnormalised values with.
// exp(difference): the exponential of a difference of two maxima, in whatever unit they are.
template <class Real, class Exp>
FAE_HD inline SoftmaxState<Real> merge(const SoftmaxState<Real>& a, const SoftmaxState<Real>& b,
                                       MergeFactors<Real>* factors, const Exp& exp) {
  const Real empty = -std::numeric_limits<Real>::infinity();
  const Real max = a.max > b.max ? a.max : b.max;
  // exp(-inf - -inf) would be NaN: an empty side contributes nothing.
  factors->a = a.max == empty ? Real(0) : exp(a.max - max);
  factors->b = b.max == empty ? Real(0) : exp(b.max - max);
  return {max, a.sum * factors->a + b.sum * factors->b};
}
template <class Real>
FAE_HD inline SoftmaxState<Real> merge(const SoftmaxState<Real>& a, const SoftmaxState<Real>& b,
                                       MergeFactors<Real>* factors) {
  return merge(a, b, factors, [](Real x) { return std::exp(x); });
}

// Natural log-sum-exp; -inf for the empty state.
template <class Real>
FAE_HD inline Real log_sum_exp(const SoftmaxState<Real>& s) {
  return s.sum == Real(0) ? -std::numeric_limits<Real>::infinity() : s.max + std::log(s.sum);
}

}  // namespace fae
