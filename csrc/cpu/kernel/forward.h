// Forward attention: out = softmax(scores) V, one task = some packed query rows of one
// K/V head against all keys they see (FlashAttention-2's loop order).
#pragma once

#include "cpu/gemm/micro.h"
#include "cpu/kernel/forward_rows.h"
#include "cpu/kernel/special_rows.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, class S>
class Forward : private ForwardRows<P, S> {
  using Base = ForwardRows<P, S>;
  using typename Base::Operand;
  using typename Base::Real;
  using typename Base::V;
  using Base::arena_, Base::p_, Base::plan_, Base::scale_, Base::group_, Base::dim_padded_,
      Base::dim_v_padded_;
  using Base::b_, Base::head_kv_, Base::row_begin_, Base::row_end_, Base::sequence_;
  using Base::q_, Base::acc_, Base::max_, Base::sum_, Base::scratch_, Base::keep_;
  static constexpr int kRows = P::kTileRows;
  static constexpr int64_t kStep = kPanel<P> * P::kPair;

 public:
  // Lays out one worker's memory; with a null base it only measures.
  Forward(const ForwardCall& call, const Plan& plan, std::byte* base)
      : Base(call, plan, base, round_up(call.problem.dim, P::kDepth)) {
    k_ = arena_.template take<Operand>(panel_operands<P>(plan.block_kv, p_.dim));
    v_ = arena_.template take<Operand>(panel_operands<P>(p_.dim_v, plan.block_kv));
    scores_ = arena_.template take<Real>(kRows * plan.block_kv);
    if (P::kPair > 1) probabilities_ = arena_.template take<Operand>(kRows * plan.block_kv);
    special_ = arena_.template take<int64_t>(plan.block_kv);
  }
  size_t bytes() const { return arena_.used(); }

  void run(int64_t task) {
    // Bottom rows see the most keys under a causal mask, so they go first.
    const int64_t units = p_.batch * p_.heads_kv;
    if (!this->select(task % units, plan_.tasks / units - 1 - task / units)) return;
    this->load_queries(true);
    const KeyRange keys = this->keys_of_task();
    // Blocks start at multiples of block_kv whatever the rows are: a row's result does
    // not depend on which rows share its task.
    for (int64_t k = keys.begin / plan_.block_kv * plan_.block_kv; k < keys.end; k += plan_.block_kv) {
      attend_block(k, k + plan_.block_kv < keys.end ? k + plan_.block_kv : keys.end);
    }
    this->store_rows();
  }

 private:
  void attend_block(int64_t k_begin, int64_t k_end) {
    bool packed = false;
    for (int64_t r = row_begin_; r < row_end_; r += kRows) {
      const int rows = int(row_end_ - r < kRows ? row_end_ - r : kRows);
      RowRef refs[kRows];
      for (int i = 0; i < rows; ++i) refs[i] = row_ref(r + i, head_kv_, group_);
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
    pack_transposed<P>(this->keys_of(p_.k, k_begin, n, p_.dim), n, p_.dim, k_);
    const SourceRows<S> values = this->keys_of(p_.v, k_begin, n, p_.dim_v);
    special_count_ = 0;
    if (!pack_rows<P>(values, n, p_.dim_v, v_)) {
      special_count_ = find_special_rows(values, n, p_.dim_v, special_);
      for (int64_t i = 0; i < special_count_; ++i) clear_packed_row<P>(v_, n, p_.dim_v, special_[i]);
    }
  }

  // Rows [row, row + rows) of the task against the keys that `mask` leaves of the block at k_begin.
  void attend_tile(int64_t row, const RowRef* refs, int rows, int64_t k_begin, const TileMask& mask) {
    // Whole panels from the first that anything sees, whole vectors at the end.
    const int64_t first = (mask.begin - k_begin) / kPanel<P> * kPanel<P>;
    const int64_t keys = mask.end - k_begin - first;
    const int64_t columns = round_up(keys, kColumns<P>);
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
      alpha[i] = this->softmax(row + i, refs[i], tile.k_begin, columns, scores_ + i * plan_.block_kv,
                               probabilities + i * plan_.block_kv);
    }

    const int64_t steps = depth_steps<P>(keys), block_steps = depth_steps<P>(block_keys_);
    for (int64_t c = 0; c < dim_v_padded_; c += kPanel<P>) {
      const int vecs = int((dim_v_padded_ - c < kPanel<P> ? dim_v_padded_ - c : kPanel<P>) / V::kWidth);
      multiply_tile<P, Update::kScaleAdd>(rows, vecs,
                                          {steps, probabilities, plan_.block_kv, P::kPair,
                                           v_ + (c / kPanel<P> * block_steps + first / P::kPair) * kStep,
                                           kStep, acc_ + row * dim_v_padded_ + c, dim_v_padded_, alpha});
    }
    if (special_count_) add_special_values(row, rows, refs, probabilities, k_begin, first, keys);
  }

  void add_special_values(int64_t row, int rows, const RowRef* refs, const Operand* probabilities,
                          int64_t k_begin, int64_t first, int64_t keys) {
    for (int64_t i = 0; i < special_count_; ++i) {
      const int64_t key = k_begin + special_[i], j = special_[i] - first;
      if (j < 0 || j >= keys) continue;
      const SourceRows<S> value = this->key_row(p_.v, key);
      for (int r = 0; r < rows; ++r) {
        if (!is_visible(p_, sequence_, b_, refs[r].head, refs[r].query, key)) continue;
        add_special_row(Real(to_float(probabilities[r * plan_.block_kv + j])), value.data, value.column,
                        p_.dim_v, acc_ + (row + r) * dim_v_padded_);
      }
    }
  }

  // One K/V block.
  int64_t block_keys_ = 0;
  Operand* k_;        // panels of block_kv columns, depth dim
  Operand* v_;        // panels of dim_v columns, depth block_kv
  int64_t* special_;  // [block_kv] keys whose value row is not finite
  int64_t special_count_ = 0;
  // One register tile.
  Real* scores_;                      // [kRows][block_kv]
  Operand* probabilities_ = nullptr;  // [kRows][block_kv] where operands are narrower than scores
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
