// One row of a result, computed by a warp without matrix units.
//
// A hidden key has probability 0, and a matrix product makes NaN of 0 * infinity: an
// infinity or NaN in a key or value would reach rows that do not see it. A row of results
// that is not finite is therefore computed again here, over the visible keys alone; finite
// data never comes here. fp32 infinities, which do not survive the split into two TF32
// numbers, are made good in the same place.
#pragma once

#include "cuda/tile/dropout.h"
#include "cuda/tile/softmax.h"

namespace fae::cuda {

FAE_DEVICE bool is_finite(float x) { return x - x == 0; }

template <class T>
FAE_DEVICE float load_element(const View4& view, int64_t offset, int64_t column) {
  return to_float(load_global(static_cast<const T*>(view.data) + offset + column * view.stride[3]));
}

template <class T>
FAE_DEVICE float dot(const View4& a, int64_t a_offset, const View4& b, int64_t b_offset, int64_t columns) {
  float sum = 0;
  FAE_NO_UNROLL
  for (int64_t c = 0; c < columns; ++c)
    sum += load_element<T>(a, a_offset, c) * load_element<T>(b, b_offset, c);
  return sum;
}

// A packed query row as a tile of its own.
FAE_DEVICE ScoreTile single_row(const Problem& problem, const ScoreScale& scale,
                                const BlockSequence& sequence, int head_kv, int packed_row) {
  return {problem,
          scale,
          tile_sequence(sequence, head_kv * int(problem.group())),
          PackedRows(packed_row, problem.group()),
          1,
          0};
}

// Where key j of a sequence begins in k, or v.
FAE_DEVICE int64_t key_offset(const Problem& p, const View4& view, const BlockSequence& sequence, int head_kv,
                              int j) {
  const PageTable& pages = p.cache.pages;
  const unsigned row = unsigned(sequence.first_key + j), size = unsigned(pages.page_size);
  if (!pages.present()) return view.offset(sequence.key_batch, head_kv, row);
  return view.offset(pages.at(sequence.key_batch, row / size), head_kv, row % size);
}

// Score of the row of `row`, which begins at `query` in q, and key j, which begins at `key` in k.
template <class T, bool kModified>
FAE_DEVICE_COLD Score exact_score(ScoreTile row, int64_t query, int64_t key, int j) {
  const Problem& p = row.problem;
  row.key = j;
  const float product = dot<T>(p.q, query, p.k, key, p.dim);
  return pair_score<kModified>(product, row);
}

// Columns [column, column + kCols) of a sum over items, weight(item) * row(item): each lane
// weighs an item, then all take turns and each lane adds up its own columns.
template <int kCols>
struct LaneColumns {
  static_assert(kCols % kWarpSize == 0);
  float sum[kCols / kWarpSize];

