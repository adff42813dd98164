// Forward attention: out = softmax(scores) V, one task = some packed query rows of one
// K/V head against all keys they see (FlashAttention-2's loop order).
#pragma once

#include "cpu/api.h"
#include "cpu/gemm/micro.h"
#include "cpu/gemm/pack.h"
#include "cpu/kernel/arena.h"
#include "cpu/kernel/dropout_tile.h"
#include "cpu/kernel/score_tile.h"
#include "cpu/kernel/softmax_tile.h"
#include "cpu/kernel/special_rows.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// P: product (arithmetic), S: storage type of q, k, v and out.
template <class P, class S>
class Forward {
  using V = typename P::Vec;
  using Real = typename V::Elem;
  using Operand = typename P::Operand;
  static constexpr int kRows = V::kTileRows;
  static constexpr int64_t kStep = kPanel<P> * P::kPair;
  static constexpr Real kInfinity = Real(__builtin_inf());

 public:
  // Lays out one worker's memory; with a null base it only measures.
  Forward(const ForwardCall& call, const Plan& plan, std::byte* base)
      : call_(call), p_(call.problem), plan_(plan), scale_(call.problem.score), arena_(base) {
    dim_padded_ = round_up(p_.dim, P::kPair);
    dim_v_padded_ = round_up(p_.dim_v, V::kWidth);
    q_ = arena_.take<Operand>(plan.block_q * dim_padded_);
    acc_ = arena_.take<Real>(plan.block_q * dim_v_padded_);
    max_ = arena_.take<Real>(plan.block_q);
    sum_ = arena_.take<Real>(plan.block_q);
    k_ = arena_.take<Operand>(panel_operands<P>(plan.block_kv, p_.dim));
    v_ = arena_.take<Operand>(panel_operands<P>(p_.dim_v, plan.block_kv));
    scores_ = arena_.take<Real>(kRows * plan.block_kv);
    if (P::kPair > 1) probabilities_ = arena_.take<Operand>(kRows * plan.block_kv);
    scratch_ = arena_.take<Real>(plan.block_kv);
    special_ = arena_.take<int64_t>(plan.block_kv);
    if (p_.dropout.present()) {
      keep_ = arena_.take<Real>(DropoutRow::room(plan.block_kv));
      if (base) dropout_key_ = p_.dropout.key();
    }
  }
  size_t bytes() const { return arena_.used(); }

  void run(int64_t task) {
    // Bottom rows see the most keys under a causal mask, so they go first.
    const int64_t units = p_.batch * p_.heads_kv;
    const int64_t tile = plan_.tasks / units - 1 - task / units;
    const int64_t unit = task % units;
    b_ = unit / p_.heads_kv;
    head_kv_ = unit % p_.heads_kv;
    sequence_ = p_.sequence(b_);
    const int64_t group = p_.group(), rows = sequence_.seq_q * group;
    row_begin_ = tile * plan_.block_q;
    row_end_ = row_begin_ + plan_.block_q < rows ? row_begin_ + plan_.block_q : rows;
    if (row_begin_ >= row_end_) return;  // of a sequence shorter than the longest

    load_queries();
    const KeyRange keys =
        visible_keys(sequence_.band, sequence_.kv_length, row_begin_ / group, (row_end_ - 1) / group + 1);
    // Blocks start at multiples of block_kv whatever the rows are: a row's result does
    // not depend on which rows share its task.
    for (int64_t k = keys.begin / plan_.block_kv * plan_.block_kv; k < keys.end; k += plan_.block_kv) {
      attend_block(k, k + plan_.block_kv < keys.end ? k + plan_.block_kv : keys.end);
    }
    store_rows();
  }

 private:
  SourceRows<S> rows_of(const View4& x, int64_t head, int64_t row) const {
    return {static_cast<const S*>(x.data) + x.offset(b_, head, row), x.stride[2], x.stride[3]};
  }
  SourceRows<S> keys_of(const View4& x, int64_t key) const {
    return rows_of(x, head_kv_, sequence_.first_key + key);
  }

