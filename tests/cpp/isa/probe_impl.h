// The functions of probe.h, for the ISA whose namespace and target the includer set.
#pragma once

#include "cpu/gemm/micro.h"
#include "cpu/gemm/pack.h"
#include "cpu/kernel/score_tile.h"
#include "cpu/kernel/softmax_tile.h"
#include "cpu/kernel/special_rows.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class V, class S>
struct StorageFunctions {
  using Real = typename V::Elem;
  static void load(const S* p, Real* lanes) { V::store(lanes, V::load(p)); }
  static void load_n(const S* p, int n, Real* lanes) { V::store(lanes, V::load_n(p, n)); }
  static void store(S* p, const Real* lanes) { V::store(p, V::load(lanes)); }
  static void store_n(S* p, const Real* lanes, int n) { V::store_n(p, V::load(lanes), n); }
  static constexpr probe::StorageProbe<Real, S> table() { return {&load, &load_n, &store, &store_n}; }
};

template <class V>
struct VecFunctions {
  using Real = typename V::Elem;
  using In = const Real*;
  static void add(In a, In b, Real* r) { V::store(r, V::add(V::load(a), V::load(b))); }
  static void sub(In a, In b, Real* r) { V::store(r, V::sub(V::load(a), V::load(b))); }
  static void mul(In a, In b, Real* r) { V::store(r, V::mul(V::load(a), V::load(b))); }
  static void div(In a, In b, Real* r) { V::store(r, V::div(V::load(a), V::load(b))); }
  static void max(In a, In b, Real* r) { V::store(r, V::max(V::load(a), V::load(b))); }
  static void fma(In a, In b, In c, Real* r) { V::store(r, V::fma(V::load(a), V::load(b), V::load(c))); }
  static void less(In a, In b, In x, In y, Real* r) {
    V::store(r, V::select(V::less(V::load(a), V::load(b)), V::load(x), V::load(y)));
  }
  static void equal(In a, In b, In x, In y, Real* r) {
    V::store(r, V::select(V::equal(V::load(a), V::load(b)), V::load(x), V::load(y)));
  }
  static void bytes_set(const uint8_t* p, int n, In x, In y, Real* r) {
    V::store(r, V::select(V::bytes_set(p, n), V::load(x), V::load(y)));
  }
  static void exp2(In x, Real* r) { V::store(r, V::exp2(V::load(x))); }
  static void tanh_of(In x, Real* r) { V::store(r, tanh<V>(V::load(x))); }
  static Real reduce_max(In x) { return V::reduce_max(V::load(x)); }
  static Real reduce_add(In x) { return V::reduce_add(V::load(x)); }
  static void reduce_each(const Real* block, Real* sums) {
    typename V::Reg rows[V::kWidth];
    for (int i = 0; i < V::kWidth; ++i) rows[i] = V::load(block + i * V::kWidth);
    V::store(sums, V::reduce_each(rows));
  }
  static void transpose(Real* block) {
    typename V::Reg rows[V::kWidth];
    for (int i = 0; i < V::kWidth; ++i) rows[i] = V::load(block + i * V::kWidth);
    V::transpose(rows);
    for (int i = 0; i < V::kWidth; ++i) V::store(block + i * V::kWidth, rows[i]);
  }

  static constexpr probe::VecProbe<Real> table() {
    probe::VecProbe<Real> t{};
    t.width = V::kWidth;
    t.tile_rows = V::kTileRows;
    t.tile_vecs = V::kTileVecs;
    t.own = StorageFunctions<V, Real>::table();
    if constexpr (sizeof(Real) == 4) {
      t.bf16 = StorageFunctions<V, BFloat16>::table();
      t.f16 = StorageFunctions<V, Float16>::table();
    }
    t.add = &add;
    t.sub = &sub;
    t.mul = &mul;
    t.div = &div;
    t.max = &max;
    t.fma = &fma;
    t.less = &less;
    t.equal = &equal;
    t.bytes_set = &bytes_set;
    t.exp2 = &exp2;
    t.tanh = &tanh_of;
    t.reduce_max = &reduce_max;
    t.reduce_add = &reduce_add;
    t.reduce_each = &reduce_each;
    t.transpose = &transpose;
    return t;
  }
};

template <class V>
struct ScoreFunctions {
  using Real = typename V::Elem;
  static void to_refs(const probe::Row* rows, int count, RowRef* refs) {
    for (int i = 0; i < count; ++i) refs[i] = {rows[i].head, rows[i].query};
  }
  static void finish(const Problem& p, int64_t b, bool partial, bool masked, const probe::Tile<Real>& tile,
                     Real* scratch, Real* slope, int64_t slope_ld) {
    RowRef refs[probe::kMaxRows];
    to_refs(tile.rows, tile.row_count, refs);
    const ScoreTile<V> t{tile.s, tile.ld, tile.k_begin, tile.keys, tile.columns, b, refs, tile.row_count};
    TileMask mask{tile.k_begin, tile.k_begin + tile.keys};
    mask.by_mask = masked && p.masking.mask.present();
    mask.by_intervals = masked && p.masking.intervals.present();
    finish_scores<V>(p, p.sequence(b), partial, mask, t, scratch, slope, slope_ld);
  }
  static TileClass mask_class(const View4& mask, int64_t b, const probe::Row* rows, int count,
                              int64_t k_begin, int64_t k_end) {
    RowRef refs[probe::kMaxRows];
    to_refs(rows, count, refs);
    return classify_mask(BoolMask{mask}, b, refs, count, k_begin, k_end);
  }
  static probe::Row ref(int64_t row, int64_t head_kv, int64_t group) {
    const RowRef r = row_ref(row, head_kv, group);
    return {r.head, r.query};
  }
  static constexpr probe::ScoreProbe<Real> table() { return {&finish, &mask_class, &ref}; }
};

