// The sequence that a block works on.
#pragma once

#include "cuda/tile/rows.h"

namespace fae::cuda {

struct alignas(8) IntPair { int first, second; };

// A sequence (see Sequence) in 32 bits.
struct BlockSequence {
  int batch = 0, key_batch = 0;
  int first_query = 0, first_key = 0;
  int seq_q = 0, seq_kv = 0, kv_length = 0;
  int lo = 0, hi = 0;  // of the band; further than any length is as good as unbounded

  FAE_DEVICE BlockSequence() {}
  FAE_DEVICE BlockSequence(const Problem& p, int64_t b) {
    const Sequence s = p.sequence(b);
    batch = int(b);
    key_batch = int(s.key_batch);
    first_query = int(s.first_query);
    first_key = int(s.first_key);
    seq_q = int(s.seq_q);
    seq_kv = int(s.seq_kv);
    kv_length = int(s.kv_length);
    lo = within_32_bits(s.band.lo);
    hi = within_32_bits(s.band.hi);
  }
  FAE_DEVICE Band band() const { return {lo, hi}; }

 private:
  static FAE_DEVICE int within_32_bits(int64_t x) {
    constexpr int kFar = 0x7fffffff;
    return x < -kFar ? -kFar : x > kFar ? kFar : int(x);
  }
};

// What a main loop needs of its sequence, in shared memory: it has no registers to spare.
template <class T>
class SharedSequence {
 public:
  static constexpr int kBytes = 80;

  FAE_DEVICE SharedSequence() {}
  explicit FAE_DEVICE SharedSequence(Smem<std::byte> at) : at_(at) {}

  // For the block. In the backward pass: dO, and the place of the first row in RowStats.
  FAE_DEVICE void write(const Problem& p, const BlockSequence& s, int head_kv, const View4& dout = {},
                        int64_t stats_row = 0) const {
    if (thread_index() == 0) {
      const int64_t head_q = head_kv * p.group();
      const bool paged = p.cache.pages.present();
      const auto keys = [&](const View4& view) {
        return static_cast<const T*>(view.data) +
               (paged ? view.offset(0, head_kv, 0) : view.offset(s.key_batch, head_kv, s.first_key));
      };
      const auto rows = [&](const View4& view) {
        return static_cast<const T*>(view.data) + view.offset(s.batch, head_q, s.first_query);
      };
      store_shared(pointer(0), keys(p.k));
      store_shared(pointer(1), keys(p.v));
      store_shared(pointer(2), rows(p.q));
      store_shared(pointer(3), rows(dout));
      store_shared(pair(0), IntPair{s.lo, s.hi});
      store_shared(pair(1), IntPair{s.first_query, s.seq_q});
      store_shared(pair(2), IntPair{s.first_key, s.seq_kv});
      store_shared(pair(3), IntPair{s.batch, head_kv});
      store_shared(pair(4), IntPair{s.kv_length, int(head_q)});
      store_shared(stats_row_at(), stats_row);
    }
    block_barrier();
  }

  // With pages: they begin with row 0 of page 0.
  FAE_DEVICE RowSource<const T> k(const Problem& p) const { return {p.k, load_shared(pointer(0))}; }
  FAE_DEVICE RowSource<const T> v(const Problem& p) const { return {p.v, load_shared(pointer(1))}; }
  FAE_DEVICE RowSource<const T> q(const Problem& p) const { return {p.q, load_shared(pointer(2))}; }
  FAE_DEVICE RowSource<const T> dout(const View4& view) const { return {view, load_shared(pointer(3))}; }

  FAE_DEVICE Smem<IntPair> numbers() const { return pair(0); }  // see TileSequence
  FAE_DEVICE Band band() const {
    const IntPair band = load_shared(pair(0));
    return {band.first, band.second};
  }
  FAE_DEVICE int first_query() const { return load_shared(pair(1)).first; }
  FAE_DEVICE int seq_q() const { return load_shared(pair(1)).second; }
  FAE_DEVICE int64_t stats_row() const { return load_shared(stats_row_at()); }
  FAE_DEVICE int first_key() const { return load_shared(pair(2)).first; }
  FAE_DEVICE int batch() const { return load_shared(pair(3)).first; }
  FAE_DEVICE int head_kv() const { return load_shared(pair(3)).second; }
  FAE_DEVICE int kv_length() const { return load_shared(pair(4)).first; }
  FAE_DEVICE int head_q() const { return load_shared(pair(4)).second; }  // the first of the group

 private:
  FAE_DEVICE Smem<const T*> pointer(int n) const { return at_.template as<const T*>() + n; }
  FAE_DEVICE Smem<IntPair> pair(int n) const { return (at_ + 32).template as<IntPair>() + n; }

  FAE_DEVICE Smem<int64_t> stats_row_at() const { return (at_ + 72).template as<int64_t>(); }

  Smem<std::byte> at_;
};

// What a tile of scores needs of its sequence: where it lies, or what it is.
struct TileSequence {
  bool is_shared = false;
  Smem<IntPair> at;  // as SharedSequence wrote them
  int known_batch = 0, known_head = 0, known_length = 0, known_shift = 0;
  Band known_band;

  FAE_DEVICE int batch() const { return is_shared ? load_shared(at + 3).first : known_batch; }
  // First query head of the group.
  FAE_DEVICE int head() const { return is_shared ? load_shared(at + 4).second : known_head; }
  FAE_DEVICE int kv_length() const { return is_shared ? load_shared(at + 4).first : known_length; }
  FAE_DEVICE Band band() const {
    if (!is_shared) return known_band;
    const IntPair band = load_shared(at);
    return {band.first, band.second};
  }
  // What lies between a query and the key at no distance from it: seq_kv - seq_q.
  FAE_DEVICE int shift() const {
    return is_shared ? load_shared(at + 2).second - load_shared(at + 1).second : known_shift;
  }
};
template <class T>
FAE_DEVICE TileSequence tile_sequence(const SharedSequence<T>& s) {
  return {true, s.numbers(), 0, 0, 0, 0, {}};
}
FAE_DEVICE TileSequence tile_sequence(const BlockSequence& s, int head) {
  return {false, {}, s.batch, head, s.kv_length, s.seq_kv - s.seq_q, s.band()};
}

}  // namespace fae::cuda
