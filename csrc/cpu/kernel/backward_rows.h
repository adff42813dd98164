// Query gradients of one K/V head, and what else the backward kernels share.
#pragma once

#include "cpu/kernel/score_grad.h"
#include "cpu/kernel/softmax_tile.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, class S>
class BackwardRows : protected ScoreGrad<P, S> {
 protected:
  using Base = ScoreGrad<P, S>;
  using typename Base::Lse;
  using typename Base::Real;
  using typename Base::V;
  using Base::call_, Base::p_, Base::sequence_;

  BackwardRows(const BackwardCall& call, const Plan& plan, std::byte* base)
      : Base(call, plan, base), dim_padded_(round_up(call.problem.dim, V::kWidth)) {}

 public:
  // Elements of one K/V head's dQ sums, [packed_rows][dim] padded, of its rows' delta, and of their terms of
  // the gradient of ALiBi's slopes.
  static int64_t dq_size(const Problem& p) {
    return p.packed_rows() * (round_up(p.dim, V::kWidth) + 1 + (p.score.alibi.present() ? 1 : 0));
  }

 protected:
  static void clear(Real* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0;
  }

  void select_head(int64_t unit) {
    const int64_t head_kv = unit % p_.heads_kv;
    this->set_heads(unit / p_.heads_kv, head_kv, head_kv * p_.group(), p_.group());
  }

  Real* delta() const { return dq_ + p_.packed_rows() * dim_padded_; }
  // Sums of dS * distance, one per packed row.
  Real* alibi_terms() const { return call_.dalibi_rows.present() ? delta() + p_.packed_rows() : nullptr; }

  void begin_queries(int64_t begin, int64_t end) {
    clear(dq_ + begin * dim_padded_, (end - begin) * dim_padded_);
    this->compute_delta(begin, end, delta() + begin);
    if (Real* const terms = alibi_terms()) clear(terms + begin, end - begin);
  }

  // dot products carry no scale, so their gradients get it here, in fp32.
  void store_queries(int64_t begin, int64_t end) {
    const typename V::Reg scale = V::set1(Real(p_.score.scale));
    for (int64_t row = begin; row < end; ++row) {
      const RowRef at = this->ref(row);
      const StoredRow<S> to = gradient_row(call_.dq, at.head, sequence_.first_query + at.query);
      for (int64_t c = 0; c < p_.dim; c += V::kWidth) {
        to.template store<V>(c, p_.dim, V::mul(V::load(dq_ + row * dim_padded_ + c), scale));
      }
      if (alibi_terms()) {
        static_cast<Real*>(call_.dalibi_rows.data)[this->flat_index(call_.dalibi_rows, row)] =
            -alibi_terms()[row];
      }
      if (call_.dsink_rows.present()) {
        static_cast<Real*>(call_.dsink_rows.data)[this->flat_index(call_.dsink_rows, row)] =
            sink_gradient(row, at);
      }
    }
  }

  StoredRow<S> gradient_row(const View4& x, int64_t head, int64_t row) const {
    return {static_cast<S*>(x.data) + x.offset(this->b_, head, row), x.stride[3]};
  }

  const int64_t dim_padded_;
  // [packed_rows][dim_padded], then delta and terms of ALiBi [packed_rows]; who derives from this provides it
  Real* dq_ = nullptr;

 private:
  // d lse / d sink is the sink's probability, and of the output it takes its share of delta.
  Real sink_gradient(int64_t row, const RowRef& at) const {
    const Lse lse = this->template value_of<Lse>(call_.lse, row);
    const Lse sink = Lse(p_.score.sinks.at(this->b_, at.head));
    if (sink == Lse(-__builtin_inf())) return 0;
    // lse is the sink alone for rows without keys, to which nothing has a gradient.
    if (lse == sink && !sees_any(at)) return 0;
    const Real dlse = call_.dlse.present() ? Real(this->template value_of<Lse>(call_.dlse, row)) : Real(0);
    return Real(exp_of(sink - lse)) * (dlse - delta()[row]);
  }
  bool sees_any(const RowRef& at) const {
    const KeyRange keys = visible_keys(sequence_.band, sequence_.kv_length, at.query, at.query + 1);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      if (is_visible(p_, sequence_, this->b_, at.head, at.query, j)) return true;
    }
    return false;
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
