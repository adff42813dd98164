// Backward attention: dQ, dK and dV by recomputation (FlashAttention-2's loop order).
//
// One task = some packed query rows ("chunk") of one K/V head against one or all blocks
// of keys. dQ rows belong to one chunk; dK and dV of a block are summed over chunks.
#pragma once

#include "cpu/kernel/backward_rows.h"
#include "cpu/kernel/key_sums.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, class S>
class Backward : private BackwardRows<P, S> {
  using Base = BackwardRows<P, S>;
  using typename Base::Operand;
  using typename Base::Real;
  using typename Base::TileRange;
  using typename Base::V;
  using Base::call_, Base::p_, Base::plan_, Base::arena_, Base::kRows, Base::kStep;
  using Base::k_begin_, Base::k_end_, Base::row_begin_, Base::sequence_;
  using Base::clear, Base::delta, Base::alibi_terms, Base::dim_padded_, Base::dq_;

 public:
  Backward(const BackwardCall& call, const Plan& plan, std::byte* base)
      : Base(call, plan, base), dk_sums_(p_.dim, plan.block_kv), dv_sums_(p_.dim_v, plan.block_kv) {
    k_rows_ = arena_.template take<Operand>(panel_operands<P>(p_.dim, plan.block_kv));
    q_rows_ = arena_.template take<Operand>(dk_sums_.row_operands(plan.block_q));
    dout_rows_ = arena_.template take<Operand>(dv_sums_.row_operands(plan.block_q));
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
  using Base::dq_size;

  // Elements of one block's dK sums, then its dV sums; see KeySums.
  static int64_t dkv_size(const Problem& p, const Plan& plan) {
    return KeySums<P, S>(p.dim, plan.block_kv).size() + KeySums<P, S>(p.dim_v, plan.block_kv).size();
  }
  // One K/V head, all rows, all keys.
  void run_head(int64_t unit) {
    select(unit, 0, 1);
    this->begin_queries(chunk_begin_, chunk_end_);
    for (int64_t k = 0; k < sequence_.seq_kv; k += plan_.block_kv) {
      accumulate_block(k);
      store_keys(k, dkv_);
    }
    this->store_queries(chunk_begin_, chunk_end_);
  }

  // One chunk against the block of keys at k; blocks come last to first. dq: dq_size()
  // elements of this head, living through all of them.
  bool run_chunk(int64_t unit, int64_t chunk, int64_t k, Real* dq) {
    select(unit, chunk, plan_.chunks);
    dq_ = dq;
    // Packed sequences may be shorter than the blocks that there are; the last of all begins.
    if (k + plan_.block_kv >= p_.seq_kv) this->begin_queries(chunk_begin_, chunk_end_);
    const bool any = accumulate_block(k);
    if (k == 0) this->store_queries(chunk_begin_, chunk_end_);
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
  void select(int64_t unit, int64_t chunk, int64_t chunks) {
    this->select_head(unit);
    const int64_t rows = this->row_count(), each = (rows + chunks - 1) / chunks;
    chunk_begin_ = chunk * each < rows ? chunk * each : rows;
    chunk_end_ = chunk_begin_ + each < rows ? chunk_begin_ + each : rows;
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
      accumulate_rows(row, row + plan_.block_q < end ? row + plan_.block_q : end, end);
    }
    return true;
  }

  // Rows [begin, end); those up to `all` come next.
  void accumulate_rows(int64_t begin, int64_t end, int64_t all) {
    const int64_t n = end - begin;
    this->load_rows(begin, end, delta() + begin);
    special_queries_ = pack_rows_of(p_.q, begin, n, p_.dim, dk_sums_, q_rows_, special_ + plan_.block_kv);
    special_douts_ = pack_rows_of(call_.dout, begin, n, p_.dim_v, dv_sums_, dout_rows_,
                                  special_ + plan_.block_kv + plan_.block_q);
    KeyRange used{plan_.block_kv, 0};  // columns of the block that some row sees
    for (int64_t r = 0; r < n; r += kRows) {
      const int rows = int(n - r < kRows ? n - r : kRows);
      const int64_t next = end + r, left = all - next;
      if (left > 0) this->fetch_rows(next, next + (left < kRows ? left : kRows));
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
    add_to_keys(used, begin, n, dk_sums_, gradients_, q_rows_, dkv_);
    add_to_keys(used, begin, n, dv_sums_, probabilities_, dout_rows_, dkv_ + dk_sums_.size());
    if (special_queries_) {
      add_special_queries(p_.q, begin, used, special_ + plan_.block_kv, special_queries_, dk_sums_,
                          gradients_, dkv_);
    }
    if (special_douts_) {
      add_special_queries(call_.dout, begin, used, special_ + plan_.block_kv + plan_.block_q, special_douts_,
                          dv_sums_, probabilities_, dkv_ + dk_sums_.size());
    }
  }

  // Packs query rows [begin, begin + n) of x for `sums`; returns the number of special rows.
  int64_t pack_rows_of(const View4& x, int64_t begin, int64_t n, int64_t columns, const KeySums<P, S>& sums,
                       Operand* dst, int64_t* special) {
    const bool finite = sums.pack([&](int64_t r) { return this->query_of(x, begin + r); }, n, dst);
    int64_t found = 0;
    for (int64_t r = 0; !finite && r < n; ++r) {
      int64_t index;
      if (find_special_rows(this->query_of(x, begin + r), 1, columns, &index) == 0) continue;
      sums.clear_row(dst, n, r);
      special[found++] = r;
    }
    return found;
  }

  // Zeroes what compute_tile left unwritten of the columns that dK and dV will read: add_to_keys
  // leaves out rows by the band, for some keys and whole steps of rows at a time, so a row is read
  // that much past the keys that it sees. Returns those columns.
  KeyRange clear_outside(int rows, Real* s, Real* ds, bool seen, const TileRange& range) {
    constexpr int64_t kSteps = P::kDepth > kRows ? P::kDepth : kRows;
    constexpr int64_t kMargin = round_up(KeySums<P, S>::kKeys + kSteps, V::kWidth);
    const int64_t after = range.first + range.columns;
    KeyRange read{0, plan_.block_kv};
    // The bands of rows say nothing of where masks have cut them off.
    const bool by_band = seen && !range.narrowed;
    if (by_band && range.first > kMargin) read.begin = range.first - kMargin;
    if (by_band && after + kMargin < read.end) read.end = after + kMargin;
    for (int i = 0; i < rows; ++i) {
      Real* const both[] = {s + i * plan_.block_kv, ds + i * plan_.block_kv};
      for (Real* row : both) {
        clear(row + read.begin, range.first - read.begin);
        clear(row + after, read.end - after);
      }
    }
    return read;
  }

  // The given columns of P and dS of a tile as operands: [row pair][key][2] for dV and dK,
  // [row][key] for dQ. Rows up to a whole step of dV's and dK's products are 0.
  void interleave_tile(int64_t r, int rows, const KeyRange& columns) {
    const int64_t ld = plan_.block_kv;
    for (int i = rows + rows % 2; i < round_up(rows, P::kDepth); i += 2) {
      Operand* const both[] = {probabilities_, gradients_};
      for (Operand* weights : both)
        __builtin_memset(weights + (r + i) * ld + 2 * columns.begin, 0,
                         size_t(columns.end - columns.begin) * 2 * sizeof(Operand));
    }
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
    const int64_t steps = depth_steps<P>(range.keys), block_steps = depth_steps<P>(k_end_ - k_begin_);
    for (int64_t c = 0; c < dim_padded_; c += kPanel<P>) {
      multiply_tile<P, Update::kAdd>(
          rows, vectors_in<P>(dim_padded_ - c),
          {steps, gradients + range.first, plan_.block_kv, P::kPair,
           k_rows_ + (c / kPanel<P> * block_steps + range.first / P::kPair) * kStep, kStep,
           dq_ + row * dim_padded_ + c, dim_padded_, range.first / P::kPair});
    }
  }

  // sums[key] += weights^T rows for the used keys. Rows that see none of some keys hold zeros there and are
  // left out.
  void add_to_keys(const KeyRange& used, int64_t row_begin, int64_t row_count, const KeySums<P, S>& key_sums,
                   const Operand* weights, const Operand* rows, Real* sums) {
    for (int64_t key = used.begin; key < used.end; key += key_sums.kKeys) {
      const int keys = int(used.end - key < key_sums.kKeys ? used.end - key : key_sums.kKeys);
      const KeyRange queries =
          seeing_queries(sequence_.band, sequence_.seq_q, k_begin_ + key, k_begin_ + key + keys);
      const int64_t begin = queries.begin * p_.group() - row_begin,
                    end = queries.end * p_.group() - row_begin;
      const int64_t first = begin > 0 ? begin : 0, last = end < row_count ? end : row_count;
      if (first < last) key_sums.add(key, keys, first, last, weights, rows, row_count, sums);
    }
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
                           int64_t count, const KeySums<P, S>& key_sums, const Operand* weights, Real* sums) {
    for (int64_t i = 0; i < count; ++i) {
      const SourceRows<S> row = this->query_of(x, begin + special[i]);
      for (int64_t key = used.begin; key < used.end; ++key) {
        if (!sees(begin + special[i], k_begin_ + key)) continue;
        key_sums.add_special(key, weight_at(weights, special[i], key), row, sums);
      }
    }
  }

  // P carries no factor of dropout, so dV gets it here.
  void store_keys(int64_t k, const Real* dkv) {
    const int64_t left = sequence_.seq_kv - k, n = left < plan_.block_kv ? left : plan_.block_kv;
    const int64_t first = sequence_.first_key + k;
    dk_sums_.store(n, V::set1(Real(p_.score.scale)), dkv,
                   [&](int64_t key) { return this->gradient_row(call_.dk, this->head_kv_, first + key); });
    dv_sums_.store(n, V::set1(Real(p_.dropout.keep_scale)), dkv + dk_sums_.size(),
                   [&](int64_t key) { return this->gradient_row(call_.dv, this->head_kv_, first + key); });
  }

  const KeySums<P, S> dk_sums_, dv_sums_;
  int64_t chunk_begin_ = 0, chunk_end_ = 0;
  Real* dkv_ = nullptr;     // sums of dK, then of dV
  Operand* k_rows_;         // panels of dim columns, depth block_kv
  Operand* q_rows_;         // [block_q], packed for dk_sums_
  Operand* dout_rows_;      // [block_q], packed for dv_sums_
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
