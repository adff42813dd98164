// Online softmax of one row over one tile (Milakov & Gimelshein 2018; FlashAttention).
#pragma once

#include <math.h>

#include "cpu/gemm/product.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

inline float log_of(float x) { return ::logf(x); }
inline double log_of(double x) { return ::log(x); }
inline float exp_of(float x) { return ::expf(x); }
inline double exp_of(double x) { return ::exp(x); }

template <class V>
FAE_INLINE typename V::Elem row_maximum(const typename V::Elem* s, int64_t columns) {
  using Reg = typename V::Reg;
  Reg a = V::load(s), b = a;
  int64_t j = V::kWidth;
  for (; j + 2 * V::kWidth <= columns; j += 2 * V::kWidth) {
    a = V::max(a, V::load(s + j));
    b = V::max(b, V::load(s + j + V::kWidth));
  }
  if (j < columns) a = V::max(a, V::load(s + j));
  return V::reduce_max(V::max(a, b));
}

// Folds `columns` scores into the row's running (max, sum), writes exp(score - max) as
// operands of the next product to p (p may be s), and returns the factor that takes
// earlier sums and values to the new maximum. Hidden scores are -inf and become 0. kDrops: p is 0 where
// keep is; the sum is of all.
template <class P, bool kDrops = false>
FAE_INLINE typename P::Vec::Elem softmax_row(const typename P::Vec::Elem* s, int64_t columns,
                                             typename P::Vec::Elem exponent_scale, typename P::Vec::Elem* max,
                                             typename P::Vec::Elem* sum, typename P::Operand* p,
                                             const typename P::Vec::Elem* keep = nullptr) {
  using V = typename P::Vec;
  using Reg = typename V::Reg;
  using Real = typename V::Elem;
  const Real tile_max = row_maximum<V>(s, columns);
  const Real new_max = tile_max > *max ? tile_max : *max;
  // A row that has seen nothing yet: subtracting -inf would make NaN of its -inf scores.
  const Real shift = new_max == Real(-__builtin_inf()) ? Real(0) : new_max;
  const Reg shift_lanes = V::set1(shift), scale_lanes = V::set1(exponent_scale);
  const auto store = [&](int64_t j, Reg x) {
    if constexpr (kDrops) x = V::select(V::equal(V::load(keep + j), V::zero()), V::zero(), x);
    P::store(p + j, x);
  };
  Reg total = V::zero(), other = V::zero();
  int64_t j = 0;
  for (; j + 2 * V::kWidth <= columns; j += 2 * V::kWidth) {
    const Reg x = P::exp2(V::mul(V::sub(V::load(s + j), shift_lanes), scale_lanes));
    const Reg y = P::exp2(V::mul(V::sub(V::load(s + j + V::kWidth), shift_lanes), scale_lanes));
    store(j, x);
    store(j + V::kWidth, y);
    total = V::add(total, x);
    other = V::add(other, y);
  }
  if (j < columns) {
    const Reg x = P::exp2(V::mul(V::sub(V::load(s + j), shift_lanes), scale_lanes));
    store(j, x);
    total = V::add(total, x);
  }
  Real alpha = 1;
  if (*max == Real(-__builtin_inf())) {
    alpha = 0;  // nothing was summed up yet
  } else if (new_max != *max) {
    Real lanes[V::kWidth];
    V::store(lanes, V::exp2(V::set1((*max - shift) * exponent_scale)));
    alpha = lanes[0];
  }
  *max = new_max;
  *sum = *sum * alpha + V::reduce_add(V::add(total, other));
  return alpha;
}

// The same for up to kWidth rows side by side and an even number of vectors: what is taken across lanes is
// taken for all rows at once, and exponentials come when the caller likes.
template <class P>
class SoftmaxRows {
  using V = typename P::Vec;
  using Reg = typename V::Reg;
  using Real = typename V::Elem;
  static constexpr int W = V::kWidth;

 public:
  // Reads scores [rows][ld] and the first `rows` of a whole vector of running maxima, which it updates;
  // writes as many factors of what was summed up before.
  FAE_INLINE SoftmaxRows(const Real* s, int64_t ld, int rows, int64_t columns, Real exponent_scale, Real* max,
                         Real* alpha)
      : s_(s), ld_(ld), columns_(columns), rows_(rows), scale_(exponent_scale) {
    const Reg none = V::set1(Real(-__builtin_inf()));
    for (int i = 0; i < rows; ++i) {
      const Real* const row = s + i * ld;
      Reg a = V::load(row), b = V::load(row + W);
      for (int64_t j = 2 * W; j < columns; j += 2 * W) {
        a = V::max(a, V::load(row + j));
        b = V::max(b, V::load(row + j + W));
      }
      of_row_[i] = V::max(a, b);
    }
    for (int i = rows; i < W; ++i) of_row_[i] = none;
    const Reg here = V::max_each(of_row_), before = V::load(max);
    const Reg now = V::select(V::less(before, here), here, before);
    const Reg shift = V::select(V::equal(now, none), V::zero(), now);
    Reg factor = V::exp2(V::mul(V::sub(before, shift), V::set1(scale_)));
    factor = V::select(V::equal(before, now), V::set1(Real(1)), factor);
    V::store(shift_, shift);
    V::store(max, now);
    V::store(alpha, factor);
  }

  // Writes the exponentials of row i to p; with dropout 0 where keep is.
  template <bool kDrops>
  FAE_INLINE void exponentiate(int i, typename P::Operand* p, const Real* keep) {
    const Real* const row = s_ + i * ld_;
    const Reg shift = V::set1(shift_[i]), scale = V::set1(scale_);
    const auto kept = [&](int64_t j, Reg x) {
      return kDrops ? V::select(V::equal(V::load(keep + j), V::zero()), V::zero(), x) : x;
    };
    Reg total = V::zero(), other = V::zero();
    for (int64_t j = 0; j < columns_; j += 2 * W) {
      const Reg x = P::exp2(V::mul(V::sub(V::load(row + j), shift), scale));
      const Reg y = P::exp2(V::mul(V::sub(V::load(row + j + W), shift), scale));
      P::store_both(p + j, kept(j, x), kept(j + W, y));
      total = V::add(total, x);
      other = V::add(other, y);
    }
    of_row_[i] = V::add(total, other);
  }

  // Folds the sums of all rows, once each was exponentiated, into a whole vector of running sums.
  FAE_INLINE void finish(const Real* alpha, Real* sum) {
    for (int i = rows_; i < W; ++i) of_row_[i] = V::zero();
    V::store(sum, V::fma(V::load(sum), V::load(alpha), V::reduce_each(of_row_)));
  }

 private:
  const Real* s_;
  int64_t ld_, columns_;
  int rows_;
  Real scale_;
  Real shift_[W];
  Reg of_row_[W];  // maxima, then sums, by lanes
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
