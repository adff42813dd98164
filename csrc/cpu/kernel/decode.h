// Forward attention of few query rows (decoding): keys and values are read once, where they lie.
//
// One task = all packed rows of some K/V heads of a batch against all keys, or against one of several ranges
// of them, whose results are then merged (flash-decoding; forward.cpp). Heads that lie side by side
// in memory go through the keys together, block by block, so that memory is read in its order.
#pragma once

#include "cpu/kernel/direct.h"
#include "cpu/kernel/forward_rows.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, class S>
class Decode : private ForwardRows<P, S> {
  using Base = ForwardRows<P, S>;
  using typename Base::Operand;
  using typename Base::Real;
  using typename Base::V;
  using Base::arena_, Base::p_, Base::plan_, Base::scale_, Base::group_, Base::dim_padded_,
      Base::dim_v_padded_;
  using Base::b_, Base::head_kv_, Base::row_begin_, Base::row_end_, Base::sequence_;
  using Base::q_, Base::acc_, Base::max_, Base::sum_, Base::scratch_, Base::keep_;
  using Products = Direct<P, S>;

 public:
  Decode(const ForwardCall& call, const Plan& plan, std::byte* base)
      : Base(call, plan, base, round_up(call.problem.dim, Products::kChunk), plan.heads_together) {
    scores_ = arena_.template take<Real>(kDirectRows * score_ld());
    first_q_ = q_;
    queries_ = arena_.template take<Operand>(plan.heads_together * plan.block_q * dim_padded_);
    if constexpr (P::kPair > 1) weights_ = arena_.template take<Operand>(kDirectRows * score_ld());
    else weights_ = scores_;
    seen_ = arena_.template take<S>(plan.block_kv * p_.dim_v);
    if (p_.cache.pages.present()) piece_ = arena_.template take<Real>(kDirectRows * dim_v_padded_);
  }
  size_t bytes() const { return arena_.used(); }

  // Pages are read one by one, and scores of a page are written as whole vectors.
  int64_t score_ld() const { return plan_.block_kv + V::kWidth; }

  // parts: with several ranges of keys, where each leaves its share; see KeySplit.
  void run(int64_t task, std::byte* parts) {
    const int64_t groups = (p_.heads_kv + plan_.heads_together - 1) / plan_.heads_together;
    const int64_t first = task % groups * plan_.heads_together, b = task / groups % p_.batch;
    const int64_t left = p_.heads_kv - first, split = task / groups / p_.batch;
    const int64_t heads = left < plan_.heads_together ? left : plan_.heads_together;
    if (!this->select(b * p_.heads_kv + first, 0)) return;
    KeyRange keys = this->keys_of_task();
    if (plan_.splits > 1) {
      const int64_t begin = split * plan_.split_keys, end = begin + plan_.split_keys;
      if (keys.begin < begin) keys.begin = begin;
      if (keys.end > end) keys.end = end;
    }
    if (keep_) keys.begin = keys.begin / 4 * 4;  // dropout draws for four keys at a time
    attend(keys, heads, split == 0);
    for_each_head(heads, [&] {
      // Only this head again: which others share its task depends on the number of threads.
      if (!all_finite()) {
        skips_hidden_ = true;
        attend(keys, 1, split == 0);
        skips_hidden_ = false;
      }
      if (plan_.splits == 1) this->store_rows();
      else leave_rows(KeySplit<Real>::at(parts, p_, plan_, split, b * p_.heads_kv + head_kv_));
    });
  }

 private:
  template <class Fn>
  FAE_INLINE void for_each_head(int64_t heads, Fn&& fn) {
    for (int64_t i = 0; i < heads; ++i) {
      fn();
      this->move(1);
    }
    this->move(-heads);
  }

  void attend(const KeyRange& keys, int64_t heads, bool with_sinks) {
    first_head_ = head_kv_;
    heads_ = heads;
    for_each_head(heads, [&] {
      this->load_queries(with_sinks);
      Products::arrange(q_, dim_padded_, int(row_end_ - row_begin_), p_.dim, queries());
    });
    for (int64_t k = keys.begin, end; k < keys.end; k = end) {
      end = k + plan_.block_kv < keys.end ? k + plan_.block_kv : keys.end;
      for_each_head(heads, [&] { attend_block(k, end); });
    }
  }

