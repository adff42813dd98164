// What the kernels' building blocks of one ISA do, as plain functions on memory.
//
// The headers under csrc/cpu/simd, gemm and kernel only compile for a chosen ISA. Tests
// and GoogleTest stay on the baseline target: they call these functions, which the files
// in isa/ define, once per ISA, from probe_impl.h. Vectors travel as arrays of `width`.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "cpu/api.h"

namespace fae::cpu::probe {

// Moves between lanes and one storage type; null where an ISA's vector has no such load.
template <class Real, class S>
struct StorageProbe {
  void (*load)(const S* p, Real* lanes) = nullptr;
  void (*load_n)(const S* p, int n, Real* lanes) = nullptr;
  void (*store)(S* p, const Real* lanes) = nullptr;
  void (*store_n)(S* p, const Real* lanes, int n) = nullptr;
};

// The vector contract of cpu/simd/vec.h.
template <class Real>
struct VecProbe {
  using Unary = void (*)(const Real* x, Real* result);
  using Binary = void (*)(const Real* a, const Real* b, Real* result);
  using Ternary = void (*)(const Real* a, const Real* b, const Real* c, Real* result);
  // result = where a (compares to) b: x, else y
  using Compare = void (*)(const Real* a, const Real* b, const Real* x, const Real* y, Real* result);

  int width, tile_rows, tile_vecs;
  StorageProbe<Real, Real> own;
  StorageProbe<Real, BFloat16> bf16;
  StorageProbe<Real, Float16> f16;
  Binary add, sub, mul, div, max;
  Ternary fma;
  Compare less, equal;
  void (*bytes_set)(const uint8_t* p, int n, const Real* x, const Real* y, Real* result);
  Unary exp2, tanh;
  Real (*reduce_max)(const Real* x);
  Real (*reduce_add)(const Real* x);
  void (*reduce_each)(const Real* block, Real* sums);  // of the rows of [width][width]
  void (*transpose)(Real* block);                      // [width][width], in place
};

// A tile of scores as cpu/kernel/score_tile.h reads it; at most kMaxRows rows.
struct Row { int64_t head, query; };
template <class Real>
struct Tile {
  Real* s;  // [row_count][ld]
  int64_t ld, k_begin, keys, columns;
  const Row* rows;
  int row_count;
};
constexpr int kMaxRows = 16;

template <class Real>
struct ScoreProbe {
  void (*finish)(const Problem& p, int64_t b, bool partial, bool masked, const Tile<Real>& tile,
                 Real* scratch, Real* slope, int64_t slope_ld);
  TileClass (*classify_mask)(const View4& mask, int64_t b, const Row* rows, int row_count, int64_t k_begin,
                             int64_t k_end);
  Row (*row_ref)(int64_t row, int64_t head_kv, int64_t group);
};

enum class Update { kStore, kAdd };

// Arguments of the micro-kernel; strides count operands, depth counts steps of `pair`.
template <class Real, class Operand>
struct TileProduct {
  int64_t depth;
  const Operand* a;
  int64_t a_row, a_depth;
  const Operand* b;
  int64_t ldb;
  Real* c;
  int64_t ldc;
  int64_t first;  // steps of the sum that lie before
};

// A matrix that is packed: element (r, c) at data[r * row + c * column].
template <class S>
struct Source {
  const S* data;
  int64_t row, column;
};

// Packing, the micro-kernel and the softmax of one product and one storage type.
template <class Real, class Operand, class S>
struct ProductProbe {
  const char* name;
  int width, tile_rows, tile_vecs, pair;
  int depth;     // operands are padded to multiples of so many contraction elements
  int columns;   // scores come in multiples of so many
  bool strided;  // rows of A may have their elements apart
  int64_t panel;
  int64_t (*panel_operands)(int64_t columns, int64_t depth);
  void (*pack_transposed)(Source<S> src, int64_t n, int64_t depth, Operand* dst);
  bool (*pack_rows)(Source<S> src, int64_t depth, int64_t n, Operand* dst);
  void (*pack_operand)(Source<S> src, int64_t n, int64_t depth, Operand* dst);
  void (*clear_packed_row)(Operand* dst, int64_t depth, int64_t n, int64_t k);
  int64_t (*find_special_rows)(Source<S> src, int64_t n, int64_t columns, int64_t* indices);
  void (*store_row)(S* p, int64_t stride, const Real* lanes, int n);
  void (*multiply)(Update update, int rows, int vecs, const TileProduct<Real, Operand>& args);
  Real (*softmax_row)(const Real* s, int64_t columns, Real exponent_scale, Real* max, Real* sum, Operand* p);
};

struct IsaProbe {
  Isa isa;
  VecProbe<float> f32;
  VecProbe<double> f64;
  ScoreProbe<float> score32;
  ScoreProbe<double> score64;
  ProductProbe<float, float, Float16> from_f16;
  ProductProbe<float, float, BFloat16> from_bf16;
  ProductProbe<float, float, float> from_f32;
  ProductProbe<double, double, double> from_f64;
  const ProductProbe<float, BFloat16, BFloat16>* bf16_dot;  // null where there is no such product
};

// Defined where the ISA is compiled in.
const IsaProbe& scalar_probe();
const IsaProbe& avx2_probe();
const IsaProbe& avx512_probe();
const IsaProbe& avx512bf16_probe();
const IsaProbe& amx_probe();
const IsaProbe& neon_probe();

inline const IsaProbe& probe_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2: return avx2_probe();
    case Isa::kAvx512: return avx512_probe();
    case Isa::kAvx512Bf16: return avx512bf16_probe();
    case Isa::kAmx: return amx_probe();
#elif defined(__aarch64__)
    case Isa::kNeon: return neon_probe();
#endif
    default: return scalar_probe();
  }
}

// fn(probe) for each vector type, or each product, of an ISA.
template <class Fn>
void for_each_vec(const IsaProbe& isa, Fn&& fn) {
  fn(isa.f32);
  fn(isa.f64);
}
template <class Fn>
void for_each_product(const IsaProbe& isa, Fn&& fn) {
  fn(isa.from_f16);
  fn(isa.from_bf16);
  fn(isa.from_f32);
  fn(isa.from_f64);
  if (isa.bf16_dot) fn(*isa.bf16_dot);
}

}  // namespace fae::cpu::probe
