// From dot products to scores: score modifiers, bias, ALiBi and masks on one register
// tile of rows, shared by forward, backward and the bias gradient.
#pragma once

#include "cpu/kernel/mask_tile.h"
#include "cpu/simd/tanh.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// The constants of a score, in the arithmetic type. Plain scores stay dot products:
// log2(e) * scale then moves into the exponent (`exponent_scale`).
template <class Real>
struct ScoreScale {
  bool plain;
  Real natural;         // score = natural * value in the tile
  Real exponent_scale;  // exp(score) = 2^(exponent_scale * value in the tile)
  explicit ScoreScale(const ScoreMod& mod)
      : plain(mod.is_plain()),
        natural(plain ? Real(mod.scale) : Real(1)),
        exponent_scale(Real(double(natural) * 1.4426950408889634)) {}
};

// A bias in the arithmetic type. A finite value stays finite: only -inf hides.
template <class Real>
inline Real bias_value(double x) {
  if (sizeof(Real) == 4 && __builtin_isfinite(x)) {
    constexpr double kLargest = 3.4028234663852886e+38;
    return Real(x < -kLargest ? -kLargest : x > kLargest ? kLargest : x);
  }
  return Real(x);
}

// n elements `stride` apart in the arithmetic type.
template <class V, class T>
void widen_row(const T* from, int64_t stride, int64_t n, typename V::Elem* to) {
  using Real = typename V::Elem;
  constexpr int W = V::kWidth;
  if constexpr (sizeof(Real) == 4 && sizeof(T) <= 4) {
    T lanes[W];
    for (int64_t j = 0; j < n; j += W) {
      const int count = int(n - j < W ? n - j : W);
      const T* at = from + j * stride;
      if (stride != 1) {
        for (int i = 0; i < count; ++i) lanes[i] = at[i * stride];
        at = lanes;
      }
      if (count == W) V::store(to + j, V::load(at));
      else V::store_n(to + j, V::load_n(at, count), count);
    }
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = bias_value<Real>(double(to_float(from[j * stride])));
  }
}

// n bias values of one row, widened; points into the bias itself where that needs no
// conversion, else into `scratch`.
template <class V>
const typename V::Elem* bias_row(const View4& bias, DType dtype, int64_t offset, int64_t n,
                                 typename V::Elem* scratch) {
  using Real = typename V::Elem;
  const int64_t stride = bias.stride[3];
  if (stride == 1 && dtype == DTypeOf<Real>::value) return static_cast<const Real*>(bias.data) + offset;
  if (stride == 0) {
    const Real x = bias_value<Real>(load_as_double(bias.data, dtype, offset));
    for (int64_t j = 0; j < n; ++j) scratch[j] = x;
    return scratch;
  }
  const auto widen = [&](const auto* data) { widen_row<V>(data + offset, stride, n, scratch); };
  switch (dtype) {
    case DType::kFloat16: widen(static_cast<const Float16*>(bias.data)); break;
    case DType::kBFloat16: widen(static_cast<const BFloat16*>(bias.data)); break;
    case DType::kFloat32: widen(static_cast<const float*>(bias.data)); break;
    case DType::kFloat64: widen(static_cast<const double*>(bias.data)); break;
    default: break;
  }
  return scratch;
}

// Fetches early what bias_row is to read for rows of keys [k_begin, k_begin + keys): every row of a full bias
// begins somewhere else, which processors don't foresee.
inline void fetch_bias(const ScoreMod& mod, int64_t b, const RowRef* rows, int row_count, int64_t k_begin,
                       int64_t keys) {
  if (!mod.bias.present()) return;
  const int64_t size = size_of(mod.bias_dtype), step = mod.bias.stride[3] * size;
  const int64_t each = step < 64 ? 64 : step, row_bytes = step == 0 ? 1 : keys * step;
  int64_t previous = -1;
  for (int r = 0; r < row_count; ++r) {
    const int64_t offset = mod.bias.offset(b, rows[r].head, rows[r].query) + k_begin * mod.bias.stride[3];
    if (offset == previous) continue;
    previous = offset;
    const char* const row = static_cast<const char*>(mod.bias.data) + offset * size;
    for (int64_t byte = 0; byte < row_bytes; byte += each) __builtin_prefetch(row + byte, 0, 2);
  }
}

// A register tile of scores: value (r, j) at s[r * ld + j] belongs to key k_begin + j.
template <class V>
struct ScoreTile {
  using Real = typename V::Elem;
  Real* s;
  int64_t ld;
  int64_t k_begin;
  int64_t keys;     // columns that are keys; up to `columns` is padding
  int64_t columns;  // whole vectors
  int64_t b;
  const RowRef* rows;
  int row_count;
};

// How far ALiBi finds the keys of a tile from a query: |i + seq_kv - seq_q - j|, by vectors.
template <class V>
class KeyDistance {
  using Real = typename V::Elem;

