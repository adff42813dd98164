// Sums over query rows for the keys of a block: dV = P^T dO and dK = dS^T Q.
//
// Weights (P or dS) lie as [row pair][key][pair] (or [row][key], where operands are not paired). Register
// tiles read them by broadcast: sums are [key][column]. Tile registers want rows of A in one piece; there
// weights are B, as they lie, A is the transposed rows, and sums are [column][key].
#pragma once

#include "cpu/gemm/micro.h"
#include "cpu/gemm/pack.h"
#include "cpu/kernel/special_rows.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// P: product, S: storage type. Of one kind of rows, `columns` wide.
template <class P, class S, bool kTransposed = P::kTiles>
class KeySums {
  using V = typename P::Vec;
  using Real = typename V::Elem;
  using Operand = typename P::Operand;
  static constexpr int64_t kStep = kPanel<P> * P::kPair;

 public:
  static constexpr int kKeys = P::kTileRows;  // that are multiplied at a time

  KeySums(int64_t columns, int64_t block_kv)
      : columns_(columns), padded_(round_up(columns, V::kWidth)), block_kv_(block_kv) {}

  int64_t size() const { return block_kv_ * padded_; }
  int64_t row_operands(int64_t rows) const { return panel_operands<P>(columns_, rows); }

  // Packs n rows, of which row_at(r) tells where each lies; returns whether all are finite.
  template <class RowAt>
  bool pack(RowAt&& row_at, int64_t n, Operand* dst) const {
    bool finite = true;
    for (int64_t r = 0; r < n; r += P::kPair) {
      const int count = int(n - r < P::kPair ? n - r : P::kPair);
      SourceRows<S> rows[P::kPair];
      for (int i = 0; i < count; ++i) rows[i] = row_at(r + i);
      finite &= pack_row_group<P>(rows, count, r / P::kPair, depth_steps<P>(n), columns_, dst);
    }
    return finite;
  }
  void clear_row(Operand* rows, int64_t n, int64_t r) const { clear_packed_row<P>(rows, n, columns_, r); }

  // Adds rows [first, last) of the n packed ones to keys [key, key + keys).
  void add(int64_t key, int keys, int64_t first, int64_t last, const Operand* weights, const Operand* rows,
           int64_t n, Real* sums) const {
    const int64_t begin = first / P::kPair, end = (last + P::kPair - 1) / P::kPair, steps = depth_steps<P>(n);
    for (int64_t c = 0; c < padded_; c += kPanel<P>) {
      multiply_tile<P, Update::kAdd>(
          keys, vectors_in<P>(padded_ - c),
          {end - begin, weights + (begin * block_kv_ + key) * P::kPair, P::kPair, block_kv_ * P::kPair,
           rows + (c / kPanel<P> * steps + begin) * kStep, kStep, sums + key * padded_ + c, padded_, begin});
    }
  }
  void add_special(int64_t key, Real weight, const SourceRows<S>& row, Real* sums) const {
    add_special_row(weight, row.data, row.column, columns_, sums + key * padded_);
  }

  // Writes keys [0, n), row_at(key) each, times scale.
  template <class RowAt>
  void store(int64_t n, typename V::Reg scale, const Real* sums, RowAt&& row_at) const {
    for (int64_t key = 0; key < n; ++key) {
      const Real* const from = sums + key * padded_;
      const StoredRow<S> to = row_at(key);
      for (int64_t c = 0; c < columns_; c += V::kWidth)
        to.template store<V>(c, columns_, V::mul(V::load(from + c), scale));
    }
  }

 private:
  int64_t columns_, padded_, block_kv_;
};

template <class P, class S>
class KeySums<P, S, true> {
  using V = typename P::Vec;
  using Reg = typename V::Reg;
  using Real = typename V::Elem;
  using Operand = typename P::Operand;
  static constexpr int W = V::kWidth;

 public:
  static constexpr int kKeys = int(kPanel<P>);

  KeySums(int64_t columns, int64_t block_kv)
      : columns_(columns), padded_(round_up(columns, W)), block_kv_(block_kv) {}

  int64_t size() const { return block_kv_ * padded_; }
  int64_t row_operands(int64_t rows) const {
    return round_up(columns_, P::kDepth) * round_up(rows, P::kDepth);
  }

  // Transposes kDepth x kDepth blocks, pairs of rows at a time; behind the last row there are zeros.
  template <class RowAt>
  bool pack(RowAt&& row_at, int64_t n, Operand* dst) const {
    constexpr int kBlock = P::kDepth;
    static_assert(kBlock == W * P::kPair, "a register holds a block's pairs of rows");
    const int64_t ld = round_up(n, kBlock);
    bool finite = true;
    for (int64_t r = 0; r < n; r += kBlock) {
      SourceRows<S> rows[kBlock];
      const int count = int(n - r < kBlock ? n - r : kBlock);
      for (int i = 0; i < count; ++i) rows[i] = row_at(r + i);
      for (int64_t c = 0; c < columns_; c += kBlock) {
        const int width = int(columns_ - c < kBlock ? columns_ - c : kBlock);
        const auto load = [&](int i) {
          if (i >= count) return V::zero();
          const Reg x = load_operands<P>(rows[i].data + c * rows[i].column, rows[i].column, width);
          finite = finite && P::all_finite(x);
          return x;
        };
        Reg low[W], high[W];
        for (int i = 0; i < W; ++i) P::interleave(load(2 * i), load(2 * i + 1), low + i, high + i);
        V::transpose(low);
        V::transpose(high);
        for (int i = 0; i < W; ++i) {
          P::store_lanes(dst + (c + i) * ld + r, low[i]);
          P::store_lanes(dst + (c + W + i) * ld + r, high[i]);
        }
      }
    }
    return finite;
  }
  void clear_row(Operand* rows, int64_t n, int64_t r) const {
    for (int64_t c = 0; c < columns_; ++c) rows[c * round_up(n, P::kDepth) + r] = {};
  }

  void add(int64_t key, int keys, int64_t first, int64_t last, const Operand* weights, const Operand* rows,
           int64_t n, Real* sums) const {
    const int64_t begin = first / P::kDepth * P::kDepth, ld = round_up(n, P::kDepth);
    const int64_t steps = depth_steps<P>(last - begin);
    for (int64_t c = 0; c < columns_; c += P::kTileRows) {
      const int count = int(columns_ - c < P::kTileRows ? columns_ - c : P::kTileRows);
      multiply_tile<P, Update::kAdd>(
          count, (keys + W - 1) / W,
          {steps, rows + c * ld + begin, ld, P::kPair, weights + begin * block_kv_ + key * P::kPair,
           block_kv_ * P::kPair, sums + c * block_kv_ + key, block_kv_, 0});
    }
  }
  void add_special(int64_t key, Real weight, const SourceRows<S>& row, Real* sums) const {
    for (int64_t c = 0; c < columns_; ++c)
      sums[c * block_kv_ + key] += weight * Real(to_float(row.data[c * row.column]));
  }

  template <class RowAt>
  void store(int64_t n, Reg scale, const Real* sums, RowAt&& row_at) const {
    for (int64_t key = 0; key < n; key += W) {
      for (int64_t c = 0; c < columns_; c += W) {
        Reg block[W];
        for (int i = 0; i < W; ++i) block[i] = V::load(sums + (c + i) * block_kv_ + key);
        V::transpose(block);
        for (int i = 0; i < W && key + i < n; ++i)
          row_at(key + i).template store<V>(c, columns_, V::mul(block[i], scale));
      }
    }
  }

 private:
  int64_t columns_, padded_, block_kv_;
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