  void load_queries() {
    for (int64_t r = row_begin_; r < row_end_; ++r) {
      const RowRef ref = row_ref(r, head_kv_, p_.group());
      const int64_t i = r - row_begin_;
      pack_operand<P>(rows_of(p_.q, ref.head, sequence_.first_query + ref.query), 1, p_.dim,
                      q_ + i * dim_padded_);
      // A sink is there before any key, and has no value.
      const Real sink = p_.score.sinks.present() ? Real(p_.score.sinks.at(b_, ref.head)) : -kInfinity;
      max_[i] = sink / scale_.natural;
      sum_[i] = sink == -kInfinity ? Real(0) : Real(1);
    }
    const int64_t n = row_end_ - row_begin_;
    for (int64_t i = 0; i < n * dim_v_padded_; ++i) acc_[i] = 0;
  }

  void attend_block(int64_t k_begin, int64_t k_end) {
    bool packed = false;
    for (int64_t r = row_begin_; r < row_end_; r += kRows) {
      const int rows = int(row_end_ - r < kRows ? row_end_ - r : kRows);
      RowRef refs[kRows];
      for (int i = 0; i < rows; ++i) refs[i] = row_ref(r + i, head_kv_, p_.group());
      const int64_t q_begin = refs[0].query, q_end = refs[rows - 1].query + 1;
      const KeyRange seen = visible_keys(sequence_.band, sequence_.kv_length, q_begin, q_end);
      const int64_t begin = seen.begin > k_begin ? seen.begin : k_begin;
      const int64_t end = seen.end < k_end ? seen.end : k_end;
      if (begin >= end) continue;
      TileMask mask{begin, end};
      if (p_.has_mask()) mask = classify_masks(p_, b_, refs, rows, begin, end);
      if (mask.skip()) continue;
      if (!packed) {
        load_keys(k_begin, k_end);
        packed = true;
      }
      attend_tile(r - row_begin_, refs, rows, k_begin, mask);
    }
  }

  void load_keys(int64_t k_begin, int64_t k_end) {
    const int64_t n = k_end - k_begin;
    block_keys_ = n;
    pack_transposed<P>(keys_of(p_.k, k_begin), n, p_.dim, k_);
    const bool finite = pack_rows<P>(keys_of(p_.v, k_begin), n, p_.dim_v, v_);
    special_count_ = 0;
    if (!finite) {
      special_count_ = find_special_rows(keys_of(p_.v, k_begin), n, p_.dim_v, special_);
      for (int64_t i = 0; i < special_count_; ++i) clear_packed_row<P>(v_, n, p_.dim_v, special_[i]);
    }
  }

  // Rows [row, row + rows) of the task against the keys that `mask` leaves of the block at k_begin.
  void attend_tile(int64_t row, const RowRef* refs, int rows, int64_t k_begin, const TileMask& mask) {
    // Whole panels from the first that anything sees, whole vectors at the end.
    const int64_t first = (mask.begin - k_begin) / kPanel<P> * kPanel<P>;
    const int64_t keys = mask.end - k_begin - first;
    const int64_t columns = round_up(keys, V::kWidth);
    const int64_t depth = dim_padded_ / P::kPair;
    for (int64_t c = 0; c < columns; c += kPanel<P>) {
      const int vecs = int((columns - c < kPanel<P> ? columns - c : kPanel<P>) / V::kWidth);
      multiply_tile<P, Update::kStore>(
          rows, vecs,
          {depth, q_ + row * dim_padded_, dim_padded_, P::kPair, k_ + (first + c) / kPanel<P> * depth * kStep,
           kStep, scores_ + c, plan_.block_kv, nullptr});
    }

    const ScoreTile<V> tile{scores_, plan_.block_kv, k_begin + first, keys, columns, b_, refs, rows};
    const bool partial = classify(sequence_.band, sequence_.kv_length, refs[0].query,
                                  refs[rows - 1].query + 1, tile.k_begin, mask.end) != TileClass::kFull;
    finish_scores<V>(p_, sequence_, partial, mask, tile, scratch_);

    Real alpha[kRows];
    Operand* probabilities;
    if constexpr (P::kPair > 1) probabilities = probabilities_;
    else probabilities = scores_;
    for (int i = 0; i < rows; ++i) {
      alpha[i] = softmax_row<P>(scores_ + i * plan_.block_kv, columns, scale_.exponent_scale, max_ + row + i,
                                sum_ + row + i, probabilities + i * plan_.block_kv);
      if (keep_) drop(refs[i], tile.k_begin, keys, probabilities + i * plan_.block_kv);
    }

    const int64_t steps = round_up(keys, P::kPair) / P::kPair;
    const int64_t block_steps = round_up(block_keys_, P::kPair) / P::kPair;
    for (int64_t c = 0; c < dim_v_padded_; c += kPanel<P>) {
      const int vecs = int((dim_v_padded_ - c < kPanel<P> ? dim_v_padded_ - c : kPanel<P>) / V::kWidth);
      multiply_tile<P, Update::kScaleAdd>(rows, vecs,
                                          {steps, probabilities, plan_.block_kv, P::kPair,
                                           v_ + (c / kPanel<P> * block_steps + first / P::kPair) * kStep,
                                           kStep, acc_ + row * dim_v_padded_ + c, dim_v_padded_, alpha});
    }
    if (special_count_) add_special_values(row, rows, refs, probabilities, k_begin, first, keys);
  }

