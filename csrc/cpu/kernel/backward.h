// Backward attention: dQ, dK and dV by recomputation (FlashAttention-2's loop order).
//
// One task = some packed query rows ("chunk") of one K/V head against one or all blocks
// of keys. dQ rows belong to one chunk; dK and dV of a block are summed over chunks.
#pragma once

#include "cpu/kernel/score_grad.h"
#include "cpu/kernel/softmax_tile.h"
#include "cpu/kernel/special_rows.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, class S>
class Backward : private ScoreGrad<P, S> {
  using Base = ScoreGrad<P, S>;
  using typename Base::Lse;
  using typename Base::Operand;
  using typename Base::Real;
  using typename Base::TileRange;
  using typename Base::V;
  using Base::call_, Base::p_, Base::plan_, Base::arena_, Base::kRows, Base::kStep;
  using Base::k_begin_, Base::k_end_, Base::row_begin_, Base::sequence_;

 public:
  Backward(const BackwardCall& call, const Plan& plan, std::byte* base) : Base(call, plan, base) {
    dim_padded_ = round_up(p_.dim, V::kWidth);
    dim_v_padded_ = round_up(p_.dim_v, V::kWidth);
    k_rows_ = arena_.template take<Operand>(panel_operands<P>(p_.dim, plan.block_kv));
    q_rows_ = arena_.template take<Operand>(panel_operands<P>(p_.dim, plan.block_q));
    dout_rows_ = arena_.template take<Operand>(panel_operands<P>(p_.dim_v, plan.block_q));
    probabilities_ = arena_.template take<Operand>(plan.block_q * plan.block_kv);
    gradients_ = arena_.template take<Operand>(plan.block_q * plan.block_kv);
    if (P::kPair > 1) {
      tile_s_ = arena_.template take<Real>(kRows * plan.block_kv);
      tile_ds_ = arena_.template take<Real>(kRows * plan.block_kv);
      tile_gradients_ = arena_.template take<Operand>(kRows * plan.block_kv);
    }
    special_ = arena_.template take<int64_t>(plan.block_kv + 2 * plan.block_q);
    dkv_ = arena_.template take<Real>(dkv_size(p_, plan));
    if (plan.chunks == 1) {
      dq_ = arena_.template take<Real>(dq_size(p_));
    }
  }
  size_t bytes() const { return arena_.used(); }

  // Elements of one block's dK and dV sums, [block_kv][dim] then [block_kv][dim_v], padded.
  static int64_t dkv_size(const Problem& p, const Plan& plan) {
    return plan.block_kv * (round_up(p.dim, V::kWidth) + round_up(p.dim_v, V::kWidth));
  }
  // Elements of one K/V head's dQ sums, [packed_rows][dim] padded, of its rows' delta, and of their terms of
  // the gradient of ALiBi's slopes.
  static int64_t dq_size(const Problem& p) {
    return p.packed_rows() * (round_up(p.dim, V::kWidth) + 1 + (p.score.alibi.present() ? 1 : 0));
  }

  // One K/V head, all rows, all keys.
  void run_head(int64_t unit) {
    select(unit, 0, 1);
    begin_queries();
    for (int64_t k = 0; k < sequence_.seq_kv; k += plan_.block_kv) {
      accumulate_block(k);
      store_keys(k, dkv_);
    }
    store_queries();
  }

  // One chunk against the block of keys at k; blocks come last to first. dq: dq_size()
  // elements of this head, living through all of them.
  bool run_chunk(int64_t unit, int64_t chunk, int64_t k, Real* dq) {
    select(unit, chunk, plan_.chunks);
    dq_ = dq;
    // Packed sequences may be shorter than the blocks that there are; the last of all begins.
    if (k + plan_.block_kv >= p_.seq_kv) begin_queries();
    const bool any = accumulate_block(k);
    if (k == 0) store_queries();
    return any;
  }