  FAE_DEVICE LaneColumns() {
    FAE_UNROLL
    for (int i = 0; i < kCols / kWarpSize; ++i) sum[i] = 0;
  }
  // Columns at or past `columns` do not exist.
  template <class T>
  FAE_DEVICE void add(float weight, const View4& view, int64_t offset, int column, int columns) {
    FAE_UNROLL
    for (int i = 0; i < kCols / kWarpSize; ++i) {
      const int c = column + i * kWarpSize + lane_index();
      if (c < columns) sum[i] += weight * load_element<T>(view, offset, c);
    }
  }
  template <class T, class Tile>
  FAE_DEVICE void store(Tile tile, int r, float factor) const {
    FAE_UNROLL
    for (int i = 0; i < kCols / kWarpSize; ++i) {
      store_shared(tile.at(r, i * kWarpSize + lane_index()), from_double<T>(sum[i] * factor));
    }
  }
};

// Whether dropout keeps the probability of the row of `row` and key j.
template <bool kModified>
FAE_DEVICE bool keeps(const ScoreTile& row, PhiloxKey key, int j) {
  if (!kModified || !row.problem.dropout.present()) return true;
  return kept_keys(row, key, 0, j / 4) >> j % 4 & 1;
}
template <bool kModified>
FAE_DEVICE PhiloxKey dropout_key(const Problem& p) {
  return kModified && p.dropout.present() ? load_dropout_key(p.dropout) : PhiloxKey{0, 0};
}

// Columns [column, column + kCols) of the output of a packed row, into row r of a tile in
// shared memory; returns the row's log-sum-exp. For a warp.
template <class T, bool kModified, int kCols, class Tile>
FAE_DEVICE_COLD double exact_output_row(const ForwardParams& params, int batch, int head_kv, int packed_row,
                                        int column, Tile tile, int r) {
  const Problem& p = params.call.problem;
  const BlockSequence sequence(p, batch);
  const ScoreTile row = single_row(p, params.scale, sequence, head_kv, packed_row);
  const int i = row.rows.query(0), lane = lane_index();
  const int64_t query = p.q.offset(batch, row.sequence.head() + row.rows.head(0), sequence.first_query + i);
  const auto score = [&](int j) {
    return exact_score<T, kModified>(row, query, key_offset(p, p.k, sequence, head_kv, j), j).value;
  };
  const KeyRange seen = visible_keys(sequence.band(), sequence.kv_length, i, i + 1);
  const float exponent = params.scale.exponent;
  const PhiloxKey key = dropout_key<kModified>(p);
  float sink = kHidden;
  if (kModified && p.score.sinks.present()) {
    sink = load_head_value(p.score.sinks, batch, row.sequence.head() + row.rows.head(0));
  }
  float max = sink, sum = 0;
  FAE_NO_UNROLL
  for (int j = int(seen.begin) + lane; j < seen.end; j += kWarpSize) {
    const float s = score(j);
    if (s > max) max = s;
  }
  max = warp_max(max);
  const float shift = max == kHidden ? 0.0f : max;
  if (lane == 0 && sink != kHidden) sum = exp2_fast((sink - shift) * exponent);
  LaneColumns<kCols> out;
  FAE_NO_UNROLL
  for (int first = int(seen.begin); first < seen.end; first += kWarpSize) {
    const int j = first + lane;
    const float s = j < seen.end ? score(j) : kHidden;
    float weight = exp2_fast((s - shift) * exponent);
    sum += s == kHidden ? 0.0f : weight;
    if (!keeps<kModified>(row, key, j)) weight = 0;
    const uint32_t visible = warp_ballot(s != kHidden);
    FAE_NO_UNROLL
    for (int turn = 0; turn < kWarpSize; ++turn) {
      const float its_weight = shuffle(weight, turn);
      if (!(visible >> turn & 1)) continue;
      out.template add<T>(its_weight, p.v, key_offset(p, p.v, sequence, head_kv, first + turn), column,
                          int(p.dim_v));
    }
  }
  sum = warp_sum(sum);
  warp_barrier();
  out.template store<T>(tile, r, result_factor<kModified>(p.dropout, sum));
  return row_lse<T>(max, sum, params.scale);
}

// P, as far as dropout leaves it, and dS of one visible pair in the backward pass; dS is taken before scale
// and softcap.
struct PairGrad {
  float p, ds;
  bool visible;
};

template <class T, bool kModified>
FAE_DEVICE_COLD PairGrad exact_pair_grad(const BackwardParams& params, int batch, int head_kv, int packed_row,
                                         int j) {
  const Problem& p = params.call.problem;
  const BlockSequence sequence(p, batch);
  const ScoreTile row = single_row(p, params.scale, sequence, head_kv, packed_row);
  const int head = row.sequence.head() + row.rows.head(0), query = sequence.first_query + row.rows.query(0);
  const int key = sequence.first_key + j;
  const Score score =
      exact_score<T, kModified>(row, p.q.offset(batch, head, query), p.k.offset(batch, head_kv, key), j);
  if (score.value == kHidden) return {0, 0, false};
  const int64_t at = params.stats.place(batch, head_kv, sequence.first_query * p.group()) + packed_row;
  const float low = load_global(params.stats.lse_low + at);
  const float exponent = score.value * params.scale.natural - load_global(params.stats.lse + at) - low;
  const float weight = exp2_fast(exponent * kLog2E);
  float dp = dot<T>(params.call.dout, params.call.dout.offset(batch, head, query), p.v,
                    p.v.offset(batch, head_kv, key), p.dim_v);
  const bool kept = keeps<kModified>(row, dropout_key<kModified>(p), j);
  if (kModified) dp *= kept ? float(p.dropout.keep_scale) : 0.0f;
  return {kept ? weight : 0.0f, weight * (dp - load_global(params.stats.delta + at)) * score.slope, true};
}

// Columns [column, column + kCols) of dQ of a packed row, into row r of a tile. For a warp.
template <class T, bool kModified, int kCols, class Tile>
FAE_DEVICE_COLD void exact_query_grad_row(const BackwardParams& params, int batch, int head_kv,
                                          int packed_row, int column, Tile tile, int r) {
  const Problem& p = params.call.problem;
  const BlockSequence sequence(p, batch);
  const ScoreTile row = single_row(p, params.scale, sequence, head_kv, packed_row);
  const int i = row.rows.query(0);
  const KeyRange seen = visible_keys(sequence.band(), sequence.kv_length, i, i + 1);
  LaneColumns<kCols> dq;
  FAE_NO_UNROLL
  for (int first = int(seen.begin); first < seen.end; first += kWarpSize) {
    const int j = first + lane_index();
    PairGrad pair{0, 0, false};
    if (j < seen.end) pair = exact_pair_grad<T, kModified>(params, batch, head_kv, packed_row, j);
    const uint32_t visible = warp_ballot(pair.visible);
    FAE_NO_UNROLL
    for (int turn = 0; turn < kWarpSize; ++turn) {
      const float ds = shuffle(pair.ds, turn);
      if (!(visible >> turn & 1)) continue;
      dq.template add<T>(ds, p.k, p.k.offset(batch, head_kv, sequence.first_key + first + turn), column,
                         int(p.dim));
    }
  }
  warp_barrier();
  dq.template store<T>(tile, r, float(p.score.scale));
}

// Columns [column, column + kCols) of dK and dV of a key, into row r of two tiles. For a warp.
template <class T, bool kModified, int kCols, class Tile>
FAE_DEVICE_COLD void exact_key_grad_row(const BackwardParams& params, int batch, int head_kv, int j,
                                        int column, Tile dk_tile, Tile dv_tile, int r) {
  const Problem& p = params.call.problem;
  const BlockSequence sequence(p, batch);
  const KeyRange seeing = seeing_queries(sequence.band(), sequence.seq_q, j, j + 1);
  const int group = int(p.group()), end = seeing.empty() ? 0 : int(seeing.end) * group;
  LaneColumns<kCols> dk, dv;
  FAE_NO_UNROLL
  for (int first = seeing.empty() ? 0 : int(seeing.begin) * group; first < end; first += kWarpSize) {
    const int row = first + lane_index();
    PairGrad pair{0, 0, false};
    if (row < end) pair = exact_pair_grad<T, kModified>(params, batch, head_kv, row, j);
    const uint32_t visible = warp_ballot(pair.visible);
    FAE_NO_UNROLL
    for (int turn = 0; turn < kWarpSize; ++turn) {
      const float weight = shuffle(pair.p, turn), ds = shuffle(pair.ds, turn);
      if (!(visible >> turn & 1)) continue;
      const PackedRows at(first + turn, group);
      const int64_t head = head_kv * group + at.head(0), i = sequence.first_query + at.query(0);
      dk.template add<T>(ds, p.q, p.q.offset(batch, head, i), column, int(p.dim));
      dv.template add<T>(weight, params.call.dout, params.call.dout.offset(batch, head, i), column,
                         int(p.dim_v));
    }
  }
  warp_barrier();
  dk.template store<T>(dk_tile, r, float(p.score.scale));
  dv.template store<T>(dv_tile, r, kModified ? float(p.dropout.keep_scale) : 1.0f);
}

}  // namespace fae::cuda