template <class P, class S>
struct ProductFunctions {
  using V = typename P::Vec;
  using Real = typename V::Elem;
  using Operand = typename P::Operand;
  using Source = probe::Source<S>;
  static SourceRows<S> rows(Source s) { return {s.data, s.row, s.column}; }

  static int64_t operands(int64_t columns, int64_t depth) { return panel_operands<P>(columns, depth); }
  static void transposed(Source s, int64_t n, int64_t depth, Operand* dst) {
    pack_transposed<P>(rows(s), n, depth, dst);
  }
  static bool straight(Source s, int64_t depth, int64_t n, Operand* dst) {
    return pack_rows<P>(rows(s), depth, n, dst);
  }
  static void operand(Source s, int64_t n, int64_t depth, Operand* dst) {
    pack_operand<P>(rows(s), n, depth, dst);
  }
  static void clear(Operand* dst, int64_t depth, int64_t n, int64_t k) {
    clear_packed_row<P>(dst, depth, n, k);
  }
  static int64_t special(Source s, int64_t n, int64_t columns, int64_t* indices) {
    return find_special_rows(rows(s), n, columns, indices);
  }
  static void to_storage(S* p, int64_t stride, const Real* lanes, int n) {
    store_row<V>(p, stride, V::load(lanes), n);
  }
  static void multiply(probe::Update update, int row_count, int vecs,
                       const probe::TileProduct<Real, Operand>& t) {
    const typename P::Session session;
    const TileArgs<P> args{t.depth, t.a, t.a_row, t.a_depth, t.b, t.ldb, t.c, t.ldc, t.first};
    switch (update) {
      case probe::Update::kStore: multiply_tile<P, Update::kStore>(row_count, vecs, args); break;
      case probe::Update::kAdd: multiply_tile<P, Update::kAdd>(row_count, vecs, args); break;
    }
  }
  static Real softmax(const Real* s, int64_t columns, Real exponent_scale, Real* max, Real* sum, Operand* p) {
    if constexpr (P::kTiles) {
      return softmax_among_others(s, columns, exponent_scale, max, sum, p);
    } else {
      return softmax_row<P>(s, columns, exponent_scale, max, sum, p);
    }
  }

  static constexpr probe::ProductProbe<Real, Operand, S> table(const char* name) {
    return {name,       V::kWidth,   P::kTileRows, P::kTileVecs, P::kPair,  P::kDepth, int(kColumns<P>),
            !P::kTiles, kPanel<P>,   &operands,    &transposed,  &straight, &operand,  &clear,
            &special,   &to_storage, &multiply,    &softmax};
  }

 private:
  // As one of several rows, whose scores, maxima and sums are others.
  static Real softmax_among_others(const Real* s, int64_t columns, Real exponent_scale, Real* max, Real* sum,
                                   Operand* p) {
    constexpr int kRows = V::kWidth - 1, kMost = 64 * V::kWidth;
    const int row = int(columns / kColumns<P> * 5 % kRows);
    Real scores[kRows][kMost], maxima[V::kWidth], sums[V::kWidth], alpha[V::kWidth];
    Operand weights[kRows][kMost];
    for (int r = 0; r < kRows; ++r) {
      maxima[r] = r == row ? *max : Real(r);
      sums[r] = r == row ? *sum : Real(1 + r);
      for (int64_t j = 0; j < columns; ++j) scores[r][j] = r == row ? s[j] : Real(7 * r + j % 3);
    }
    SoftmaxRows<P> softmax(scores[0], kMost, kRows, columns, exponent_scale, maxima, alpha);
    for (int r = 0; r < kRows; ++r) softmax.template exponentiate<false>(r, weights[r], nullptr);
    softmax.finish(alpha, sums);
    for (int64_t j = 0; j < columns; ++j) p[j] = weights[row][j];
    *max = maxima[row];
    *sum = sums[row];
    return alpha[row];
  }
};

constexpr probe::IsaProbe make_probe(Isa isa,
                                     const probe::ProductProbe<float, BFloat16, BFloat16>* bf16_dot) {
  return {isa,
          VecFunctions<F32>::table(),
          VecFunctions<F64>::table(),
          ScoreFunctions<F32>::table(),
          ScoreFunctions<F64>::table(),
          ProductFunctions<FmaProduct<F32>, Float16>::table("f32 from float16"),
          ProductFunctions<FmaProduct<F32>, BFloat16>::table("f32 from bfloat16"),
          ProductFunctions<FmaProduct<F32>, float>::table("f32"),
          ProductFunctions<FmaProduct<F64>, double>::table("f64"),
          bf16_dot};
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
