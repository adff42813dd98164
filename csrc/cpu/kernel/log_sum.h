// What rounding took from the log-sum-exp of far rows.
//
// P = exp(score - lse) adds up to 1 because lse = max + log(sum). Where the scores of a row lie
// around -1e38 (a bias of finfo.min for every key), lse is too coarse to hold the logarithm, and
// P would add up to the number of keys. Such rows are summed once more, before the gradients.
#pragma once

#include "cpu/kernel/score_grad.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// P: product (arithmetic), S: storage type. One task = block_q packed rows of one K/V head.
template <class P, class S>
class LogSum : private ScoreGrad<P, S> {
  using Base = ScoreGrad<P, S>;
  using typename Base::Lse;
  using typename Base::Real;
  using typename Base::TileRange;
  using typename Base::V;
  using Base::call_, Base::p_, Base::plan_, Base::arena_, Base::kRows, Base::row_begin_, Base::sequence_;
  // Past this, half a unit in lse's last place is more than P may be wrong by.
  static constexpr double kFar = sizeof(S) == 2 ? 2048.0 : sizeof(S) == 4 ? 268435456.0 : 64.0;

 public:
  LogSum(const BackwardCall& call, const Plan& plan, std::byte* base) : Base(call, plan, base) {
    s_ = arena_.template take<Real>(kRows * plan.block_kv);
    sums_ = arena_.template take<double>(plan.block_q);
  }
  size_t bytes() const { return arena_.used(); }

  static bool needed(const BackwardCall& call) {
    bool any = false;
    for (int64_t i = 0; i < call.lse_count; ++i) any |= is_far(static_cast<const Lse*>(call.lse.data)[i]);
    return any;
  }

  static int64_t tasks(const BackwardCall& call, const Plan& plan) {
    const Problem& p = call.problem;
    return p.batch * p.heads_kv * ((p.packed_rows() + plan.block_q - 1) / plan.block_q);
  }

  // Writes log(sum of P) of its rows to call.lse_low: 0 where lse needs no help.
  void run(int64_t task) {
    const int64_t tiles = (p_.packed_rows() + plan_.block_q - 1) / plan_.block_q;
    const int64_t unit = task / tiles, begin = task % tiles * plan_.block_q;
    const int64_t head_kv = unit % p_.heads_kv;
    this->set_heads(unit / p_.heads_kv, head_kv, head_kv * p_.group(), p_.group());
    const int64_t rows = this->row_count();
    const int64_t end = begin + plan_.block_q < rows ? begin + plan_.block_q : rows;
    bool any = false;
    for (int64_t row = begin; row < end; ++row) {
      sums_[row - begin] = 0;
      any |= is_far(lse_of(row));
    }
    if (any) {
      this->load_rows(begin, end, nullptr);
      for (int64_t k = 0; k < sequence_.kv_length; k += plan_.block_kv) add_block(end - begin, k);
    }
    for (int64_t row = begin; row < end; ++row) {
      const Lse lse = lse_of(row);
      double sum = sums_[row - begin];
      if (p_.score.sinks.present()) {
        sum += exp_of(Lse(p_.score.sinks.at(this->b_, this->ref(row).head)) - lse);
      }
      const bool helps = is_far(lse) && sum > 0 && __builtin_isfinite(sum);
      static_cast<Lse*>(call_.lse_low.data)[this->flat_index(call_.lse_low, row)] =
          helps ? log_of(Lse(sum)) : Lse(0);
    }
  }

 private:
  static bool is_far(Lse lse) { return __builtin_isfinite(lse) && __builtin_fabs(double(lse)) > kFar; }
  Lse lse_of(int64_t row) const { return this->template value_of<Lse>(call_.lse, row); }

  void add_block(int64_t row_count, int64_t k) {
    const int64_t k_end = k + plan_.block_kv < sequence_.kv_length ? k + plan_.block_kv : sequence_.kv_length;
    this->load_keys(k, k_end);
    for (int64_t r = 0; r < row_count; r += kRows) {
      const int rows = int(row_count - r < kRows ? row_count - r : kRows);
      TileRange range;
      if (!this->compute_scores(r, rows, s_, plan_.block_kv, nullptr, &range)) continue;
      for (int i = 0; i < rows; ++i) {
        const Real* s = s_ + i * plan_.block_kv + range.first;
        auto total = V::zero();
        for (int64_t j = 0; j < range.columns; j += V::kWidth)
          total = V::add(total, this->probability(V::load(s + j), r + i));
        sums_[r + i] += double(V::reduce_add(total));
      }
    }
  }

  Real* s_;       // [kRows][block_kv]
  double* sums_;  // [block_q]
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