 public:
  KeyDistance(const Sequence& sequence, int64_t k_begin)
      : shift_(sequence.seq_kv - sequence.seq_q - k_begin) {
    for (int lane = 0; lane < V::kWidth; ++lane) lanes_[lane] = Real(lane);
  }
  // Of keys k_begin + j and the following.
  FAE_INLINE typename V::Reg at(int64_t query, int64_t j) const {
    const auto ahead = V::sub(V::load(lanes_), V::set1(Real(query + shift_ - j)));
    return V::max(ahead, V::sub(V::zero(), ahead));
  }

 private:
  int64_t shift_;
  Real lanes_[V::kWidth];
};

// Scale, softcap, bias and ALiBi in place. `slope`, if given, receives d score / d (scale * dot)
// as [rows][slope_ld]. `scratch` holds `columns` values.
template <class V>
void modify_scores(const Problem& p, const Sequence& sequence, const ScoreTile<V>& tile,
                   typename V::Elem* slope, int64_t slope_ld, typename V::Elem* scratch) {
  using Real = typename V::Elem;
  using Reg = typename V::Reg;
  const ScoreMod& mod = p.score;
  const Reg scale = V::set1(Real(mod.scale));
  const Reg cap = V::set1(Real(mod.softcap)), inverse_cap = V::set1(Real(1.0 / mod.softcap));
  const Reg hidden = V::set1(Real(-__builtin_inf()));
  const KeyDistance<V> distance(sequence, tile.k_begin);
  const Real* previous = nullptr;
  int64_t previous_offset = -1;
  for (int r = 0; r < tile.row_count; ++r) {
    Real* s = tile.s + r * tile.ld;
    const Real* bias = nullptr;
    if (mod.bias.present()) {
      const int64_t offset =
          mod.bias.offset(tile.b, tile.rows[r].head, tile.rows[r].query) + tile.k_begin * mod.bias.stride[3];
      if (offset != previous_offset) {
        previous = bias_row<V>(mod.bias, mod.bias_dtype, offset, tile.keys, scratch);
        previous_offset = offset;
      }
      bias = previous;
    }
    const Reg fall = V::set1(mod.alibi.present() ? Real(-mod.alibi.at(tile.b, tile.rows[r].head)) : Real(0));
    // -inf hides whatever the score is, NaN included.
    const auto with_bias = [hidden](Reg x, Reg y) {
      return V::select(V::equal(y, hidden), hidden, V::add(x, y));
    };
    int64_t j = 0;
    if (bias && !(mod.softcap > 0) && !mod.alibi.present()) {
      for (; j + V::kWidth <= tile.keys; j += V::kWidth) {
        V::store(s + j, with_bias(V::mul(V::load(s + j), scale), V::load(bias + j)));
      }
    }
    for (; j < tile.keys; j += V::kWidth) {
      Reg x = V::mul(V::load(s + j), scale);
      if (mod.softcap > 0) {
        const Reg t = tanh<V>(V::mul(x, inverse_cap));
        x = V::mul(cap, t);
        if (slope) V::store(slope + r * slope_ld + j, V::sub(V::set1(Real(1)), V::mul(t, t)));
      }
      if (mod.alibi.present()) x = V::fma(fall, distance.at(tile.rows[r].query, j), x);
      if (bias) {
        const int lanes = int(tile.keys - j < V::kWidth ? tile.keys - j : V::kWidth);
        x = with_bias(x, lanes == V::kWidth ? V::load(bias + j) : V::load_n(bias + j, lanes));
      }
      V::store(s + j, x);
    }
  }
}

// Everything between dot product and softmax. `partial`: the band or a length cuts the tile.
template <class V>
FAE_INLINE void finish_scores(const Problem& p, const Sequence& sequence, bool partial, const TileMask& mask,
                              const ScoreTile<V>& tile, typename V::Elem* scratch,
                              typename V::Elem* slope = nullptr, int64_t slope_ld = 0) {
  if (!p.score.is_plain()) modify_scores<V>(p, sequence, tile, slope, slope_ld, scratch);
  if (mask.by_mask || mask.by_intervals) {
    const Masking& m = p.masking;
    for (int r = 0; r < tile.row_count; ++r) {
      const RowRef& row = tile.rows[r];
      typename V::Elem* s = tile.s + r * tile.ld;
      if (mask.by_mask)
        apply_mask_row<V>(m.mask, m.mask.row(tile.b, row.head, row.query), tile.k_begin, tile.keys, s);
      if (mask.by_intervals) apply_intervals_row(m.intervals, tile.b, row.query, tile.k_begin, tile.keys, s);
    }
  }
  if (!partial && tile.keys == tile.columns) return;
  for (int r = 0; r < tile.row_count; ++r) {
    const int64_t i = tile.rows[r].query;
    const KeyRange seen = visible_keys(sequence.band, sequence.kv_length, i, i + 1);
    int64_t begin = seen.begin - tile.k_begin, end = seen.end - tile.k_begin;
    if (end > tile.keys) end = tile.keys;
    if (begin < 0) begin = 0;
    if (end <= begin) begin = end = 0;
    hide_outside<V>(tile.s + r * tile.ld, begin, end, tile.columns);
  }
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
