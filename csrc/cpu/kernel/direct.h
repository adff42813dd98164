// Products of few rows with keys and values as they lie in memory.
//
// For a handful of query rows (decoding) every key is used a handful of times: packing it would cost more
// than multiplying it, and the time is that of reading it once.
#pragma once

#include "cpu/gemm/pack.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// P: product of queries and keys, S: storage type of keys and values.
template <class P, class S>
class Direct {
  using V = typename P::Vec;
  using Reg = typename V::Reg;
  using Real = typename V::Elem;
  using Operand = typename P::Operand;
  static constexpr int W = V::kWidth;
  static constexpr int64_t kAhead = 16;                      // keys that are fetched early
  static constexpr int64_t kLine = int64_t(64 / sizeof(S));  // elements of a cache line

 public:
  static constexpr int64_t kChunk = int64_t(W) * P::kPair;  // elements of a key per register

  // Keys or values, whose elements lie side by side, and how far from each of them lies what is fetched
  // early.
  struct Rows {
    const S* data;
    int64_t row, ahead;
    FAE_INLINE Rows(const SourceRows<S>& rows) : Rows(rows, kAhead * rows.row) {}
    FAE_INLINE Rows(const SourceRows<S>& rows, int64_t ahead_)
        : data(rows.data), row(rows.row), ahead(ahead_) {}
    FAE_INLINE Rows from_row(int64_t r) const {
      Rows rows = *this;
      rows.data += r * row;
      return rows;
    }
  };

  // s[r][j] = q[r] . keys[j] for `rows` rows and n keys; q: [rows][dim], 0 up to whole chunks. Writes whole
  // vectors.
  static void score(const Operand* q, int64_t q_ld, int rows, const Rows& keys, int64_t n, int64_t dim,
                    Real* s, int64_t ld) {
    for (int64_t j = 0; j < n; j += W) {
      const int count = int(n - j < W ? n - j : W);
      for (int r = 0; r < rows; r += kGroup) {
        const int group = rows - r < kGroup ? rows - r : kGroup;
        score_fn<kGroup>(group)(q + r * q_ld, q_ld, keys.from_row(j), count, dim, s + r * ld + j, ld);
      }
    }
  }

  // acc[r] = alpha[r] acc[r] + sum_j p[r][j] values[j]; acc: [rows][acc_ld], whole vectors.
  static void accumulate(const Real* p, int64_t p_ld, int rows, const Real* alpha, const Rows& values,
                         int64_t n, int64_t dim_v, Real* acc, int64_t acc_ld) {
    for (int r = 0; r < rows; r += kGroup) {
      const int group = rows - r < kGroup ? rows - r : kGroup;
      add_fn<kGroup>(group)(p + r * p_ld, p_ld, alpha + r, values, n, dim_v, acc + r * acc_ld, acc_ld);
    }
  }

 private:
  // Sums that fit the registers, and rows that are taken together so that several keys fit, too.
  static constexpr int kSums = V::kTileRows * V::kTileVecs;
  static constexpr int kGroup = kSums >= 24 ? 8 : 4;
  static constexpr int at_a_time(int rows) { return kSums / rows < 4 ? kSums / rows : 4; }

