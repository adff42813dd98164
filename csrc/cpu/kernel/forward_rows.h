// What the forward kernels share: the query rows of a task, their running softmax, and their results.
#pragma once

#include "cpu/api.h"
#include "cpu/gemm/pack.h"
#include "cpu/kernel/arena.h"
#include "cpu/kernel/dropout_tile.h"
#include "cpu/kernel/score_tile.h"
#include "cpu/kernel/softmax_tile.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// P: product (arithmetic), S: storage type of q, k, v and out.
template <class P, class S>
class ForwardRows {
 protected:
  using V = typename P::Vec;
  using Real = typename V::Elem;
  using Operand = typename P::Operand;
  static constexpr Real kInfinity = Real(__builtin_inf());

  // dim_padded: operands of a query row, as the product of queries and keys wants them. slots: heads whose
  // rows are kept side by side.
  ForwardRows(const ForwardCall& call, const Plan& plan, std::byte* base, int64_t dim_padded,
              int64_t slots = 1)
      : call_(call),
        p_(call.problem),
        plan_(plan),
        scale_(call.problem.score),
        arena_(base),
        group_(call.problem.group()),
        dim_padded_(dim_padded),
        dim_v_padded_(round_up(call.problem.dim_v, V::kWidth)) {
    q_ = arena_.take<Operand>(slots * plan.block_q * dim_padded_);
    acc_ = arena_.take<Real>(slots * plan.block_q * dim_v_padded_);
    max_ = arena_.take<Real>(slots * plan.block_q);
    sum_ = arena_.take<Real>(slots * plan.block_q);
    scratch_ = arena_.take<Real>(plan.block_kv);
    if (p_.dropout.present()) {
      keep_ = arena_.take<Real>(DropoutRow<typename V::Words>::room(plan.block_kv));
      if (base) dropout_key_ = p_.dropout.key();
    }
    if (p_.cache.pages.present()) {
      gathered_ = arena_.take<S>(plan.block_kv * (p_.dim > p_.dim_v ? p_.dim : p_.dim_v));
    }
  }

  // The rows of a tile of block_q rows; false when there are none, in a sequence shorter than the longest.
  bool select(int64_t unit, int64_t tile) {
    b_ = unit / p_.heads_kv;
    head_kv_ = unit % p_.heads_kv;
    sequence_ = p_.sequence(b_);
    const int64_t rows = sequence_.seq_q * group_;
    row_begin_ = tile * plan_.block_q;
    row_end_ = row_begin_ + plan_.block_q < rows ? row_begin_ + plan_.block_q : rows;
    return row_begin_ < row_end_;
  }
  // Keys that some row of the task sees.
  KeyRange keys_of_task() const {
    return visible_keys(sequence_.band, sequence_.kv_length, row(0).query,
                        row(row_end_ - row_begin_ - 1).query + 1);
  }

  // Goes `slots` heads on, with their rows.
  void move(int64_t slots) {
    head_kv_ += slots;
    q_ += slots * plan_.block_q * dim_padded_;
    acc_ += slots * plan_.block_q * dim_v_padded_;
    max_ += slots * plan_.block_q;
    sum_ += slots * plan_.block_q;
  }
  // Row i of the task.
  RowRef row(int64_t i) const { return row_ref(row_begin_ + i, head_kv_, group_); }
  SourceRows<S> rows_of(const View4& x, int64_t head, int64_t row) const {
    return {static_cast<const S*>(x.data) + x.offset(b_, head, row), x.stride[2], x.stride[3]};
  }
  SourceRows<S> key_row(const View4& x, int64_t key) const {
    return {static_cast<const S*>(x.data) + p_.key_offset(x, sequence_, head_kv_, key), x.stride[2],
            x.stride[3]};
  }
  static void copy_row(const SourceRows<S>& from, int64_t columns, S* to) {
    constexpr int64_t kLine = int64_t(64 / sizeof(S));
    int64_t c = 0;
    if (from.column == 1) {
      for (; c + kLine <= columns; c += kLine) __builtin_memcpy(to + c, from.data + c, 64);
    }
    for (; c < columns; ++c) to[c] = from.data[c * from.column];
  }
  // n > 0 keys or values from `key` on, where they lie; those of several pages in one place, until the next
  // call.
  SourceRows<S> keys_of(const View4& x, int64_t key, int64_t n, int64_t columns) const {
    const int64_t page = p_.cache.pages.page_size, row = sequence_.first_key + key;
    if (!p_.cache.pages.present() || row / page == (row + n - 1) / page) return key_row(x, key);
    for (int64_t done = 0; done < n;) {
      const int64_t left = page - (row + done) % page, count = left < n - done ? left : n - done;
      SourceRows<S> from = key_row(x, key + done);
      if (done + kRowsAhead < n) {
        const SourceRows<S> ahead = key_row(x, key + done + kRowsAhead);
        for (int64_t i = 0; i < count; ++i) fetch_row(ahead, i, columns);
      }
      for (int64_t i = 0; i < count; ++i, from = from.from_row(1)) {
        copy_row(from, columns, gathered_ + (done + i) * columns);
      }
      done += count;
    }
    return {gathered_, columns, 1};
  }