  // The sum of probabilities is taken before; what is kept is scaled with it.
  void drop(const RowRef& ref, int64_t k_begin, int64_t keys, Operand* probabilities) {
    DropoutRow(p_.dropout, dropout_key_).factors(b_, ref.head, ref.query, k_begin, keys, keep_);
    for (int64_t j = 0; j < keys; ++j) probabilities[j] = keep_[j] != 0 ? probabilities[j] : Operand{};
  }

  void add_special_values(int64_t row, int rows, const RowRef* refs, const Operand* probabilities,
                          int64_t k_begin, int64_t first, int64_t keys) {
    for (int64_t i = 0; i < special_count_; ++i) {
      const int64_t key = k_begin + special_[i], j = special_[i] - first;
      if (j < 0 || j >= keys) continue;
      const SourceRows<S> value = keys_of(p_.v, key);
      for (int r = 0; r < rows; ++r) {
        if (!is_visible(p_, sequence_, b_, refs[r].head, refs[r].query, key)) continue;
        add_special_row(Real(to_float(probabilities[r * plan_.block_kv + j])), value.data, value.column,
                        p_.dim_v, acc_ + (row + r) * dim_v_padded_);
      }
    }
  }

  void store_rows() {
    for (int64_t r = row_begin_; r < row_end_; ++r) {
      const int64_t i = r - row_begin_;
      const RowRef ref = row_ref(r, head_kv_, p_.group());
      const int64_t query = sequence_.first_query + ref.query;
      S* out = static_cast<S*>(call_.out.data) + call_.out.offset(b_, ref.head, query);
      // A row that saw nothing has acc = 0; dividing by 1 keeps it.
      const Real total = sum_[i] == 0 ? Real(1) : sum_[i];
      const typename V::Reg sum = V::set1(keep_ ? total / Real(p_.dropout.keep_scale) : total);
      for (int64_t c = 0; c < p_.dim_v; c += V::kWidth) {
        const int lanes = int(p_.dim_v - c < V::kWidth ? p_.dim_v - c : V::kWidth);
        store_row<V>(out + c * call_.out.stride[3], call_.out.stride[3],
                     V::div(V::load(acc_ + i * dim_v_padded_ + c), sum), lanes);
      }
      if (call_.lse.present()) {
        using Lse = typename LseType<S>::Type;
        static_cast<Lse*>(call_.lse.data)[call_.lse.index(b_, ref.head, query)] =
            sum_[i] == 0 ? Lse(-__builtin_inf()) : Lse(max_[i]) * Lse(scale_.natural) + log_of(Lse(sum_[i]));
      }
    }
  }

  const ForwardCall& call_;
  const Problem& p_;
  const Plan& plan_;
  const ScoreScale<Real> scale_;
  Arena arena_;
  int64_t dim_padded_, dim_v_padded_;

  // One task's state.
  int64_t b_ = 0, head_kv_ = 0, row_begin_ = 0, row_end_ = 0;
  Sequence sequence_;
  Operand* q_;  // [block_q][dim_padded]
  Real* acc_;   // [block_q][dim_v_padded], unnormalised output
  Real* max_;   // [block_q]
  Real* sum_;   // [block_q]
  // One K/V block.
  int64_t block_keys_ = 0;
  Operand* k_;        // panels of block_kv columns, depth dim
  Operand* v_;        // panels of dim_v columns, depth block_kv
  int64_t* special_;  // [block_kv] keys whose value row is not finite
  int64_t special_count_ = 0;
  // One register tile.
  Real* scores_;                      // [kRows][block_kv]
  Operand* probabilities_ = nullptr;  // [kRows][block_kv] where operands are narrower than scores
  Real* scratch_;                     // [block_kv]
  Real* keep_ = nullptr;              // [block_kv] factors of dropout, with dropout
  PhiloxKey dropout_key_{};
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