  // Adds what run_chunk left in this workspace, if anything, to the block's sums; called for
  // chunk 0, 1, ... in turn, the last one writes dK and dV.
  void merge_keys(int64_t unit, int64_t chunk, int64_t k, bool any, Real* sums) {
    const int64_t n = any || chunk == 0 ? dkv_size(p_, plan_) : 0;
    for (int64_t i = 0; i < n; i += V::kWidth) {
      const auto own = V::load(dkv_ + i);
      V::store(sums + i, chunk == 0 ? own : V::add(V::load(sums + i), own));
    }
    if (chunk + 1 < plan_.chunks) return;
    select(unit, 0, 1);
    store_keys(k, sums);
  }

 private:
  static void clear(Real* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0;
  }

  void select(int64_t unit, int64_t chunk, int64_t chunks) {
    const int64_t head_kv = unit % p_.heads_kv;
    this->set_heads(unit / p_.heads_kv, head_kv, head_kv * p_.group(), p_.group());
    const int64_t rows = this->row_count(), each = (rows + chunks - 1) / chunks;
    chunk_begin_ = chunk * each < rows ? chunk * each : rows;
    chunk_end_ = chunk_begin_ + each < rows ? chunk_begin_ + each : rows;
  }

  Real* delta() const { return dq_ + p_.packed_rows() * dim_padded_; }
  // Sums of dS * distance, one per packed row.
  Real* alibi_terms() const { return call_.dalibi_rows.present() ? delta() + p_.packed_rows() : nullptr; }

  void begin_queries() {
    clear(dq_ + chunk_begin_ * dim_padded_, (chunk_end_ - chunk_begin_) * dim_padded_);
    this->compute_delta(chunk_begin_, chunk_end_, delta() + chunk_begin_);
    if (Real* const terms = alibi_terms()) clear(terms + chunk_begin_, chunk_end_ - chunk_begin_);
  }

  // False when no row of the chunk sees any of the keys; dkv_ is zero then.
  bool accumulate_block(int64_t k) {
    clear(dkv_, dkv_size(p_, plan_));
    const int64_t k_end = k + plan_.block_kv < sequence_.kv_length ? k + plan_.block_kv : sequence_.kv_length;
    if (k >= k_end) return false;
    const KeyRange queries = seeing_queries(sequence_.band, sequence_.seq_q, k, k_end);
    const int64_t group = p_.group();
    const int64_t begin = queries.begin * group > chunk_begin_ ? queries.begin * group : chunk_begin_;
    const int64_t end = queries.end * group < chunk_end_ ? queries.end * group : chunk_end_;
    if (begin >= end) return false;
    this->load_keys(k, k_end);
    special_keys_ = 0;
    if (!pack_rows<P>(this->keys_of(p_.k, k), k_end - k, p_.dim, k_rows_)) {
      special_keys_ = find_special_rows(this->keys_of(p_.k, k), k_end - k, p_.dim, special_);
      for (int64_t i = 0; i < special_keys_; ++i)
        clear_packed_row<P>(k_rows_, k_end - k, p_.dim, special_[i]);
    }
    for (int64_t row = begin; row < end; row += plan_.block_q) {
      const int64_t next = row + plan_.block_q < end ? row + plan_.block_q : end;
      this->fetch_rows(next, next + plan_.block_q < end ? next + plan_.block_q : end);
      accumulate_rows(row, next);
    }
    return true;
  }