  // with_sinks: a sink is there before any key, and has no value.
  void load_queries(bool with_sinks) {
    const int64_t n = row_end_ - row_begin_, packed = round_up(p_.dim, P::kDepth);
    for (int64_t i = 0; i < n; ++i) {
      const RowRef ref = row_ref(row_begin_ + i, head_kv_, group_);
      Operand* const q = q_ + i * dim_padded_;
      pack_operand<P>(rows_of(p_.q, ref.head, sequence_.first_query + ref.query), 1, p_.dim, q);
      for (int64_t c = packed; c < dim_padded_; ++c) q[c] = Operand{};
      const bool sunk = with_sinks && p_.score.sinks.present();
      const Real sink = sunk ? Real(p_.score.sinks.at(b_, ref.head)) : -kInfinity;
      max_[i] = sink / scale_.natural;
      sum_[i] = sink == -kInfinity ? Real(0) : Real(1);
    }
    for (int64_t i = 0; i < n * dim_v_padded_; ++i) acc_[i] = 0;
  }

  // What dropout keeps of a row's keys, to keep_.
  void draw(const RowRef& row, int64_t k_begin, int64_t columns) const {
    DropoutRow<typename V::Words>(p_.dropout, dropout_key_)
        .factors(b_, row.head, row.query, k_begin, columns, keep_);
  }

  // softmax_row() of row i of the task, against keys from k_begin on. The sum is of all
  // probabilities; what dropout keeps is scaled with it, at the end.
  Real softmax(int64_t i, const RowRef& ref, int64_t k_begin, int64_t columns, const Real* s, Operand* p) {
    if (!keep_) return softmax_row<P>(s, columns, scale_.exponent_scale, max_ + i, sum_ + i, p);
    draw(ref, k_begin, columns);
    return softmax_row<P, true>(s, columns, scale_.exponent_scale, max_ + i, sum_ + i, p, keep_);
  }

  // x / divisor by its reciprocal and one correction, which rounds as a division does but for rare last
  // bits: one division a row, and not one a vector.
  struct Quotient {
    typename V::Reg reciprocal, negative;
    FAE_INLINE explicit Quotient(Real divisor)
        : reciprocal(V::set1(Real(1) / divisor)), negative(V::set1(-divisor)) {}
    FAE_INLINE typename V::Reg operator()(typename V::Reg x) const {
      const typename V::Reg near = V::mul(x, reciprocal);
      const typename V::Reg exact = V::fma(V::fma(near, negative, x), reciprocal, near);
      return V::select(V::equal(exact, exact), exact, near);  // an infinity has no correction
    }
  };

  void store_rows() {
    for (int64_t r = row_begin_; r < row_end_; ++r) {
      const int64_t i = r - row_begin_;
      const RowRef ref = row_ref(r, head_kv_, group_);
      const int64_t query = sequence_.first_query + ref.query;
      S* out = static_cast<S*>(call_.out.data) + call_.out.offset(b_, ref.head, query);
      // A row that saw nothing has acc = 0; dividing by 1 keeps it.
      const Real total = sum_[i] == 0 ? Real(1) : sum_[i];
      const Quotient divided_by_sum(keep_ ? total / Real(p_.dropout.keep_scale) : total);
      for (int64_t c = 0; c < p_.dim_v; c += V::kWidth) {
        const int lanes = int(p_.dim_v - c < V::kWidth ? p_.dim_v - c : V::kWidth);
        store_row<V>(out + c * call_.out.stride[3], call_.out.stride[3],
                     divided_by_sum(V::load(acc_ + i * dim_v_padded_ + c)), lanes);
      }
      if (call_.lse.present()) {
        using Lse = typename LseType<S>::Type;
        Lse lse =
            sum_[i] == 0 ? Lse(-__builtin_inf()) : Lse(max_[i]) * Lse(scale_.natural) + log_of(Lse(sum_[i]));
        // A sink alone is the log-sum-exp, to the bit.
        if (p_.score.sinks.present()) {
          const Lse sink = Lse(p_.score.sinks.at(b_, ref.head));
          if (sum_[i] == 1 && max_[i] == Real(sink) / scale_.natural) lse = sink;
        }
        static_cast<Lse*>(call_.lse.data)[call_.lse.index(b_, ref.head, query)] = lse;
      }
    }
  }

  const ForwardCall& call_;
  const Problem& p_;
  const Plan& plan_;
  const ScoreScale<Real> scale_;
  Arena arena_;
  const int64_t group_, dim_padded_, dim_v_padded_;

  // One task's state.
  int64_t b_ = 0, head_kv_ = 0, row_begin_ = 0, row_end_ = 0;
  Sequence sequence_;
  Operand* q_;            // [block_q][dim_padded]
  Real* acc_;             // [block_q][dim_v_padded], unnormalised output
  Real* max_;             // [block_q]
  Real* sum_;             // [block_q]
  Real* scratch_;         // [block_kv]
  Real* keep_ = nullptr;  // [block_kv] factors of dropout, with dropout
  PhiloxKey dropout_key_{};
  S* gathered_ = nullptr;  // [block_kv][dim or dim_v], with pages
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
