// Recomputed probabilities P and score gradients dS of one register tile; what the
// backward pass and the bias gradient have in common.
//
//   P = exp(score - lse),  dP = dO V^T,  dS = P * (dP - delta + dlse),
//   delta = rowsum(dO * O)                  (FlashAttention-2, section 3.1)
#pragma once

#include "cpu/api.h"
#include "cpu/gemm/micro.h"
#include "cpu/gemm/pack.h"
#include "cpu/kernel/arena.h"
#include "cpu/kernel/direct.h"
#include "cpu/kernel/dropout_tile.h"
#include "cpu/kernel/score_tile.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// P of score values, 0 for hidden ones (-inf) whatever lse is.
template <class P>
FAE_INLINE typename P::Vec::Reg probability_of(typename P::Vec::Reg score, typename P::Vec::Elem natural,
                                               typename P::Vec::Elem lse, typename P::Vec::Elem lse_low) {
  using V = typename P::Vec;
  using Real = typename V::Elem;
  const typename V::Reg above = V::fma(score, V::set1(natural), V::set1(-lse));
  const typename V::Reg p =
      P::exp2(V::mul(V::sub(above, V::set1(lse_low)), V::set1(Real(1.4426950408889634))));
  return V::select(V::equal(score, V::set1(Real(-__builtin_inf()))), V::zero(), p);
}

// What the gradients of one row need to know of it.
template <class V>
struct RowTerms {
  using Real = typename V::Elem;
  Real lse, lse_low, delta, dlse;
  const Real* slope;               // of the softcap, or none
  const Real* keep;                // factors of dropout, or none
  const KeyDistance<V>* distance;  // from `query`, where slopes of ALiBi want a gradient
  int64_t query;
};

// In: score values and dP of one row. Out: P and dS, in place; hidden scores (-inf) give
// exactly 0 for both, whatever dP and the terms are. P comes out with what dropout takes set
// to 0, and not scaled. Returns sum(dS * distance), dS before the softcap's slope.
template <class P>
FAE_INLINE typename P::Vec::Elem score_gradient_row(typename P::Vec::Elem* s, typename P::Vec::Elem* dp,
                                                    int64_t columns, typename P::Vec::Elem natural,
                                                    const RowTerms<typename P::Vec>& row) {
  using V = typename P::Vec;
  using Real = typename V::Elem;
  using Reg = typename V::Reg;
  const Reg delta_lanes = V::set1(row.delta), dlse_lanes = V::set1(row.dlse);
  const Reg hidden = V::set1(Real(-__builtin_inf()));
  Reg weighted = V::zero();
  for (int64_t j = 0; j < columns; j += V::kWidth) {
    const Reg score = V::load(s + j);
    const Reg p = probability_of<P>(score, natural, row.lse, row.lse_low);
    Reg dp_lanes = V::load(dp + j), kept = p;
    if (row.keep) {
      const Reg factor = V::load(row.keep + j);
      dp_lanes = V::mul(dp_lanes, factor);
      kept = V::select(V::equal(factor, V::zero()), V::zero(), p);
    }
    Reg ds = V::mul(p, V::add(V::sub(dp_lanes, delta_lanes), dlse_lanes));
    ds = V::select(V::equal(score, hidden), V::zero(), ds);
    if (row.distance) weighted = V::fma(ds, row.distance->at(row.query, j), weighted);
    if (row.slope) {
      ds = V::select(V::equal(score, hidden), V::zero(), V::mul(ds, V::load(row.slope + j)));
    }
    V::store(s + j, kept);
    V::store(dp + j, ds);
  }
  return row.distance ? V::reduce_add(weighted) : Real(0);
}

template <class P, class S>
class ScoreGrad {
 protected:
  using V = typename P::Vec;
  using Real = typename V::Elem;
  using Operand = typename P::Operand;
  using Lse = typename LseType<S>::Type;
  static constexpr int kRows = P::kTileRows;
  static constexpr int64_t kStep = kPanel<P> * P::kPair;
  using Products = Direct<P, S>;

