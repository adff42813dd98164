// Backward attention of few query rows: keys and values are read once, where they lie, and their gradients
// written once, as there is nothing to sum up over tiles of rows.
//
// One task = all packed rows of one K/V head against all keys.
#pragma once

#include "cpu/kernel/backward_rows.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, class S>
class DirectBackward : private BackwardRows<P, S> {
  using Base = BackwardRows<P, S>;
  using typename Base::Operand;
  using typename Base::Products;
  using typename Base::Real;
  using typename Base::TileRange;
  using typename Base::V;
  using Base::call_, Base::p_, Base::plan_, Base::arena_, Base::kRows, Base::sequence_;
  using Base::clear, Base::delta, Base::alibi_terms, Base::dim_padded_, Base::dq_;

 public:
  DirectBackward(const BackwardCall& call, const Plan& plan, std::byte* base)
      : Base(call, plan, base), dim_v_padded_(round_up(p_.dim_v, V::kWidth)) {
    s_ = arena_.template take<Real>(kDirectRows * plan.block_kv);
    ds_ = arena_.template take<Real>(kDirectRows * plan.block_kv);
    if constexpr (P::kPair > 1) row_gradients_ = arena_.template take<Operand>(kRows * plan.block_kv);
    q_wide_ = arena_.template take<Real>(kDirectRows * dim_padded_);
    dout_wide_ = arena_.template take<Real>(kDirectRows * dim_v_padded_);
    dq_ = arena_.template take<Real>(Base::dq_size(p_));
    seen_keys_ = arena_.template take<S>(plan.block_kv * p_.dim);
  }
  size_t bytes() const { return arena_.used(); }

  void run_head(int64_t unit) {
    this->select_head(unit);
    const int64_t rows = this->row_count();
    this->begin_queries(0, rows);
    this->load_rows(0, rows, delta());
    const bool finite = widen(p_.q, rows, p_.dim, dim_padded_, q_wide_) &
                        widen(call_.dout, rows, p_.dim_v, dim_v_padded_, dout_wide_);
    skips_hidden_ = !finite;
    run_blocks(rows);
    if (finite && !all_finite(dq_, rows * dim_padded_)) {
      skips_hidden_ = true;
      this->begin_queries(0, rows);
      run_blocks(rows);
    }
    this->store_queries(0, rows);
  }

