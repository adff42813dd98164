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
  // Whether probabilities take the place of their row's scores, of which narrower ones need a part only.
  static constexpr bool kInPlace = P::kTiles || kSameType<Operand, Real>;
  // Tile registers multiply so fast that storing scores shows: a block's keys are taken in parts whose scores
  // stay in the first level of the cache until they are used.
  static constexpr int64_t kPart = 3 * kPanel<P>;

 public:
  // Lays out one worker's memory; with a null base it only measures.
  Forward(const ForwardCall& call, const Plan& plan, std::byte* base)
      : Base(call, plan, base, round_up(call.problem.dim, P::kDepth)) {
    k_ = arena_.template take<Operand>(panel_operands<P>(plan.block_kv, p_.dim));
    v_ = arena_.template take<Operand>(panel_operands<P>(p_.dim_v, plan.block_kv));
    // Not a power of two, so that rows lie on different sets of the cache.
    score_ld_ = P::kTiles ? kPart + V::kWidth : plan.block_kv;
    scores_ = arena_.template take<Real>(kRows * score_ld_);
    if constexpr (kInPlace) weights_ = reinterpret_cast<Operand*>(scores_);
    else weights_ = arena_.template take<Operand>(kRows * score_ld_);
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
    if constexpr (P::kTiles) {
      for (int64_t k = (mask.begin - k_begin) / kPart * kPart; k_begin + k < mask.end; k += kPart)
        attend_part(row, refs, rows, k_begin, Part(mask, k_begin, k, k + kPart));
    } else {
      attend_part(row, refs, rows, k_begin, Part(mask, k_begin, 0, mask.end - k_begin));
    }
  }

  // Keys [first, first + keys) of a block that some rows of a tile see: whole panels from the first on, whole
  // vectors at the end.
  struct Part {
    TileMask mask;
    int64_t first, keys, columns;
    // Of `mask`, the keys in [begin, end) of the block at k_begin.
    Part(const TileMask& tile, int64_t k_begin, int64_t begin, int64_t end) : mask(tile) {
      if (mask.begin < k_begin + begin) mask.begin = k_begin + begin;
      if (mask.end > k_begin + end) mask.end = k_begin + end;
      first = (mask.begin - k_begin) / kPanel<P> * kPanel<P>;
      keys = mask.end - k_begin - first;
      columns = round_up(keys, kColumns<P>);
    }
  };

  void attend_part(int64_t row, const RowRef* refs, int rows, int64_t k_begin, const Part& part) {
    const int64_t depth = dim_padded_ / P::kPair;
    fetch_bias(p_.score, b_, refs, rows, k_begin + part.first, part.keys);
    for (int64_t c = 0; c < part.columns; c += kPanel<P>) {
      multiply_tile<P, Update::kStore>(
          rows, vectors_in<P>(part.columns - c),
          {depth, q_ + row * dim_padded_, dim_padded_, P::kPair,
           k_ + (part.first + c) / kPanel<P> * depth * kStep, kStep, scores_ + c, score_ld_, 0});
    }

    const ScoreTile<V> tile{scores_, score_ld_, k_begin + part.first, part.keys, part.columns, b_,
                            refs,    rows};
    const bool partial = classify(sequence_.band, sequence_.kv_length, refs[0].query,
                                  refs[rows - 1].query + 1, tile.k_begin, part.mask.end) != TileClass::kFull;
    finish_scores<V>(p_, sequence_, partial, part.mask, tile, scratch_);
    Real alpha[kRows];
    softmax_tile(row, tile, alpha);
    rescale(row, rows, alpha);

    const int64_t block_steps = depth_steps<P>(block_keys_);
    for (int64_t c = 0; c < dim_v_padded_; c += kPanel<P>) {
      multiply_tile<P, Update::kAdd>(
          rows, vectors_in<P>(dim_v_padded_ - c),
          {depth_steps<P>(part.keys), weights_, weight_ld(), P::kPair,
           v_ + (c / kPanel<P> * block_steps + part.first / P::kPair) * kStep, kStep,
           acc_ + row * dim_v_padded_ + c, dim_v_padded_, part.first / P::kPair});
    }
    if (special_count_) add_special_values(part, row, refs, rows, k_begin);
  }
  int64_t weight_ld() const {
    return kInPlace ? score_ld_ * int64_t(sizeof(Real) / sizeof(Operand)) : score_ld_;
  }

  // Scores of rows from `row` of the task on become weights; alpha: [kRows].
  FAE_INLINE void softmax_tile(int64_t row, const ScoreTile<V>& tile, Real* alpha) {
    if constexpr (P::kTiles) {
      for (int first = 0; first < tile.row_count; first += V::kWidth) {
        const int left = tile.row_count - first, rows = left < V::kWidth ? left : V::kWidth;
        SoftmaxRows<P> softmax(tile.s + first * tile.ld, tile.ld, rows, tile.columns, scale_.exponent_scale,
                               max_ + row + first, alpha + first);
        for (int i = 0; i < rows; ++i) {
          Operand* const weights = weights_ + (first + i) * weight_ld();
          if (keep_) {
            this->draw(tile.rows[first + i], tile.k_begin, tile.columns);
            softmax.template exponentiate<true>(i, weights, keep_);
          } else {
            softmax.template exponentiate<false>(i, weights, nullptr);
          }
        }
        softmax.finish(alpha + first, sum_ + row + first);
      }
    } else {
      for (int i = 0; i < tile.row_count; ++i) {
        alpha[i] = this->softmax(row + i, tile.rows[i], tile.k_begin, tile.columns, tile.s + i * tile.ld,
                                 weights_ + i * weight_ld());
      }
    }
  }

  // By itself, for a factor in the products' sums would tie their rounding to where they begin. A maximum
  // seldom moves.
  void rescale(int64_t row, int rows, const Real* alpha) {
    for (int r = 0; r < rows; ++r) {
      if (alpha[r] == 1) continue;
      Real* const acc = acc_ + (row + r) * dim_v_padded_;
      const typename V::Reg factor = V::set1(alpha[r]);
      for (int64_t c = 0; c < dim_v_padded_; c += V::kWidth)
        V::store(acc + c, V::mul(factor, V::load(acc + c)));
    }
  }

  void add_special_values(const Part& part, int64_t row, const RowRef* refs, int rows, int64_t k_begin) {
    for (int64_t i = 0; i < special_count_; ++i) {
      const int64_t key = k_begin + special_[i], j = special_[i] - part.first;
      if (j < 0 || j >= part.keys) continue;
      const SourceRows<S> value = this->key_row(p_.v, key);
      for (int r = 0; r < rows; ++r) {
        if (!is_visible(p_, sequence_, b_, refs[r].head, refs[r].query, key)) continue;
        add_special_row(Real(to_float(weights_[r * weight_ld() + j])), value.data, value.column, p_.dim_v,
                        acc_ + (row + r) * dim_v_padded_);
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
  int64_t score_ld_;
  Real* scores_;      // [kRows][score_ld]
  Operand* weights_;  // probabilities, [kRows][weight_ld()]
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
