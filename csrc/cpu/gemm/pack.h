// From strided storage to the layouts that the micro-kernel reads.
//
// A panel is kPanel columns wide, zero-padded to whole vectors, and holds its depth
// in steps of kPair elements: panel[depth / kPair][kPanel][kPair], zero-padded to kDepth elements.
#pragma once

#include "cpu/gemm/product.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P>
constexpr int64_t kPanel = int64_t(P::kTileVecs) * P::Vec::kWidth;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Scores of so many keys come together: whole vectors, that are whole steps of the products that follow.
template <class P>
constexpr int64_t kColumns = P::Vec::kWidth > P::kDepth ? P::Vec::kWidth : P::kDepth;

template <class P>
constexpr int64_t depth_steps(int64_t depth) {
  return round_up(depth, P::kDepth) / P::kPair;
}

// Vectors of a panel where `columns` columns are left.
template <class P>
constexpr int vectors_in(int64_t columns) {
  return int((columns < kPanel<P> ? columns : kPanel<P>) / P::Vec::kWidth);
}

// Operands in the panels of `columns` columns and `depth` contraction elements.
template <class P>
constexpr int64_t panel_operands(int64_t columns, int64_t depth) {
  return round_up(columns, kPanel<P>) * round_up(depth, P::kDepth);
}

// Rows of a strided matrix as it lies in memory.
template <class S>
struct SourceRows {
  const S* data;
  int64_t row;     // stride between rows
  int64_t column;  // stride between elements of a row
  FAE_INLINE SourceRows from_row(int64_t r) const { return {data + r * row, row, column}; }
};

// Fetches early what packing comes to in a while: rows that lie far apart are no stream to the processor.
// Past the last row nothing is read; an address that does not exist is no harm.
template <class S>
FAE_INLINE void fetch_row(const SourceRows<S>& rows, int64_t r, int64_t columns) {
  constexpr int64_t kLine = int64_t(64 / sizeof(S));
  if (rows.row <= columns || rows.column != 1) return;
  const S* const row = rows.data + r * rows.row;
  for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(row + c);
}
constexpr int64_t kRowsAhead = 16;

// n <= kWidth elements of one row as a vector, the rest 0.
template <class V, class S>
FAE_INLINE typename V::Reg load_row(const S* p, int64_t stride, int n) {
  if (stride == 1) return n == V::kWidth ? V::load(p) : V::load_n(p, n);
  typename V::Elem lanes[V::kWidth] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i * stride]);
  return V::load(lanes);
}

// The first n lanes to one row of strided storage.
template <class V, class S>
FAE_INLINE void store_row(S* p, int64_t stride, typename V::Reg r, int n) {
  if (stride == 1) {
    if (n == V::kWidth) V::store(p, r);
    else V::store_n(p, r, n);
    return;
  }
  S lanes[V::kWidth];
  V::store(lanes, r);
  for (int i = 0; i < n; ++i) p[i * stride] = lanes[i];
}

// One row of a result.
template <class S>
struct StoredRow {
  S* data;
  int64_t stride;
  // A vector from column c on, but nothing past `columns`.
  template <class V>
  FAE_INLINE void store(int64_t c, int64_t columns, typename V::Reg r) const {
    store_row<V>(data + c * stride, stride, r, int(columns - c < V::kWidth ? columns - c : V::kWidth));
  }
};

// Watches what passes through a packing loop: x * 0 is NaN for NaN and infinities.
template <class V>
struct FiniteWatch {
  typename V::Reg sum;
  // Spelled out: a defaulted constructor would be compiled for the baseline target.
  FAE_INLINE FiniteWatch() : sum(V::zero()) {}
  FAE_INLINE void see(typename V::Reg x) { sum = V::fma(x, V::zero(), sum); }
  FAE_INLINE bool all_finite() const { return V::reduce_add(sum) == 0; }
};

// Pairs of 16-bit operands travel as the 32-bit lanes of an F32 register.
template <class P>
FAE_INLINE typename P::Vec::Reg load_pairs(const BFloat16* p, int64_t stride, int n) {
  constexpr int kFull = P::Vec::kWidth * 2;
  if (stride == 1) return P::load_pairs(p, n);
  BFloat16 lanes[kFull] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i * stride];
  return P::load_pairs(lanes, kFull);
}

// One vector of row operands: kWidth * kPair elements of a row, or the first n of them and zeros.
template <class P, class S>
FAE_INLINE typename P::Vec::Reg load_operands(const S* p, int64_t stride, int n) {
  if constexpr (P::kPair == 2) return load_pairs<P>(p, stride, n);
  else return load_row<typename P::Vec>(p, stride, n);
}

// The same where all of them are there, one behind the other.
template <class P, class S>
FAE_INLINE typename P::Vec::Reg load_whole(const S* p) {
  if constexpr (P::kPair == 2) return P::load_pairs(p, P::Vec::kWidth * 2);
  else return P::Vec::load(p);
}