  void accumulate_rows(int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    this->load_rows(begin, end, delta() + begin);
    special_queries_ = pack_row_panels(p_.q, begin, n, p_.dim, q_rows_, special_ + plan_.block_kv);
    special_douts_ = pack_row_panels(call_.dout, begin, n, p_.dim_v, dout_rows_,
                                     special_ + plan_.block_kv + plan_.block_q);
    KeyRange used{plan_.block_kv, 0};  // columns of the block that some row sees
    for (int64_t r = 0; r < n; r += kRows) {
      const int rows = int(n - r < kRows ? n - r : kRows);
      TileRange range;
      Real* s;
      Real* ds;
      if constexpr (P::kPair > 1) {
        s = tile_s_;
        ds = tile_ds_;
      } else {
        s = probabilities_ + r * plan_.block_kv;
        ds = gradients_ + r * plan_.block_kv;
      }
      const bool seen = this->compute_tile(r, rows, s, ds, plan_.block_kv, true, &range,
                                           alibi_terms() ? alibi_terms() + begin + r : nullptr);
      if (!seen) range = {};
      [[maybe_unused]] const KeyRange written = clear_outside(rows, s, ds, seen, range);
      const Operand* row_gradients;
      if constexpr (P::kPair > 1) {
        interleave_tile(r, rows, written);
        row_gradients = tile_gradients_;
      } else {
        row_gradients = ds;
      }
      if (!seen) continue;
      if (range.first < used.begin) used.begin = range.first;
      if (range.first + range.keys > used.end) used.end = range.first + range.keys;
      add_to_queries(begin + r, rows, row_gradients, range);
      if (special_keys_) add_special_keys(begin + r, rows, row_gradients);
    }
    if (used.empty()) return;
    add_to_keys(used, begin, n, gradients_, q_rows_, dim_padded_, dkv_);
    add_to_keys(used, begin, n, probabilities_, dout_rows_, dim_v_padded_,
                dkv_ + plan_.block_kv * dim_padded_);
    if (special_queries_) {
      add_special_queries(p_.q, begin, used, special_ + plan_.block_kv, special_queries_, gradients_, p_.dim,
                          dim_padded_, dkv_);
    }
    if (special_douts_) {
      add_special_queries(call_.dout, begin, used, special_ + plan_.block_kv + plan_.block_q, special_douts_,
                          probabilities_, p_.dim_v, dim_v_padded_, dkv_ + plan_.block_kv * dim_padded_);
    }
  }

  // Packs query rows [begin, begin + n) of x as panels; returns the number of special rows.
  int64_t pack_row_panels(const View4& x, int64_t begin, int64_t n, int64_t columns, Operand* dst,
                          int64_t* special) {
    bool finite = true;
    for (int64_t r = 0; r < n; r += P::kPair) {
      const int count = int(n - r < P::kPair ? n - r : P::kPair);
      SourceRows<S> rows[P::kPair];
      for (int i = 0; i < count; ++i) rows[i] = this->query_of(x, begin + r + i);
      finite &= pack_row_group<P>(rows, count, r / P::kPair, round_up(n, P::kPair) / P::kPair, columns, dst);
    }
    int64_t found = 0;
    for (int64_t r = 0; !finite && r < n; ++r) {
      int64_t index;
      if (find_special_rows(this->query_of(x, begin + r), 1, columns, &index) == 0) continue;
      clear_packed_row<P>(dst, n, columns, r);
      special[found++] = r;
    }
    return found;
  }

  // Zeroes what compute_tile left unwritten of the columns that dK and dV will read:
  // add_to_keys leaves out rows by the band, whole register tiles and pairs of rows at a
  // time, so a row is read up to two tiles past the keys that it sees. Returns those columns.
  KeyRange clear_outside(int rows, Real* s, Real* ds, bool seen, const TileRange& range) {
    constexpr int64_t kMargin = (2 * kRows + V::kWidth - 1) / V::kWidth * V::kWidth;
    const int64_t after = range.first + range.columns;
    KeyRange read{0, plan_.block_kv};
    // The bands of rows say nothing of where masks have cut them off.
    const bool by_band = seen && !range.narrowed;
    if (by_band && range.first > kMargin) read.begin = range.first - kMargin;
    if (by_band && after + kMargin < read.end) read.end = after + kMargin;
    for (int i = 0; i < rows; ++i) {
      for (Real* row : {s + i * plan_.block_kv, ds + i * plan_.block_kv}) {
        clear(row + read.begin, range.first - read.begin);
        clear(row + after, read.end - after);
      }
    }
    return read;
  }