  // What is not finite after one block stays so, whatever it is multiplied by later.
  bool all_finite() const {
    FiniteWatch<V> watch;
    const Real* const end = acc_ + (row_end_ - row_begin_) * dim_v_padded_;
    for (const Real* x = acc_; x < end; x += V::kWidth) watch.see(V::load(x));
    return watch.all_finite();
  }

  // Whether keys from `key` on are read where they lie, page by page. Those of tiny pages are gathered, and
  // of pages that would tear a pair.
  bool by_page(int64_t key) const {
    const int64_t page = p_.cache.pages.page_size;
    return p_.cache.pages.present() && page >= V::kWidth && page % P::kPair == 0 &&
           (sequence_.first_key + key) % P::kPair == 0;
  }

  // How far from a key of this head lies what is read some time later, if keys lie in one piece: a later key,
  // or where heads go together the same key of the next head, and after the last head the next block.
  int64_t ahead(const View4& x, int64_t columns) const {
    if (heads_ == 1) return Products::rows_ahead(columns) * x.stride[2];
    if (head_kv_ + 1 < first_head_ + heads_) return x.stride[1];
    return plan_.block_kv * x.stride[2] - (heads_ - 1) * x.stride[1];
  }
  typename Products::Rows in_one_place(const View4& x, int64_t key, int64_t n, int64_t columns) const {
    return {this->keys_of(x, key, n, columns), ahead(x, columns)};
  }

  // fn(done, rows, count) for the pages that n > 0 keys or values from `key` on lie in, in their order;
  // `done` of them lie before. What is fetched early is of the next head; or at the same place in a later
  // page; or in the same page, where that is far larger.
  template <class Fn>
  FAE_INLINE void for_each_page(const View4& x, int64_t columns, int64_t key, int64_t n, Fn&& fn) const {
    const int64_t page = p_.cache.pages.page_size, wanted = Products::rows_ahead(columns);
    const int64_t keys_ahead = wanted < page ? page : wanted / page * page;
    for (int64_t done = 0; done < n;) {
      const int64_t left = page - (sequence_.first_key + key + done) % page;
      const int64_t count = left < n - done ? left : n - done, later = key + done + keys_ahead;
      const SourceRows<S> rows = this->key_row(x, key + done);
      int64_t elements_ahead = ahead(x, columns);
      if (page <= 4 * wanted && head_kv_ + 1 == first_head_ + heads_) {
        elements_ahead = later < sequence_.kv_length ? this->key_row(x, later).data - rows.data : 0;
      }
      fn(done, typename Products::Rows{rows, elements_ahead}, count);
      done += count;
    }
  }

  void attend_block(int64_t k_begin, int64_t k_end) {
    const int rows = int(row_end_ - row_begin_);
    RowRef refs[kDirectRows];
    for (int i = 0; i < rows; ++i) refs[i] = row_ref(row_begin_ + i, head_kv_, group_);
    TileMask mask{k_begin, k_end};
    if (p_.has_mask()) mask = classify_masks(p_, b_, refs, rows, k_begin, k_end);
    if (mask.skip()) return;
    if (keep_) mask.begin = mask.begin / 4 * 4;
    const int64_t keys = mask.end - mask.begin, columns = round_up(keys, V::kWidth), ld = score_ld();
    if (by_page(mask.begin)) {
      for_each_page(p_.k, p_.dim, mask.begin, keys, [&](int64_t done, const auto& page, int64_t count) {
        Products::score(queries(), rows, page, count, p_.dim, scores_ + done, ld);
      });
    } else {
      Products::score(queries(), rows, in_one_place(p_.k, mask.begin, keys, p_.dim), keys, p_.dim, scores_,
                      ld);
    }

    const ScoreTile<V> tile{scores_, ld, mask.begin, keys, columns, b_, refs, rows};
    const bool partial = classify(sequence_.band, sequence_.kv_length, refs[0].query,
                                  refs[rows - 1].query + 1, mask.begin, mask.end) != TileClass::kFull;
    finish_scores<V>(p_, sequence_, partial, mask, tile, scratch_);
    Real alpha[kDirectRows];
    for (int i = 0; i < rows; ++i) {
      alpha[i] = this->softmax(i, refs[i], mask.begin, columns, scores_ + i * ld, weights_ + i * ld);
    }
    const auto accumulate = [&](int64_t done, const typename Products::Rows& values, int64_t count) {
      add_values(refs, rows, alpha, mask.begin, keys, done, values, count);
    };
    if (by_page(mask.begin)) for_each_page(p_.v, p_.dim_v, mask.begin, keys, accumulate);
    else accumulate(0, in_one_place(p_.v, mask.begin, keys, p_.dim_v), keys);
  }

