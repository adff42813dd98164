// From dot products to scores: score modifiers, bias, band, lengths and bool mask on
// one register tile of rows, shared by forward, backward and the bias gradient.
#pragma once

#include "core/problem.h"
#include "cpu/simd/tanh.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// One packed query row (see Problem::packed_rows).
struct RowRef {
  int64_t head;   // query head
  int64_t query;  // position in seq_q
};

inline RowRef row_ref(int64_t row, int64_t head_kv, int64_t group) {
  const int64_t query = row / group;
  return {head_kv * group + (row - query * group), query};
}

// The C++ type of lse_dtype().
template <class S> struct LseType { using Type = float; };
template <> struct LseType<float> { using Type = double; };
template <> struct LseType<double> { using Type = double; };

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

// What a tile of the bool mask says about (rows) x (keys), without reading scores.
inline TileClass classify_mask(const View4& mask, int64_t b, const RowRef* rows, int row_count,
                               int64_t k_begin, int64_t k_end) {
  bool any_visible = false, any_hidden = false;
  const uint8_t* previous = nullptr;
  for (int r = 0; r < row_count && !(any_visible && any_hidden); ++r) {
    const auto* p = static_cast<const uint8_t*>(mask.data) + mask.offset(b, rows[r].head, rows[r].query) +
                    k_begin * mask.stride[3];
    if (p == previous) continue;  // broadcast over queries
    previous = p;
    if (mask.stride[3] == 0) {
      (*p ? any_visible : any_hidden) = true;
      continue;
    }
    int64_t j = 0;
    const int64_t n = k_end - k_begin;
    if (mask.stride[3] == 1) {
      for (; j + 8 <= n; j += 8) {
        uint64_t bytes;
        memcpy(&bytes, p + j, 8);
        any_visible |= bytes != 0;
        any_hidden |= bytes != 0x0101010101010101ull;
      }
    }
    for (; j < n; ++j) (p[j * mask.stride[3]] ? any_visible : any_hidden) = true;
  }
  return !any_visible ? TileClass::kSkip : any_hidden ? TileClass::kPartial : TileClass::kFull;
}

// A bias of any dtype in the arithmetic type. A finite value stays finite: only -inf hides.
template <class Real>
inline Real bias_value(const void* data, DType dtype, int64_t index) {
  const double x = load_as_double(data, dtype, index);
  if (sizeof(Real) == 4 && __builtin_isfinite(x)) {
    constexpr double kLargest = 3.4028234663852886e+38;
    return Real(x < -kLargest ? -kLargest : x > kLargest ? kLargest : x);
  }
  return Real(x);
}

// n bias values of one row, widened; points into the bias itself where that needs no
// conversion, else into `scratch`.
template <class V>
const typename V::Elem* bias_row(const View4& bias, DType dtype, int64_t offset, int64_t n,
                                 typename V::Elem* scratch) {
  using Real = typename V::Elem;
  const int64_t stride = bias.stride[3];
  if (stride == 1 && dtype == DTypeOf<Real>::value) return static_cast<const Real*>(bias.data) + offset;
  if constexpr (sizeof(Real) == 4) {
    if (stride == 1 && dtype != DType::kFloat64) {
      const auto* p = static_cast<const uint16_t*>(bias.data) + offset;
      for (int64_t j = 0; j < n; j += V::kWidth) {
        const int lanes = int(n - j < V::kWidth ? n - j : V::kWidth);
        const auto x = dtype == DType::kBFloat16 ? V::load_n(reinterpret_cast<const BFloat16*>(p) + j, lanes)
                                                 : V::load_n(reinterpret_cast<const Float16*>(p) + j, lanes);
        V::store_n(scratch + j, x, lanes);
      }
      return scratch;
    }
  }
  if (stride == 0) {
    const Real x = bias_value<Real>(bias.data, dtype, offset);
    for (int64_t j = 0; j < n; ++j) scratch[j] = x;
  } else {
    for (int64_t j = 0; j < n; ++j) scratch[j] = bias_value<Real>(bias.data, dtype, offset + j * stride);
  }
  return scratch;
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
  const RowRef* rows;
  int row_count;
};

// Hides the columns of row r outside keys [begin, end), given relative to the tile.
template <class V>
FAE_INLINE void hide_outside(typename V::Elem* row, int64_t begin, int64_t end, int64_t columns) {
  const auto hidden = V::set1(typename V::Elem(-__builtin_inf()));
  int64_t j = 0;
  for (; j + V::kWidth <= begin; j += V::kWidth) V::store(row + j, hidden);
  if (j < begin) V::store_n(row + j, hidden, int(begin - j));
  for (j = end; j < columns && j % V::kWidth != 0; ++j) row[j] = typename V::Elem(-__builtin_inf());
  for (; j < columns; j += V::kWidth) V::store(row + j, hidden);
}

