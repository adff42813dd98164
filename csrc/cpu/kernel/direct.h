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
  static constexpr int64_t kAheadBytes = 16 << 10;  // that are fetched early; measured flat from 8 KiB
  static constexpr int64_t kLine = int64_t(64 / sizeof(S));  // elements of a cache line

 public:
  static constexpr int64_t kChunk = int64_t(W) * P::kPair;  // elements of a key per register

  // Keys or values, whose elements lie side by side, and how far from each of them lies what is fetched
  // early.
  struct Rows {
    const S* data;
    int64_t row, ahead;
    FAE_INLINE Rows(const SourceRows<S>& rows, int64_t ahead_)
        : data(rows.data), row(rows.row), ahead(ahead_) {}
    FAE_INLINE Rows from_row(int64_t r) const {
      Rows rows = *this;
      rows.data += r * row;
      return rows;
    }
  };

  // Rows of so many columns that are fetched early.
  static int64_t rows_ahead(int64_t columns) { return 1 + kAheadBytes / (columns * int64_t(sizeof(S))); }

  // Copies n rows to `to`, [n][columns], but zeros in the place of those that sees(i) denies: multiplied by a
  // weight of 0, a NaN would be seen all the same.
  template <class Sees>
  static void copy_seen(const Rows& rows, int64_t n, int64_t columns, Sees&& sees, S* to) {
    for (int64_t i = 0; i < n; ++i, to += columns) {
      if (sees(i)) __builtin_memcpy(to, rows.data + i * rows.row, size_t(columns) * sizeof(S));
      else __builtin_memset(to, 0, size_t(columns) * sizeof(S));
    }
  }

  // Queries as score() takes them: rows that it takes together lie side by side, chunk by chunk.
  // q: [rows][q_ld], 0 up to whole chunks; out: as many operands as rows of whole chunks have.
  static void arrange(const Operand* q, int64_t q_ld, int rows, int64_t dim, Operand* out) {
    for (int first = 0; first < rows; first += kGroup) {
      const int last = rows - first < kGroup ? rows : first + kGroup;
      for (int64_t c = 0; c < dim; c += kChunk) {
        for (int r = first; r < last; ++r, out += kChunk)
          __builtin_memcpy(out, q + r * q_ld + c, kChunk * sizeof(Operand));
      }
    }
  }

  // s[r][j] = q[r] . keys[j] for `rows` arranged rows and n keys. Writes whole vectors.
  static void score(const Operand* q, int rows, const Rows& keys, int64_t n, int64_t dim, Real* s,
                    int64_t ld) {
    const int64_t row = round_up(dim, kChunk);
    for (int64_t j = 0; j < n; j += W) {
      const int count = int(n - j < W ? n - j : W);
      for (int r = 0; r < rows; r += kGroup) {
        const int group = rows - r < kGroup ? rows - r : kGroup;
        score_fn<kGroup>(group, dim)(q + r * row, keys.from_row(j), count, dim, s + r * ld + j, ld);
      }
    }
  }

  static constexpr int64_t kLongestSum = P::kLongestSum;

  // acc[r] = alpha[r] acc[r] + sum_j p[r][j] values[j]; acc: [rows][acc_ld], whole vectors. p[r] is read up
  // to whole pairs, and finite there. Long sums are taken in pieces; see multiply_tile(). Without alpha the
  // sum goes on from acc, at most to the end of its piece.
  static void accumulate(const Operand* p, int64_t p_ld, int rows, const Real* alpha, const Rows& values,
                         int64_t n, int64_t dim_v, Real* acc, int64_t acc_ld) {
    Real one[kGroup];
    for (int r = 0; r < kGroup; ++r) one[r] = 1;
    for (int64_t k = 0; k < n; k += kLongestSum) {
      const int64_t count = n - k < kLongestSum ? n - k : kLongestSum;
      for (int r = 0; r < rows; r += kGroup) {
        const int group = rows - r < kGroup ? rows - r : kGroup;
        const Real* const factors = !alpha ? nullptr : k == 0 ? alpha + r : one;
        add_fn<kGroup>(group)(p + r * p_ld + k, p_ld, factors, values.from_row(k), count, dim_v,
                              acc + r * acc_ld, acc_ld);
      }
    }
  }

 private:
  // Sums that fit the registers, and rows that are taken together.
  static constexpr int kSums = V::kTileRows * V::kTileVecs;
  static constexpr int kMostRows = kSums >= 24 ? 8 : 4;
  static constexpr int kGroup = kMostRows < W ? kMostRows : W;
  // Fewer take keys one by one, in their order in memory; more take two for each row that is loaded.
  static constexpr int kFewRows = 4;
  // Keys so short that transposing their few registers, once, costs less than summing across lanes for each
  // row.
  static constexpr int64_t short_keys(int rows) {
    return (rows > kMostRows / 2 ? 4 : rows > 1 ? 2 : 0) * kChunk;
  }
  // Pairs of registers of values, or single ones, that are taken together.
  static constexpr int at_a_time(int rows) {
    const int vecs = kSums / rows < 8 ? kSums / rows : 8;
    return vecs < P::kPair ? 1 : vecs / P::kPair;
  }

  using ScoreFn = void (*)(const Operand*, const Rows&, int, int64_t, Real*, int64_t);
  using AddFn = void (*)(const Operand*, int64_t, const Real*, const Rows&, int64_t, int64_t, Real*, int64_t);
  template <int kRows>
  static FAE_INLINE ScoreFn score_fn(int rows, int64_t dim) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return score_fn<kRows - 1>(rows, dim);
    }
    return dim <= short_keys(kRows) ? &score_transposed<kRows> : &score_vector<kRows>;
  }
  template <int kRows>
  static FAE_INLINE AddFn add_fn(int rows) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return add_fn<kRows - 1>(rows);
    }
    return &add_columns<kRows>;
  }

  // Early, into the second level: one read after the other, as processors expect it.
  static FAE_INLINE void fetch(const S* p) { __builtin_prefetch(p, 0, 2); }

  // Up to one vector of keys, as they lie: sums by lanes for as many as fill a vector with their scores, then
  // across lanes for all of these together.
  template <int kRows>
  static void score_vector(const Operand* q, const Rows& keys, int count, int64_t dim, Real* s, int64_t ld) {
    constexpr int kKeys = W / kRows, kPaired = kRows < kFewRows ? 0 : kKeys / 2 * 2;
    Real sums[kRows == 1 ? W : W * kRows + W];  // [key][row]
    Reg part[W];
    if (count < W || W % kRows != 0) {
      for (int i = 0; i < int(sizeof(sums) / sizeof(Real)); i += W) V::store(sums + i, V::zero());
    }
#pragma GCC unroll 16
    for (int i = kKeys * kRows; i < W; ++i) part[i] = V::zero();
    for (int first = 0; first < count; first += kKeys) {
#pragma GCC unroll 16
      for (int k = 0; k < kPaired; k += 2)
        sum_lanes<kRows, 2>(q, keys, first + k, count, dim, part + k * kRows);
#pragma GCC unroll 16
      for (int k = kPaired; k < kKeys; ++k)
        sum_lanes<kRows, 1>(q, keys, first + k, count, dim, part + k * kRows);
      V::store(sums + first * kRows, V::reduce_each(part));
    }
    if constexpr (kRows == 1) {
      V::store(s, V::load(sums));
    } else {
      Reg columns[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) columns[k] = V::load(sums + k * kRows);
      V::transpose(columns);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) V::store(s + r * ld, columns[r]);
    }
  }

  // The same, with keys side by side in the lanes.
  template <int kRows>
  static void score_transposed(const Operand* q, const Rows& keys, int count, int64_t dim, Real* s,
                               int64_t ld) {
    Reg acc[kRows], elements[W];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[r] = V::zero();
    for (int64_t c = 0; c < dim; c += kChunk, q += kRows * kChunk) {
      if (c % kLine == 0) {
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) fetch(keys.data + k * keys.row + keys.ahead + c);
      }
      if (dim - c < kChunk) load_keys<false>(keys, count, c, dim - c, elements);
      else load_keys<true>(keys, count, c, kChunk, elements);
      V::transpose(elements);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          acc[r] = P::multiply_add(acc[r], P::broadcast(q + r * kChunk + i * P::kPair), elements[i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) V::store(s + r * ld, acc[r]);
  }
  template <bool kWhole>
  static FAE_INLINE void load_keys(const Rows& keys, int count, int64_t c, int64_t n, Reg* to) {
#pragma GCC unroll 16
    for (int k = 0; k < W; ++k)
      to[k] = load_chunk<kWhole>(keys.data + (k < count ? k : count - 1) * keys.row + c, n);
  }

  // One register of a key or value, all of it or n elements.
  template <bool kWhole>
  static FAE_INLINE Reg load_chunk(const S* key, int64_t n) {
    if constexpr (P::kPair == 2) return kWhole ? P::load(key) : P::load_pairs(key, int(n));
    else return kWhole ? V::load(key) : V::load_n(key, int(n));
  }

  // sum[k][r] = products of row r with key first + k, or the last, to be summed over their lanes.
  template <int kRows, int kKeys>
  static FAE_INLINE void sum_lanes(const Operand* q, const Rows& keys, int first, int count, int64_t dim,
                                   Reg* sum) {
    static_assert(kLine % kChunk == 0);
    const S* key[kKeys];
    Reg acc[kKeys * kRows];
#pragma GCC unroll 2
    for (int k = 0; k < kKeys; ++k)
      key[k] = keys.data + (first + k < count ? first + k : count - 1) * keys.row;
#pragma GCC unroll 16
    for (int i = 0; i < kKeys * kRows; ++i) acc[i] = V::zero();
    // Past the last key nothing is read; an address that does not exist is no harm.
    int64_t c = 0;
    for (; c + kLine <= dim; c += kLine) {
#pragma GCC unroll 2
      for (int k = 0; k < kKeys; ++k) fetch(key[k] + keys.ahead + c);
#pragma GCC unroll 4
      for (int64_t chunk = 0; chunk < kLine; chunk += kChunk)
        add_chunk<kRows, kKeys, true>(q + (c + chunk) * kRows, key, c + chunk, kChunk, acc);
    }
    if (c < dim) {
#pragma GCC unroll 2
      for (int k = 0; k < kKeys; ++k) fetch(key[k] + keys.ahead + c);
    }
    for (; c + kChunk <= dim; c += kChunk) add_chunk<kRows, kKeys, true>(q + c * kRows, key, c, kChunk, acc);
    if (c < dim) add_chunk<kRows, kKeys, false>(q + c * kRows, key, c, dim - c, acc);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys * kRows; ++i) sum[i] = acc[i];
  }

  // One register of each key from element c, all of it or n elements, times that of each row.
  template <int kRows, int kKeys, bool kWhole>
  static FAE_INLINE void add_chunk(const Operand* q, const S* const* key, int64_t c, int64_t n, Reg* acc) {
    Reg column[kKeys];
#pragma GCC unroll 2
    for (int k = 0; k < kKeys; ++k) column[k] = load_chunk<kWhole>(key[k] + c, n);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Reg row = P::load(q + r * kChunk);
#pragma GCC unroll 2
      for (int k = 0; k < kKeys; ++k)
        acc[k * kRows + r] = P::multiply_add(acc[k * kRows + r], row, column[k]);
    }
  }

  // Columns are taken in passes of about the same width: one of a single vector would wait for its sums.
  template <int kRows>
  static void add_columns(const Operand* p, int64_t p_ld, const Real* alpha, const Rows& values, int64_t n,
                          int64_t dim_v, Real* acc, int64_t acc_ld) {
    constexpr int kUnits = at_a_time(kRows);
    int64_t c = 0;
    for (int64_t units = dim_v / kChunk; units > 0;) {
      const int64_t passes = (units + kUnits - 1) / kUnits, width = (units + passes - 1) / passes;
      add_pass<kRows, kUnits>(int(width), p, p_ld, alpha, values, n, c, dim_v, acc, acc_ld);
      c += width * kChunk;
      units -= width;
    }
    if (c + W < dim_v) {
      add_block<kRows, P::kPair, false>(p, p_ld, alpha, values, n, c, dim_v, acc, acc_ld);
    } else if (c < dim_v) {
      add_block<kRows, 1, false>(p, p_ld, alpha, values, n, c, dim_v, acc, acc_ld);
    }
  }

  template <int kRows, int kUnits>
  static FAE_INLINE void add_pass(int units, const Operand* p, int64_t p_ld, const Real* alpha,
                                  const Rows& values, int64_t n, int64_t c, int64_t dim_v, Real* acc,
                                  int64_t acc_ld) {
    if constexpr (kUnits > 1) {
      if (units < kUnits) {
        return add_pass<kRows, kUnits - 1>(units, p, p_ld, alpha, values, n, c, dim_v, acc, acc_ld);
      }
    }
    add_block<kRows, kUnits * P::kPair, true>(p, p_ld, alpha, values, n, c, dim_v, acc, acc_ld);
  }

  // Columns [c, c + kVecs W) of the sums; or, when not whole, those up to dim_v.
  template <int kRows, int kVecs, bool kWhole>
  static FAE_INLINE void add_block(const Operand* p, int64_t p_ld, const Real* alpha, const Rows& values,
                                   int64_t n, int64_t c, int64_t dim_v, Real* acc, int64_t acc_ld) {
    Reg sum[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[r][j] = alpha ? V::zero() : V::load(acc + r * acc_ld + c + j * W);
    }
    // The first pass fetches for all.
    const int64_t fetched = c == 0 ? dim_v : 0;
    const int lanes = int(dim_v - c);
    const S* value = values.data + c;
    int64_t k = 0;
    for (; k + P::kPair <= n; k += P::kPair) {
      for (int i = 0; i < P::kPair; ++i) {
        for (int64_t x = 0; x < fetched; x += kLine) fetch(value + i * values.row + values.ahead + x);
      }
      Reg column[kVecs];
      load_values<kVecs, kWhole, false>(value, values.row, lanes, column);
      add_weighted<kRows, kVecs>(p + k, p_ld, column, sum);
      value += P::kPair * values.row;
    }
    if constexpr (P::kPair > 1) {
      if (k < n) {
        Reg column[kVecs];
        load_values<kVecs, kWhole, true>(value, values.row, lanes, column);
        add_weighted<kRows, kVecs>(p + k, p_ld, column, sum);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        Real* const to = acc + r * acc_ld + c + j * W;
        V::store(to, alpha ? V::fma(V::set1(alpha[r]), V::load(to), sum[r][j]) : sum[r][j]);
      }
    }
  }

  // Values of one key, or of two as pairs, the second of which may be missing.
  template <int kVecs, bool kWhole, bool kLast>
  static FAE_INLINE void load_values(const S* value, int64_t row, int lanes, Reg* column) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; j += P::kPair) {
      if constexpr (P::kPair == 1) {
        column[j] = load_chunk<kWhole>(value + j * W, lanes);
      } else {
        const S* const at = value + j * W;
        const Reg even = load_chunk<kWhole>(at, lanes);
        const Reg odd = kLast ? V::zero() : load_chunk<kWhole>(at + row, lanes);
        Reg unused;
        P::interleave(even, odd, column + j, j + 1 < kVecs ? column + j + 1 : &unused);
      }
    }
  }

  template <int kRows, int kVecs>
  static FAE_INLINE void add_weighted(const Operand* p, int64_t p_ld, const Reg* column, Reg (*sum)[kVecs]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Reg weight = P::broadcast(p + r * p_ld);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[r][j] = P::multiply_add(sum[r][j], weight, column[j]);
    }
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