  // The given columns of P and dS of a tile as operands: [row pair][key][2] for dV and dK,
  // [row][key] for dQ.
  void interleave_tile(int64_t r, int rows, const KeyRange& columns) {
    const int64_t ld = plan_.block_kv;
    for (int i = 0; i < rows; i += 2) {
      const bool odd = i + 1 < rows;
      Operand* p = probabilities_ + (r + i) * ld;
      Operand* ds = gradients_ + (r + i) * ld;
      for (int64_t j = columns.begin; j < columns.end; j += V::kWidth) {
        const auto ds_even = V::load(tile_ds_ + i * ld + j);
        const auto ds_odd = odd ? V::load(tile_ds_ + (i + 1) * ld + j) : V::zero();
        P::store_interleaved(p + 2 * j, V::load(tile_s_ + i * ld + j),
                             odd ? V::load(tile_s_ + (i + 1) * ld + j) : V::zero());
        P::store_interleaved(ds + 2 * j, ds_even, ds_odd);
        P::store(tile_gradients_ + i * ld + j, ds_even);
        if (odd) P::store(tile_gradients_ + (i + 1) * ld + j, ds_odd);
      }
    }
  }

  // dQ[rows] += dS K
  void add_to_queries(int64_t row, int rows, const Operand* gradients, const TileRange& range) {
    const int64_t steps = round_up(range.keys, P::kPair) / P::kPair;
    const int64_t block_steps = round_up(k_end_ - k_begin_, P::kPair) / P::kPair;
    for (int64_t c = 0; c < dim_padded_; c += kPanel<P>) {
      multiply_tile<P, Update::kAdd>(
          rows, vectors_in(dim_padded_ - c),
          {steps, gradients + range.first, plan_.block_kv, P::kPair,
           k_rows_ + (c / kPanel<P> * block_steps + range.first / P::kPair) * kStep, kStep,
           dq_ + row * dim_padded_ + c, dim_padded_, nullptr});
    }
  }

  // sums[key] += weights^T rows for the used keys; weights is [steps][block_kv][kPair].
  // Rows that see none of a tile's keys hold zeros there and are left out.
  void add_to_keys(const KeyRange& used, int64_t row_begin, int64_t row_count, const Operand* weights,
                   const Operand* rows, int64_t columns, Real* sums) {
    const int64_t steps = round_up(row_count, P::kPair) / P::kPair;
    for (int64_t key = used.begin; key < used.end; key += kRows) {
      const int keys = int(used.end - key < kRows ? used.end - key : kRows);
      const KeyRange queries =
          seeing_queries(sequence_.band, sequence_.seq_q, k_begin_ + key, k_begin_ + key + keys);
      const int64_t begin = queries.begin * p_.group() - row_begin,
                    end = queries.end * p_.group() - row_begin;
      const int64_t first = begin > 0 ? begin / P::kPair : 0;
      const int64_t last = end < row_count ? round_up(end, P::kPair) / P::kPair : steps;
      if (first >= last) continue;
      for (int64_t c = 0; c < columns; c += kPanel<P>) {
        multiply_tile<P, Update::kAdd>(
            keys, vectors_in(columns - c),
            {last - first, weights + (first * plan_.block_kv + key) * P::kPair, P::kPair,
             plan_.block_kv * P::kPair, rows + (c / kPanel<P> * steps + first) * kStep, kStep,
             sums + key * columns + c, columns, nullptr});
      }
    }
  }
  static int vectors_in(int64_t columns) {
    return int((columns < kPanel<P> ? columns : kPanel<P>) / V::kWidth);
  }

  bool sees(int64_t row, int64_t key) const {
    const RowRef at = this->ref(row);
    return is_visible(p_, sequence_, this->b_, at.head, at.query, key);
  }

  Real weight_at(const Operand* weights, int64_t r, int64_t key) const {
    return Real(to_float(weights[(r / P::kPair * plan_.block_kv + key) * P::kPair + r % P::kPair]));
  }

