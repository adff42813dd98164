// Rows of K, V, Q or dO that hold a NaN or an infinity.
//
// A hidden key has probability 0, and 0 * NaN would leak into rows that do not see it.
// Such rows are therefore zeroed in the packed panels and added by hand, to those rows
// only that see them. Finite data never comes here.
#pragma once

#include "cpu/gemm/pack.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// Writes the indices of the rows with a non-finite element; returns how many.
template <class S>
int64_t find_special_rows(SourceRows<S> src, int64_t n, int64_t columns, int64_t* indices) {
  int64_t count = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const auto x = to_float(src.data[r * src.row + c * src.column]);
      if (!__builtin_isfinite(x)) {
        indices[count++] = r;
        break;
      }
    }
  }
  return count;
}

// c[0..columns) += weight * row
template <class Real, class S>
void add_special_row(Real weight, const S* row, int64_t stride, int64_t columns, Real* c) {
  for (int64_t i = 0; i < columns; ++i) c[i] += weight * to_float(row[i * stride]);
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