 private:
  // Rows of x as numbers to compute with, zeros behind them; returns whether all are finite.
  bool widen(const View4& x, int64_t rows, int64_t columns, int64_t padded, Real* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      const SourceRows<S> row = this->query_of(x, r);
      for (int64_t c = 0; c < columns; c += V::kWidth) {
        const int lanes = int(columns - c < V::kWidth ? columns - c : V::kWidth);
        V::store(to + r * padded + c, load_row<V>(row.data + c * row.column, row.column, lanes));
      }
    }
    return all_finite(to, rows * padded);
  }
  static bool all_finite(const Real* x, int64_t n) {
    FiniteWatch<V> watch;
    for (int64_t i = 0; i < n; i += V::kWidth) watch.see(V::load(x + i));
    return watch.all_finite();
  }

  void run_blocks(int64_t rows) {
    for (int64_t k = 0; k < sequence_.seq_kv; k += plan_.block_kv) run_block(rows, k);
  }

  void run_block(int64_t rows, int64_t k) {
    const int64_t end = k + plan_.block_kv < sequence_.seq_kv ? k + plan_.block_kv : sequence_.seq_kv;
    const int64_t seen_end = end < sequence_.kv_length ? end : sequence_.kv_length;
    if (k < seen_end) this->load_keys(k, seen_end);
    bool any = false;
    for (int64_t r = 0; r < rows; r += kRows) {
      const int count = int(rows - r < kRows ? rows - r : kRows);
      Real* const s = s_ + r * plan_.block_kv;
      Real* const ds = ds_ + r * plan_.block_kv;
      TileRange range;
      const bool seen = k < seen_end && this->compute_tile(r, count, s, ds, plan_.block_kv, true, &range,
                                                           alibi_terms() ? alibi_terms() + r : nullptr);
      if (!seen) range = {};
      for (int i = 0; i < count; ++i) {
        Real* const both[] = {s + i * plan_.block_kv, ds + i * plan_.block_kv};
        for (Real* row : both) {
          clear(row, range.first);
          clear(row + range.first + range.columns, plan_.block_kv - range.first - range.columns);
        }
      }
      if (seen) add_to_queries(r, count, ds, range);
      any |= seen;
    }
    const int64_t used = any ? rows : 0;
    for (int64_t key = 0; key < end - k; ++key) {
      int64_t seeing[kDirectRows];
      const int count = rows_seeing(k + key, used, seeing);
      store_key(call_.dk, k + key, p_.dim, ds_ + key, q_wide_, dim_padded_, seeing, count,
                Real(p_.score.scale));
      store_key(call_.dv, k + key, p_.dim_v, s_ + key, dout_wide_, dim_v_padded_, seeing, count,
                Real(p_.dropout.keep_scale));
    }
  }

  bool sees(int64_t row, int64_t key) const {
    const RowRef at = this->ref(row);
    return is_visible(p_, sequence_, this->b_, at.head, at.query, key);
  }
  // Rows with a weight for the key: all, where those of weight 0 do no harm.
  int rows_seeing(int64_t key, int64_t rows, int64_t* seeing) const {
    int count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (!skips_hidden_ || sees(r, key)) seeing[count++] = r;
    }
    return count;
  }

  // dQ[rows] += dS K
  void add_to_queries(int64_t row, int rows, const Real* ds, const TileRange& range) {
    const Operand* gradients;
    if constexpr (P::kPair > 1) {
      for (int i = 0; i < rows; ++i) {
        for (int64_t j = range.first; j < range.first + range.columns; j += V::kWidth)
          P::store(row_gradients_ + i * plan_.block_kv + j, V::load(ds + i * plan_.block_kv + j));
      }
      gradients = row_gradients_ + range.first;
    } else {
      gradients = ds + range.first;
    }
    Real ones[kRows];
    for (int i = 0; i < rows; ++i) ones[i] = 1;
    Real* const dq = dq_ + row * dim_padded_;
    const SourceRows<S> from = this->keys_of(p_.k, this->k_begin_ + range.first);
    const typename Products::Rows keys(from, Products::rows_ahead(p_.dim) * from.row);
    if (!skips_hidden_) {
      Products::accumulate(gradients, plan_.block_kv, rows, ones, keys, range.keys, p_.dim, dq, dim_padded_);
      return;
    }
    for (int i = 0; i < rows; ++i) {
      const auto sees_key = [&](int64_t j) { return sees(row + i, this->k_begin_ + range.first + j); };
      Products::copy_seen(keys, range.keys, p_.dim, sees_key, seen_keys_);
      Products::accumulate(gradients + i * plan_.block_kv, plan_.block_kv, 1, ones,
                           {{seen_keys_, p_.dim, 1}, 0}, range.keys, p_.dim, dq + i * dim_padded_,
                           dim_padded_);
    }
  }

  // x[key] = scale * sum of weights * rows, of those that see the key; weights: [row][block_kv].
  void store_key(const View4& x, int64_t key, int64_t columns, const Real* weights, const Real* rows,
                 int64_t ld, const int64_t* seeing, int count, Real scale) const {
    const StoredRow<S> to = this->gradient_row(x, this->head_kv_, sequence_.first_key + key);
    int64_t c = 0;
    for (; c + kVectors * V::kWidth <= ld; c += kVectors * V::kWidth)
      store_columns<kVectors>(to, c, columns, weights, rows + c, ld, seeing, count, scale);
    for (; c < ld; c += V::kWidth)
      store_columns<1>(to, c, columns, weights, rows + c, ld, seeing, count, scale);
  }
  static constexpr int kVectors = 4;  // sums side by side, so that none waits for itself
  template <int kCount>
  FAE_INLINE void store_columns(const StoredRow<S>& to, int64_t c, int64_t columns, const Real* weights,
                                const Real* rows, int64_t ld, const int64_t* seeing, int count,
                                Real scale) const {
    typename V::Reg sum[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sum[i] = V::zero();
    for (int n = 0; n < count; ++n) {
      const int64_t r = seeing[n];
      const typename V::Reg weight = V::set1(weights[r * plan_.block_kv]);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i)
        sum[i] = V::fma(weight, V::load(rows + r * ld + i * V::kWidth), sum[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
      to.template store<V>(c + i * V::kWidth, columns, V::mul(sum[i], V::set1(scale)));
  }

  const int64_t dim_v_padded_;
  Real* s_;                           // [kDirectRows][block_kv], then P
  Real* ds_;                          // [kDirectRows][block_kv], dP, then dS
  Operand* row_gradients_ = nullptr;  // [kRows][block_kv], where operands are narrower than scores
  Real* q_wide_;                      // [kDirectRows][dim_padded]
  Real* dout_wide_;                   // [kDirectRows][dim_v_padded]
  S* seen_keys_;                      // [block_kv][dim]
  bool skips_hidden_ = false;         // what a row does not see is not even multiplied by 0
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