// src is n x depth; its rows become columns: dst[n / kPanel][depth_steps][kPanel][kPair].
template <class P, class S>
void pack_transposed(SourceRows<S> src, int64_t n, int64_t depth, typename P::Operand* dst) {
  using V = typename P::Vec;
  using Reg = typename V::Reg;
  constexpr int W = V::kWidth;
  constexpr int64_t kStep = kPanel<P> * P::kPair;
  const int64_t steps = depth_steps<P>(depth);
  for (int64_t j = 0; j < n; j += W) {
    const int rows = int(n - j < W ? n - j : W);
    auto* panel = dst + (j / kPanel<P>)*steps * kStep + (j % kPanel<P>)*P::kPair;
    for (int r = 0; r < rows; ++r) fetch_row(src, j + kRowsAhead + r, depth);
    for (int64_t s = 0; s < steps; s += W) {
      const int64_t d = s * P::kPair;
      const int columns = int(depth - d < W * P::kPair ? depth - d : W * P::kPair);
      const S* const first = src.data + j * src.row + d * src.column;
      Reg block[W];
      if (rows == W && columns == W * P::kPair && src.column == 1) {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) block[r] = load_whole<P>(first + r * src.row);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) {
          block[r] = r < rows ? load_operands<P>(first + r * src.row, src.column, columns) : V::zero();
        }
      }
      V::transpose(block);
      const int filled = int(steps - s < W ? steps - s : W);
      if (filled == W) {
#pragma GCC unroll 16
        for (int t = 0; t < W; ++t) P::store_lanes(panel + (s + t) * kStep, block[t]);
      } else {
        for (int t = 0; t < filled; ++t) P::store_lanes(panel + (s + t) * kStep, block[t]);
      }
    }
  }
}

// One step of depth of a row panel set: kPair rows of n elements (fewer at the end, the
// rest is 0), as dst[n / kPanel][step][kPanel][kPair]. Returns whether all are finite.
template <class P, class S>
bool pack_row_group(const SourceRows<S>* rows, int count, int64_t step, int64_t steps, int64_t n,
                    typename P::Operand* dst) {
  using V = typename P::Vec;
  constexpr int W = V::kWidth;
  constexpr int kPiece = W * P::kPair;  // columns per source vector
  constexpr int64_t kStep = kPanel<P> * P::kPair;
  bool finite = true;
  FiniteWatch<V> watch;
  const auto at = [=](int64_t c) {
    return dst + ((c / kPanel<P>)*steps + step) * kStep + (c % kPanel<P>)*P::kPair;
  };
  int64_t c = 0;
  if constexpr (P::kPair == 1) {
    if (rows[0].column == 1) {
      for (; c + kPanel<P> <= n; c += kPanel<P>) {
        auto* const to = at(c);
#pragma GCC unroll 4
        for (int j = 0; j < P::kTileVecs; ++j) {
          const auto x = V::load(rows[0].data + c + j * W);
          watch.see(x);
          P::store_lanes(to + j * W, x);
        }
      }
    }
  }
  for (; c < n; c += kPiece) {
    const int columns = int(n - c < kPiece ? n - c : kPiece);
    const auto x = load_operands<P>(rows[0].data + c * rows[0].column, rows[0].column, columns);
    if constexpr (P::kPair == 2) {
      const auto odd = count > 1
                           ? load_operands<P>(rows[1].data + c * rows[1].column, rows[1].column, columns)
                           : V::zero();
      finite = finite && P::all_finite(x) && P::all_finite(odd);
      typename V::Reg low, high;
      P::interleave(x, odd, &low, &high);
      P::store_lanes(at(c), low);
      if (columns > W) P::store_lanes(at(c) + kPiece, high);
    } else {
      watch.see(x);
      P::store_lanes(at(c), x);
    }
  }
  return finite && watch.all_finite();
}

// src is depth x n; its rows stay rows: dst[n / kPanel][depth_steps][kPanel][kPair].
// Returns whether every element is finite.
template <class P, class S>
bool pack_rows(SourceRows<S> src, int64_t depth, int64_t n, typename P::Operand* dst) {
  constexpr int64_t kStep = kPanel<P> * P::kPair;
  const int64_t steps = depth_steps<P>(depth);
  bool finite = true;
  for (int64_t d = 0; d < depth; d += P::kPair) {
    SourceRows<S> rows[P::kPair];
    const int count = int(depth - d < P::kPair ? depth - d : P::kPair);
    for (int i = 0; i < count; ++i) {
      rows[i] = src.from_row(d + i);
      fetch_row(src, d + i + kRowsAhead, n);
    }
    finite &= pack_row_group<P>(rows, count, d / P::kPair, steps, n, dst);
  }
  for (int64_t step = (depth + P::kPair - 1) / P::kPair; step < steps; ++step) {
    for (int64_t c = 0; c < n; c += kPanel<P>)
      __builtin_memset(dst + (c / kPanel<P> * steps + step) * kStep, 0, size_t(kStep) * sizeof(*dst));
  }
  return finite;
}

// Row operands, n x depth: dst[n][round_up(depth, kDepth)].
template <class P, class S>
FAE_INLINE void pack_operand(SourceRows<S> src, int64_t n, int64_t depth, typename P::Operand* dst) {
  using V = typename P::Vec;
  constexpr int kPiece = V::kWidth * P::kPair;
  const int64_t ld = round_up(depth, P::kDepth);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t d = 0; d < ld; d += kPiece) {
      const int columns = int(depth - d < kPiece ? depth - d : kPiece);
      const int stored = int(ld - d < kPiece ? ld - d : kPiece);
      const auto x = load_operands<P>(src.data + r * src.row + d * src.column, src.column, columns);
      auto* const to = dst + r * ld + d;
      if (stored == kPiece) P::store_lanes(to, x);  // where vectors are narrow, masked stores are slow
      else if constexpr (P::kPair == 2) P::store_lanes_n(to, x, stored);
      else V::store_n(to, x, stored);
    }
  }
}

// Overwrites row `k` of a pack_rows() panel set with zeros.
template <class P>
void clear_packed_row(typename P::Operand* dst, int64_t depth, int64_t n, int64_t k) {
  constexpr int64_t kStep = kPanel<P> * P::kPair;
  const int64_t steps = depth_steps<P>(depth);
  for (int64_t c = 0; c < n; ++c) {
    dst[(c / kPanel<P>)*steps * kStep + (k / P::kPair) * kStep + (c % kPanel<P>)*P::kPair + k % P::kPair] =
        {};
  }
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