  using ScoreFn = void (*)(const Operand*, int64_t, const Rows&, int, int64_t, Real*, int64_t);
  using AddFn = void (*)(const Real*, int64_t, const Real*, const Rows&, int64_t, int64_t, Real*, int64_t);
  template <int kRows>
  static FAE_INLINE ScoreFn score_fn(int rows) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return score_fn<kRows - 1>(rows);
    }
    return &score_vector<kRows, at_a_time(kRows)>;
  }
  template <int kRows>
  static FAE_INLINE AddFn add_fn(int rows) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return add_fn<kRows - 1>(rows);
    }
    return &add_columns<kRows, at_a_time(kRows)>;
  }

  // Up to one vector of keys: sums by lanes first, kKeys at a time, then across lanes for all together.
  template <int kRows, int kKeys>
  static void score_vector(const Operand* q, int64_t q_ld, const Rows& keys, int count, int64_t dim, Real* s,
                           int64_t ld) {
    Reg part[kRows][W];
    int first = 0;
    for (; first + kKeys <= W && first < count; first += kKeys)
      sum_lanes<kRows, kKeys>(q, q_ld, keys, first, count, dim, part);
    if constexpr (W % kKeys != 0) {
      if (first < count && first + kKeys > W) {
        sum_lanes<kRows, W % kKeys>(q, q_ld, keys, first, count, dim, part);
        first = W;
      }
    }
    for (; first < W; ++first) {
      for (int r = 0; r < kRows; ++r) part[r][first] = V::zero();
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) V::store(s + r * ld, V::reduce_each(part[r]));
  }

  // part[r][k] = products of row r with key k, to be summed over their lanes, for kKeys keys from `first`.
  template <int kRows, int kKeys>
  static FAE_INLINE void sum_lanes(const Operand* q, int64_t q_ld, const Rows& keys, int first, int count,
                                   int64_t dim, Reg (*part)[W]) {
    static_assert(kLine % kChunk == 0);
    const S* key[kKeys];
    Reg acc[kRows][kKeys];
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) {
      key[k] = keys.data + (first + k < count ? first + k : count - 1) * keys.row;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][k] = V::zero();
    }
    // Past the last key nothing is read; an address that does not exist is no harm.
    const int64_t ahead = keys.ahead;
    int64_t c = 0;
    for (; c + kLine <= dim; c += kLine) {
#pragma GCC unroll 8
      for (int k = 0; k < kKeys; ++k) __builtin_prefetch(key[k] + ahead + c);
#pragma GCC unroll 4
      for (int64_t chunk = 0; chunk < kLine; chunk += kChunk)
        add_chunk<kRows, kKeys, true>(q + c + chunk, q_ld, key, c + chunk, kChunk, acc);
    }
    if (c < dim) {
#pragma GCC unroll 8
      for (int k = 0; k < kKeys; ++k) __builtin_prefetch(key[k] + ahead + c);
    }
    for (; c + kChunk <= dim; c += kChunk) add_chunk<kRows, kKeys, true>(q + c, q_ld, key, c, kChunk, acc);
    if (c < dim) add_chunk<kRows, kKeys, false>(q + c, q_ld, key, c, dim - c, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int k = 0; k < kKeys; ++k) part[r][first + k] = acc[r][k];
    }
  }

  // One register of each key from element c, all of it or n elements, times that of each row.
  template <int kRows, int kKeys, bool kWhole>
  static FAE_INLINE void add_chunk(const Operand* q, int64_t q_ld, const S* const* key, int64_t c, int64_t n,
                                   Reg (*acc)[kKeys]) {
    Reg column[kKeys];
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) {
      if constexpr (P::kPair == 2) column[k] = P::load_pairs(key[k] + c, int(n));
      else column[k] = kWhole ? V::load(key[k] + c) : V::load_n(key[k] + c, int(n));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Reg row = P::load(q + r * q_ld);
#pragma GCC unroll 8
      for (int k = 0; k < kKeys; ++k) acc[r][k] = P::multiply_add(acc[r][k], row, column[k]);
    }
  }

  // Columns are taken in passes of about the same width: one of a single vector would wait for its sums.
  template <int kRows, int kVecs>
  static void add_columns(const Real* p, int64_t p_ld, const Real* alpha, const Rows& values, int64_t n,
                          int64_t dim_v, Real* acc, int64_t acc_ld) {
    int64_t c = 0;
    for (int64_t vecs = dim_v / W; vecs > 0;) {
      const int64_t passes = (vecs + kVecs - 1) / kVecs, width = (vecs + passes - 1) / passes;
      add_pass<kRows, kVecs>(int(width), p, p_ld, alpha, values, n, c, acc, acc_ld);
      c += width * W;
      vecs -= width;
    }
    if (c < dim_v) add_block<kRows, 1, false>(p, p_ld, alpha, values, n, c, int(dim_v - c), acc, acc_ld);
  }

  template <int kRows, int kVecs>
  static FAE_INLINE void add_pass(int vecs, const Real* p, int64_t p_ld, const Real* alpha,
                                  const Rows& values, int64_t n, int64_t c, Real* acc, int64_t acc_ld) {
    if constexpr (kVecs > 1) {
      if (vecs < kVecs) return add_pass<kRows, kVecs - 1>(vecs, p, p_ld, alpha, values, n, c, acc, acc_ld);
    }
    add_block<kRows, kVecs, true>(p, p_ld, alpha, values, n, c, W, acc, acc_ld);
  }

  // Columns [c, c + kVecs W) of the sums; or, when not whole, the `lanes` of one vector.
  template <int kRows, int kVecs, bool kWhole>
  static FAE_INLINE void add_block(const Real* p, int64_t p_ld, const Real* alpha, const Rows& values,
                                   int64_t n, int64_t c, int lanes, Real* acc, int64_t acc_ld) {
    Reg sum[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j)
        sum[r][j] = V::mul(V::set1(alpha[r]), V::load(acc + r * acc_ld + c + j * W));
    }
    // Lines that begin in these columns; an earlier pass has fetched the one before.
    constexpr int kLines = (kVecs * W + int(kLine) - 1) / int(kLine);
    const int64_t line = round_up(c, kLine) - c, last = kVecs * W - 1;
    const S* value = values.data + c;
    for (int64_t k = 0; k < n; ++k, value += values.row) {
      Reg column[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kLines; ++j) {
        const int64_t at = line + j * kLine;
        __builtin_prefetch(value + values.ahead + (at < last ? at : last));
      }
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) column[j] = kWhole ? V::load(value + j * W) : V::load_n(value, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Reg weight = V::set1(p[r * p_ld + k]);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[r][j] = V::fma(weight, column[j], sum[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) V::store(acc + r * acc_ld + c + j * W, sum[r][j]);
    }
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