// Scale, softcap and bias in place. `slope`, if given, receives d score / d (scale * dot)
// as [rows][slope_ld]. `scratch` holds `columns` values.
template <class V>
void modify_scores(const Problem& p, int64_t b, const ScoreTile<V>& tile, typename V::Elem* slope,
                   int64_t slope_ld, typename V::Elem* scratch) {
  using Real = typename V::Elem;
  using Reg = typename V::Reg;
  const ScoreMod& mod = p.score;
  const Reg scale = V::set1(Real(mod.scale));
  const Reg cap = V::set1(Real(mod.softcap)), inverse_cap = V::set1(Real(1.0 / mod.softcap));
  const Reg hidden = V::set1(Real(-__builtin_inf()));
  const Real* previous = nullptr;
  int64_t previous_offset = -1;
  for (int r = 0; r < tile.row_count; ++r) {
    Real* s = tile.s + r * tile.ld;
    const Real* bias = nullptr;
    if (mod.bias.present()) {
      const int64_t offset =
          mod.bias.offset(b, tile.rows[r].head, tile.rows[r].query) + tile.k_begin * mod.bias.stride[3];
      if (offset != previous_offset) {
        previous = bias_row<V>(mod.bias, mod.bias_dtype, offset, tile.keys, scratch);
        previous_offset = offset;
      }
      bias = previous;
    }
    for (int64_t j = 0; j < tile.keys; j += V::kWidth) {
      Reg x = V::mul(V::load(s + j), scale);
      if (mod.softcap > 0) {
        const Reg t = tanh<V>(V::mul(x, inverse_cap));
        x = V::mul(cap, t);
        if (slope) V::store(slope + r * slope_ld + j, V::sub(V::set1(Real(1)), V::mul(t, t)));
      }
      if (bias) {
        const int lanes = int(tile.keys - j < V::kWidth ? tile.keys - j : V::kWidth);
        const Reg y = lanes == V::kWidth ? V::load(bias + j) : V::load_n(bias + j, lanes);
        // -inf hides whatever the score is, NaN included.
        x = V::select(V::equal(y, hidden), hidden, V::add(x, y));
      }
      V::store(s + j, x);
    }
  }
}

template <class V>
void apply_mask(const View4& mask, int64_t b, const ScoreTile<V>& tile) {
  using Real = typename V::Elem;
  const auto hidden = V::set1(Real(-__builtin_inf()));
  for (int r = 0; r < tile.row_count; ++r) {
    Real* s = tile.s + r * tile.ld;
    const auto* m = static_cast<const uint8_t*>(mask.data) +
                    mask.offset(b, tile.rows[r].head, tile.rows[r].query) + tile.k_begin * mask.stride[3];
    if (mask.stride[3] == 1) {
      for (int64_t j = 0; j < tile.keys; j += V::kWidth) {
        const int lanes = int(tile.keys - j < V::kWidth ? tile.keys - j : V::kWidth);
        V::store(s + j, V::select(V::bytes_set(m + j, lanes), V::load(s + j), hidden));
      }
    } else {
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (!m[j * mask.stride[3]]) s[j] = Real(-__builtin_inf());
      }
    }
  }
}

// Everything between dot product and softmax. `partial`: the band or a length cuts the
// tile; `masked`: its part of the bool mask is mixed.
template <class V>
FAE_INLINE void finish_scores(const Problem& p, int64_t b, int64_t kv_length, bool partial, bool masked,
                              const ScoreTile<V>& tile, typename V::Elem* scratch,
                              typename V::Elem* slope = nullptr, int64_t slope_ld = 0) {
  if (!p.score.is_plain()) modify_scores<V>(p, b, tile, slope, slope_ld, scratch);
  if (masked) apply_mask<V>(p.masking.mask, b, tile);
  if (!partial && tile.keys == tile.columns) return;
  for (int r = 0; r < tile.row_count; ++r) {
    const int64_t i = tile.rows[r].query;
    const KeyRange seen = visible_keys(p.masking.band, kv_length, i, i + 1);
    int64_t begin = seen.begin - tile.k_begin, end = seen.end - tile.k_begin;
    if (end > tile.keys) end = tile.keys;
    if (begin < 0) begin = 0;
    if (end <= begin) begin = end = 0;
    hide_outside<V>(tile.s + r * tile.ld, begin, end, tile.columns);
  }
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