  // The keys of a register tile that its rows may see: columns [first, first + keys) of
  // the block, padded to whole vectors.
  // `narrowed`: they are fewer than band and length alone would leave.
  struct TileRange {
    int64_t first = 0, keys = 0, columns = 0;
    bool narrowed = false;
  };

  // Rows as operands of a product.
  struct RowOperands {
    const Operand* data = nullptr;
    int64_t ld = 0;
    FAE_INLINE RowOperands from(int64_t row) const { return {data + row * ld, ld}; }
  };

  ScoreGrad(const BackwardCall& call, const Plan& plan, std::byte* base)
      : call_(call), p_(call.problem), plan_(plan), scale_(call.problem.score), arena_(base) {
    const int64_t step = plan.direct ? Products::kChunk : int64_t(P::kDepth);
    dim_operand_ = round_up(p_.dim, step);
    dim_v_operand_ = round_up(p_.dim_v, step);
    if (plan.direct) {
      arranged_ =
          arena_.take<Operand>(kRows * (dim_operand_ > dim_v_operand_ ? dim_operand_ : dim_v_operand_));
      tile_out_ = arena_.take<S>(kRows * p_.dim_v);
    } else {
      k_columns_ = arena_.take<Operand>(panel_operands<P>(plan.block_kv, p_.dim));
      v_columns_ = arena_.take<Operand>(panel_operands<P>(plan.block_kv, p_.dim_v));
      tile_columns_ = arena_.take<Operand>(panel_operands<P>(kRows, p_.dim_v));
    }
    q_ = arena_.take<Operand>(plan.block_q * dim_operand_);
    dout_ = arena_.take<Operand>(plan.block_q * dim_v_operand_);
    lse_ = arena_.take<Real>(plan.block_q);
    lse_low_ = arena_.take<Real>(plan.block_q);
    delta_ = arena_.take<Real>(plan.block_q);
    dlse_ = arena_.take<Real>(plan.block_q);
    tile_rows_ = arena_.take<Operand>(kRows * dim_v_operand_);
    scratch_ = arena_.take<Real>(plan.block_kv);
    if (p_.score.softcap > 0) slope_ = arena_.take<Real>(kRows * plan.block_kv);
    if (p_.dropout.present()) {
      keep_ = arena_.take<Real>(DropoutRow<typename V::Words>::room(plan.block_kv));
      if (base) dropout_key_ = p_.dropout.key();
    }
  }

  // The rows to come are those of `group` query heads from head_begin, a multiple of it, on, packed.
  void set_heads(int64_t b, int64_t head_kv, int64_t head_begin, int64_t group) {
    b_ = b;
    head_kv_ = head_kv;
    first_ = head_begin / group;
    group_ = group;
    sequence_ = p_.sequence(b);
  }
  // Packed rows of this sequence and these heads.
  int64_t row_count() const { return sequence_.seq_q * group_; }
  RowRef ref(int64_t row) const { return row_ref(row, first_, group_); }
  // Where lse, dlse and the like hold a packed row.
  template <class Void>
  int64_t flat_index(const RowValues<Void>& values, int64_t row) const {
    const RowRef at = ref(row);
    return values.index(b_, at.head, sequence_.first_query + at.query);
  }
  template <class T, class Void>
  T value_of(const RowValues<Void>& values, int64_t row) const {
    return static_cast<const T*>(values.data)[flat_index(values, row)];
  }
  SourceRows<S> query_of(const View4& x, int64_t row) const {
    const RowRef at = ref(row);
    return rows_of(x, at.head, sequence_.first_query + at.query);
  }
  SourceRows<S> keys_of(const View4& x, int64_t key) const {
    return rows_of(x, head_kv_, sequence_.first_key + key);
  }

  void load_keys(int64_t k_begin, int64_t k_end) {
    k_begin_ = k_begin;
    k_end_ = k_end;
    if (plan_.direct) return;
    pack_transposed<P>(keys_of(p_.k, k_begin), k_end - k_begin, p_.dim, k_columns_);
    pack_transposed<P>(keys_of(p_.v, k_begin), k_end - k_begin, p_.dim_v, v_columns_);
  }