  void add_special_keys(int64_t row, int rows, const Operand* gradients) {
    for (int64_t i = 0; i < special_keys_; ++i) {
      const SourceRows<S> key = this->keys_of(p_.k, k_begin_ + special_[i]);
      for (int j = 0; j < rows; ++j) {
        if (!sees(row + j, k_begin_ + special_[i])) continue;
        add_special_row(Real(to_float(gradients[j * plan_.block_kv + special_[i]])), key.data, key.column,
                        p_.dim, dq_ + (row + j) * dim_padded_);
      }
    }
  }

  void add_special_queries(const View4& x, int64_t begin, const KeyRange& used, const int64_t* special,
                           int64_t count, const Operand* weights, int64_t columns, int64_t padded,
                           Real* sums) {
    for (int64_t i = 0; i < count; ++i) {
      const SourceRows<S> row = this->query_of(x, begin + special[i]);
      for (int64_t key = used.begin; key < used.end; ++key) {
        if (!sees(begin + special[i], k_begin_ + key)) continue;
        add_special_row(weight_at(weights, special[i], key), row.data, row.column, columns,
                        sums + key * padded);
      }
    }
  }

  // dot products carry no scale, so their gradients get it here, in fp32.
  void store_queries() {
    const typename V::Reg scale = V::set1(Real(p_.score.scale));
    for (int64_t row = chunk_begin_; row < chunk_end_; ++row) {
      const RowRef at = this->ref(row);
      S* dst = static_cast<S*>(call_.dq.data) +
               call_.dq.offset(this->b_, at.head, sequence_.first_query + at.query);
      store_scaled(dst, call_.dq.stride[3], dq_ + row * dim_padded_, p_.dim, scale);
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

  // P carries no factor of dropout, so dV gets it here.
  void store_keys(int64_t k, const Real* dkv) {
    const int64_t left = sequence_.seq_kv - k, n = left < plan_.block_kv ? left : plan_.block_kv;
    const typename V::Reg scale = V::set1(Real(p_.score.scale)), kept = V::set1(Real(p_.dropout.keep_scale));
    for (int64_t j = 0; j < n; ++j) {
      const int64_t key = sequence_.first_key + k + j;
      S* dk = static_cast<S*>(call_.dk.data) + call_.dk.offset(this->b_, this->head_kv_, key);
      S* dv = static_cast<S*>(call_.dv.data) + call_.dv.offset(this->b_, this->head_kv_, key);
      store_scaled(dk, call_.dk.stride[3], dkv + j * dim_padded_, p_.dim, scale);
      store_scaled(dv, call_.dv.stride[3], dkv + plan_.block_kv * dim_padded_ + j * dim_v_padded_, p_.dim_v,
                   kept);
    }
  }

  static void store_scaled(S* dst, int64_t stride, const Real* src, int64_t columns, typename V::Reg scale) {
    for (int64_t c = 0; c < columns; c += V::kWidth) {
      store_row<V>(dst + c * stride, stride, V::mul(V::load(src + c), scale),
                   int(columns - c < V::kWidth ? columns - c : V::kWidth));
    }
  }

  int64_t dim_padded_, dim_v_padded_;
  int64_t chunk_begin_ = 0, chunk_end_ = 0;
  Real* dq_ = nullptr;      // [packed_rows][dim_padded], then delta and terms of ALiBi [packed_rows]
  Real* dkv_ = nullptr;     // [block_kv][dim_padded], then [block_kv][dim_v_padded]
  Operand* k_rows_;         // panels of dim columns, depth block_kv
  Operand* q_rows_;         // panels of dim columns, depth block_q
  Operand* dout_rows_;      // panels of dim_v columns, depth block_q
  Operand* probabilities_;  // [block_q / kPair][block_kv][kPair]
  Operand* gradients_;      // same
  Real* tile_s_ = nullptr;  // [kRows][block_kv], where operands are narrower than scores
  Real* tile_ds_ = nullptr;
  Operand* tile_gradients_ = nullptr;
  // Indices of non-finite rows: keys, then queries, then output gradients.
  int64_t* special_;
  int64_t special_keys_ = 0, special_queries_ = 0, special_douts_ = 0;
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