  // Adds `count` values, from the one at `done` on of all keys from k_begin on; factors of what was there
  // before are 1 once they were heeded. A piece of a long sum that lies in several pages is summed up by
  // itself, so that pages do not show.
  void add_values(const RowRef* refs, int rows, Real* alpha, int64_t k_begin, int64_t keys, int64_t done,
                  const typename Products::Rows& values, int64_t count) {
    constexpr int64_t kPiece = Products::kLongestSum;
    for (int64_t i = 0, n; i < count; i += n, done += n) {
      const int64_t begun = done % kPiece, left = kPiece - begun;
      n = count - i < left ? count - i : left;
      const bool ends = n == left || done + n == keys;
      const auto from = values.from_row(i);
      if (begun == 0 && ends) {
        add_seen(refs, rows, alpha, k_begin, done, from, n, acc_);
      } else {
        if (begun == 0) {
          for (int64_t c = 0; c < rows * dim_v_padded_; c += V::kWidth) V::store(piece_ + c, V::zero());
        }
        add_seen(refs, rows, nullptr, k_begin, done, from, n, piece_);
        if (ends) add_piece(rows, alpha);
      }
      for (int r = 0; r < rows && ends; ++r) alpha[r] = 1;
    }
  }
  void add_piece(int rows, const Real* alpha) {
    for (int r = 0; r < rows; ++r) {
      const auto factor = V::set1(alpha[r]);
      Real* const acc = acc_ + r * dim_v_padded_;
      for (int64_t c = 0; c < dim_v_padded_; c += V::kWidth)
        V::store(acc + c, V::fma(factor, V::load(acc + c), V::load(piece_ + r * dim_v_padded_ + c)));
    }
  }

  // n values to `acc`, as accumulate() does; of those that a row does not see nothing, if need be.
  void add_seen(const RowRef* refs, int rows, const Real* alpha, int64_t k_begin, int64_t done,
                const typename Products::Rows& values, int64_t n, Real* acc) {
    const int64_t ld = score_ld();
    if (!skips_hidden_) {
      Products::accumulate(weights_ + done, ld, rows, alpha, values, n, p_.dim_v, acc, dim_v_padded_);
      return;
    }
    for (int r = 0; r < rows; ++r) {
      const auto sees = [&](int64_t i) {
        return is_visible(p_, sequence_, b_, refs[r].head, refs[r].query, k_begin + done + i);
      };
      Products::copy_seen(values, n, p_.dim_v, sees, seen_);
      Products::accumulate(weights_ + r * ld + done, ld, 1, alpha ? alpha + r : nullptr,
                           {{seen_, p_.dim_v, 1}, 0}, n, p_.dim_v, acc + r * dim_v_padded_, dim_v_padded_);
    }
  }

  void leave_rows(const KeySplit<Real>& part) const {
    for (int64_t i = 0; i < row_end_ - row_begin_; ++i) {
      // In the merge a sink alone is to remain what it is.
      const bool sunk = p_.score.sinks.present() && sum_[i] == 1;
      const Real sink = sunk ? Real(p_.score.sinks.at(b_, this->row(i).head)) : Real(0);
      part.max[i] = sunk && max_[i] == sink / scale_.natural ? sink : max_[i] * scale_.natural;
      part.sum[i] = sum_[i];
      for (int64_t c = 0; c < p_.dim_v; ++c) part.acc[i * p_.dim_v + c] = acc_[i * dim_v_padded_ + c];
    }
  }

  Operand* queries() const { return queries_ + (q_ - first_q_); }  // of this head

  const Operand* first_q_;
  int64_t first_head_ = 0, heads_ = 1;  // that go together
  Operand* queries_;                    // arranged, of all heads
  Real* scores_;                        // [kDirectRows][score_ld()]
  Operand* weights_;                    // the same, as operands: scores_ itself where these are Real
  S* seen_;                             // [block_kv][dim_v]
  Real* piece_ = nullptr;               // [kDirectRows][dim_v_padded], with pages
  bool skips_hidden_ = false;           // values of hidden keys are not even multiplied by 0
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
