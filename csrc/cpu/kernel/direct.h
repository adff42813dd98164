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
  static constexpr int64_t kAhead = 16;  // keys that are fetched early

 public:
  static constexpr int64_t kChunk = int64_t(W) * P::kPair;  // elements of a key per register

  // s[r][j] = q[r] . keys[j] for `rows` rows and n keys; q: [rows][dim], 0 up to whole chunks. Writes whole
  // vectors.
  static void score(const Operand* q, int64_t q_ld, int rows, SourceRows<S> keys, int64_t n, int64_t dim,
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
  static void accumulate(const Real* p, int64_t p_ld, int rows, const Real* alpha, SourceRows<S> values,
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

  using ScoreFn = void (*)(const Operand*, int64_t, SourceRows<S>, int, int64_t, Real*, int64_t);
  using AddFn = void (*)(const Real*, int64_t, const Real*, SourceRows<S>, int64_t, int64_t, Real*, int64_t);
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

  static FAE_INLINE Reg load_key(const S* p, int n) {
    if constexpr (P::kPair == 2) return P::load_pairs(p, n);
    else return n >= W ? V::load(p) : V::load_n(p, n);
  }

  // Up to one vector of keys: sums by lanes first, kKeys at a time, then across lanes for all together.
  template <int kRows, int kKeys>
  static void score_vector(const Operand* q, int64_t q_ld, SourceRows<S> keys, int count, int64_t dim,
                           Real* s, int64_t ld) {
    Reg part[kRows][W];
    for (int first = 0; first < W; first += kKeys) {
      if (first >= count) {
        for (int r = 0; r < kRows; ++r) {
          for (int k = first; k < W; ++k) part[r][k] = V::zero();
        }
        break;
      }
      const S* key[kKeys];
      Reg acc[kRows][kKeys];
#pragma GCC unroll 8
      for (int k = 0; k < kKeys; ++k) {
        key[k] = keys.data + (first + k < count ? first + k : count - 1) * keys.row;
        // Past the last key nothing is read; an address that does not exist is no harm.
        for (int64_t line = 0; line < dim; line += int64_t(64 / sizeof(S)))
          __builtin_prefetch(key[k] + kAhead * keys.row + line);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][k] = V::zero();
      }
      for (int64_t c = 0; c < dim; c += kChunk) {
        const int n = int(dim - c < kChunk ? dim - c : kChunk);
        Reg column[kKeys];
#pragma GCC unroll 8
        for (int k = 0; k < kKeys; ++k) column[k] = load_key(key[k] + c, n);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Reg row = P::load(q + r * q_ld + c);
#pragma GCC unroll 8
          for (int k = 0; k < kKeys; ++k) acc[r][k] = P::multiply_add(acc[r][k], row, column[k]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int k = 0; k < kKeys; ++k) {
          if (first + k < W) part[r][first + k] = acc[r][k];
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      V::transpose(part[r]);
#pragma GCC unroll 4
      for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 16
        for (int k = 0; k + step < W; k += 2 * step) part[r][k] = V::add(part[r][k], part[r][k + step]);
      }
      V::store(s + r * ld, part[r][0]);
    }
  }

  template <int kRows, int kVecs>
  static void add_columns(const Real* p, int64_t p_ld, const Real* alpha, SourceRows<S> values, int64_t n,
                          int64_t dim_v, Real* acc, int64_t acc_ld) {
    for (int64_t c = 0; c < dim_v; c += kVecs * W) {
      if (dim_v - c >= kVecs * W) add_block<kRows, kVecs>(p, p_ld, alpha, values, n, c, W, acc, acc_ld);
      else
        for (int64_t rest = c; rest < dim_v; rest += W) {
          const int lanes = int(dim_v - rest < W ? dim_v - rest : W);
          add_block<kRows, 1>(p, p_ld, alpha, values, n, rest, lanes, acc, acc_ld);
        }
    }
  }

  // Columns [c, c + kVecs W) of the sums, the last vector with `lanes` of its own.
  template <int kRows, int kVecs>
  static FAE_INLINE void add_block(const Real* p, int64_t p_ld, const Real* alpha, SourceRows<S> values,
                                   int64_t n, int64_t c, int lanes, Real* acc, int64_t acc_ld) {
    Reg sum[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j)
        sum[r][j] = V::mul(V::set1(alpha[r]), V::load(acc + r * acc_ld + c + j * W));
    }
    const S* value = values.data + c;
    for (int64_t k = 0; k < n; ++k, value += values.row) {
      Reg column[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        if constexpr (kVecs == 1) column[j] = lanes == W ? V::load(value) : V::load_n(value, lanes);
        else column[j] = V::load(value + j * W);
        if (j * W * sizeof(S) % 64 == 0) __builtin_prefetch(value + kAhead * values.row + j * W);
      }
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