  // Packed rows [begin, end): queries, output gradients, lse, dlse, and delta: as computed
  // before, or computed here when `delta` is null.
  void load_rows(int64_t begin, int64_t end, const Real* delta) {
    row_begin_ = begin;
    if (!delta) compute_delta(begin, end, delta_);
    queries_ = operands(p_.q, begin, end, p_.dim, dim_operand_, q_);
    douts_ = operands(call_.dout, begin, end, p_.dim_v, dim_v_operand_, dout_);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t r = row - begin;
      const Lse lse = value_of<Lse>(call_.lse, row);
      // A row without keys: exp(-inf - inf) is 0, exp(-inf + inf) would not be.
      lse_[r] = lse == Lse(-__builtin_inf()) ? Real(__builtin_inf()) : Real(lse);
      lse_low_[r] = __builtin_isfinite(lse) ? Real(lse - Lse(lse_[r])) : Real(0);
      if (call_.lse_low.present()) lse_low_[r] += Real(value_of<Lse>(call_.lse_low, row));
      if (delta) delta_[r] = delta[r];
      dlse_[r] = call_.dlse.present() ? Real(value_of<Lse>(call_.dlse, row)) : Real(0);
    }
  }

  // Fetches early, into the second level of the cache, what load_rows is to read of these rows.
  void fetch_rows(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      fetch_line_by_line(query_of(p_.q, row), p_.dim);
      fetch_line_by_line(query_of(call_.dout, row), p_.dim_v);
    }
  }

  // delta of packed rows [begin, end), by the very product that makes dP: a row that sees
  // one key has O = V, and dP - delta is then exactly 0 and not a rounding error.
  void compute_delta(int64_t begin, int64_t end, Real* delta) {
    for (int64_t row = begin; row < end; row += kRows, delta += kRows) {
      const int rows = int(end - row < kRows ? end - row : kRows);
      Real products[kRows * kDeltaColumns];  // of every dO with every O
      if (plan_.direct) multiply_outputs_as_they_lie(row, rows, products);
      else multiply_outputs(row, rows, products);
      for (int i = 0; i < rows; ++i) delta[i] = products[i * kDeltaColumns + i];
    }
  }

  // Scores into s [rows][ld] for the tile of rows [row, row + rows) of the loaded ones against
  // the loaded keys; false when no key is seen. Columns outside `range` are not written.
  bool compute_scores(int64_t row, int rows, Real* s, int64_t ld, Real* slope, TileRange* range) {
    RowRef refs[kRows];
    for (int i = 0; i < rows; ++i) refs[i] = ref(row_begin_ + row + i);
    const int64_t q_begin = refs[0].query, q_end = refs[rows - 1].query + 1;
    const KeyRange seen = visible_keys(sequence_.band, sequence_.kv_length, q_begin, q_end);
    TileMask mask{seen.begin > k_begin_ ? seen.begin : k_begin_, seen.end < k_end_ ? seen.end : k_end_};
    if (p_.has_mask() && !mask.skip()) mask = classify_masks(p_, b_, refs, rows, mask.begin, mask.end);
    if (mask.skip()) return false;
    const int64_t first = (mask.begin - k_begin_) / kPanel<P> * kPanel<P>;
    const int64_t keys = mask.end - k_begin_ - first;
    const int64_t columns = round_up(keys, kColumns<P>);
    *range = {first, keys, columns, mask.narrowed};
    fetch_bias(p_.score, b_, refs, rows, k_begin_ + first, keys);
    // By the very product of the forward pass: P adds up to 1 although both are rounded.
    if (plan_.direct) multiply_as_they_lie(queries_.from(row), p_.k, p_.dim, rows, *range, s, ld);
    else multiply_columns(queries_.from(row), dim_operand_, k_columns_, rows, *range, s, ld);
    const bool partial = classify(sequence_.band, sequence_.kv_length, q_begin, q_end, k_begin_ + first,
                                  mask.end) != TileClass::kFull;
    const ScoreTile<V> tile{s + first, ld, k_begin_ + first, keys, columns, b_, refs, rows};
    finish_scores<V>(p_, sequence_, partial, mask, tile, scratch_, slope, plan_.block_kv);
    return true;
  }

  // P into s and dS into ds, both [rows][ld], of a tile as above. dS is taken before the
  // softcap when `before_softcap`. Adds each row's sum(dS * distance) to `alibi`, if given, [rows].
  bool compute_tile(int64_t row, int rows, Real* s, Real* ds, int64_t ld, bool before_softcap,
                    TileRange* range, Real* alibi = nullptr) {
    Real* slope = before_softcap ? slope_ : nullptr;
    if (!compute_scores(row, rows, s, ld, slope, range)) return false;
    if (plan_.direct) multiply_as_they_lie(douts_.from(row), p_.v, p_.dim_v, rows, *range, ds, ld);
    else multiply_columns(douts_.from(row), dim_v_operand_, v_columns_, rows, *range, ds, ld);
    const KeyDistance<V> distance(sequence_, k_begin_ + range->first);
    for (int i = 0; i < rows; ++i) {
      const int64_t r = row + i;
      const RowRef at = ref(row_begin_ + r);
      if (keep_) {
        DropoutRow<typename V::Words>(p_.dropout, dropout_key_)
            .factors(b_, at.head, at.query, k_begin_ + range->first, range->columns, keep_);
      }
      const Real sum = score_gradient_row<P>(
          s + range->first + i * ld, ds + range->first + i * ld, range->columns, scale_.natural,
          {lse_[r], lse_low_[r], delta_[r], dlse_[r], slope ? slope + i * plan_.block_kv : nullptr, keep_,
           alibi ? &distance : nullptr, at.query});
      if (alibi) alibi[i] += sum;
    }
    return true;
  }

  // P of scores of a loaded row.
  typename V::Reg probability(typename V::Reg score, int64_t row) const {
    return probability_of<P>(score, scale_.natural, lse_[row], lse_low_[row]);
  }

  const BackwardCall& call_;
  const Problem& p_;
  const Plan& plan_;
  const ScoreScale<Real> scale_;
  Arena arena_;
  int64_t dim_operand_, dim_v_operand_;

  int64_t b_ = 0, head_kv_ = 0;
  int64_t first_ = 0, group_ = 1;  // the rows' query heads: [first group, (first + 1) group)
  Sequence sequence_;
  int64_t k_begin_ = 0, k_end_ = 0;  // loaded keys
  int64_t row_begin_ = 0;            // first loaded packed row
  Operand* k_columns_ = nullptr;  // panels of block_kv columns, depth dim; none where keys stay as they lie
  Operand* v_columns_ = nullptr;  // panels of block_kv columns, depth dim_v; the same
  RowOperands queries_, douts_;   // loaded rows
  Operand* q_;                    // [block_q][dim], room for them
  Operand* dout_;                 // [block_q][dim_v]
  Real* lse_;                     // [block_q], and what its rounding left over
  Real* lse_low_;                 // [block_q]
  Real* delta_;                   // [block_q]
  Real* dlse_;                    // [block_q]
  Operand* arranged_ = nullptr;   // [kRows] rows for products with keys or values as they lie
  Operand* tile_rows_;            // [kRows][dim_v], for compute_delta
  Operand* tile_columns_ = nullptr;  // panel of kRows columns, depth dim_v, for the same
  S* tile_out_ = nullptr;            // [kRows][dim_v], the same for direct plans
  Real* scratch_;                    // [block_kv]
  Real* slope_ = nullptr;            // [kRows][block_kv], with softcap
  Real* keep_ = nullptr;             // [block_kv] factors of a row, with dropout
  PhiloxKey dropout_key_{};

 private:
  static constexpr int64_t kDeltaColumns = round_up(kRows, kPanel<P>);

  SourceRows<S> rows_of(const View4& x, int64_t head, int64_t row) const {
    return {static_cast<const S*>(x.data) + x.offset(b_, head, row), x.stride[2], x.stride[3]};
  }

  // Packed rows [begin, end) of x, `padded` operands each: as they lie in memory where they are just that
  // and a constant stride apart, else packed into `room`.
  RowOperands operands(const View4& x, int64_t begin, int64_t end, int64_t columns, int64_t padded,
                       Operand* room) const {
    if constexpr (kSameType<S, Operand>) {
      const bool even = group_ == 1 || x.stride[2] == group_ * x.stride[1];
      if (even && x.stride[3] == 1 && columns == padded) {
        return {query_of(x, begin).data, group_ == 1 ? x.stride[2] : x.stride[1]};
      }
    }
    for (int64_t row = begin; row < end; ++row, room += padded)
      pack_padded(query_of(x, row), columns, padded, room);
    return {room - (end - begin) * padded, padded};
  }

  static void fetch_line_by_line(const SourceRows<S>& row, int64_t columns) {
    constexpr int64_t kLine = int64_t(64 / sizeof(S));
    if (row.column != 1) return;
    for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(row.data + c, 0, 2);
  }

  // products[i][j] = dO of row + i times O of row + j, [kRows][kDeltaColumns].
  void multiply_outputs(int64_t row, int rows, Real* products) {
    for (int i = 0; i < rows; ++i)
      pack_operand<P>(query_of(call_.out, row + i), 1, p_.dim_v, tile_rows_ + i * dim_v_operand_);
    pack_transposed<P>(SourceRows<Operand>{tile_rows_, dim_v_operand_, 1}, rows, dim_v_operand_,
                       tile_columns_);
    pack_douts(row, rows);
    multiply_tile<P, Update::kStore>(rows, (rows + V::kWidth - 1) / V::kWidth,
                                     {dim_v_operand_ / P::kPair, tile_rows_, dim_v_operand_, P::kPair,
                                      tile_columns_, kStep, products, kDeltaColumns, 0});
  }
  void multiply_outputs_as_they_lie(int64_t row, int rows, Real* products) {
    for (int i = 0; i < rows; ++i) {
      const SourceRows<S> out = query_of(call_.out, row + i);
      for (int64_t c = 0; c < p_.dim_v; ++c) tile_out_[i * p_.dim_v + c] = out.data[c * out.column];
    }
    pack_douts(row, rows);
    Products::arrange(tile_rows_, dim_v_operand_, rows, p_.dim_v, arranged_);
    Products::score(arranged_, rows, {{tile_out_, p_.dim_v, 1}, 0}, rows, p_.dim_v, products, kDeltaColumns);
  }
  void pack_douts(int64_t row, int rows) {
    for (int i = 0; i < rows; ++i)
      pack_padded(query_of(call_.dout, row + i), p_.dim_v, dim_v_operand_, tile_rows_ + i * dim_v_operand_);
  }
  // One row as an operand, with zeros up to `padded`.
  static void pack_padded(const SourceRows<S>& row, int64_t columns, int64_t padded, Operand* to) {
    pack_operand<P>(row, 1, columns, to);
    for (int64_t c = round_up(columns, P::kDepth); c < padded; ++c) to[c] = Operand{};
  }

  // c[rows][first .. first + keys) = a times loaded rows of x, keys or values, where these lie in memory.
  void multiply_as_they_lie(const RowOperands& a, const View4& x, int64_t columns, int rows,
                            const TileRange& range, Real* c, int64_t ld) {
    const SourceRows<S> from = keys_of(x, k_begin_ + range.first);
    Products::arrange(a.data, a.ld, rows, columns, arranged_);
    Products::score(arranged_, rows, {from, Products::rows_ahead(columns) * from.row}, range.keys, columns,
                    c + range.first, ld);
  }

  // c[rows][first .. first + columns) = a b
  void multiply_columns(const RowOperands& a, int64_t depth, const Operand* b, int rows,
                        const TileRange& range, Real* c, int64_t ld) {
    const int64_t steps = depth / P::kPair;
    for (int64_t j = 0; j < range.columns; j += kPanel<P>) {
      multiply_tile<P, Update::kStore>(
          rows, vectors_in<P>(range.columns - j),
          {steps, a.data, a.ld, P::kPair, b + (range.first + j) / kPanel<P> * steps * kStep, kStep,
           c + range.first + j, ld, 0});
    }
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
