// What the backward pass needs to know of every packed query row, see RowStats.
#pragma once

#include "cuda/params.h"
#include "cuda/tile/exact_row.h"
#include "cuda/tile/score_grad.h"

namespace fae::cuda {

// kModified: for rows far from 0, whose scores are summed once more.
template <class T, bool kModified>
class RowStatsKernel {
  static constexpr int kWarps = 8;

 public:
  using Params = BackwardParams;
  static constexpr int kTileQ = 32;
  static constexpr int kTileKV = 0;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    const BlockOrder::Place place = params.order.place(block_index());
    for (int r = warp_index(); r < kTileQ; r += kWarps) {
      run_row(params, place.unit, int(place.tile) * kTileQ + r);
    }
  }

 private:
  static constexpr bool kWideLse = lse_dtype(DTypeOf<T>::value) == DType::kFloat64;
  static constexpr int kChunk = 16 / int(sizeof(T));
  // Past this, half a unit in the last place of lse is more than P may be wrong by.
  static constexpr double kFar = kWideLse ? 268435456.0 : 2048.0;
  // Past this, neighbouring scores in fp32 lie further apart than the logarithm of any sum.
  static constexpr double kBeyondSums = 268435456.0;

  static FAE_DEVICE double load_lse(const RowValues<const void>& from, int batch, int head, int i) {
    const int64_t at = from.index(batch, head, i);
    if constexpr (kWideLse) return load_global(static_cast<const double*>(from.data) + at);
    else return load_global(static_cast<const float*>(from.data) + at);
  }

  static FAE_DEVICE void run_row(const Params& params, int64_t unit, int row) {
    const Problem& p = params.call.problem;
    const int batch = int(unit / p.heads_kv), head_kv = int(unit % p.heads_kv);
    const Sequence sequence = p.sequence(batch);
    const int count = int(sequence.seq_q * p.group());
    if (row >= (count + kRowPadding - 1) / kRowPadding * kRowPadding) return;
    const int64_t at = params.stats.place(batch, head_kv, sequence.first_query * p.group()) + row;
    double lse = __builtin_inf();
    float low = 0, delta = 0, dsink = 0;
    if (row < count) {
      const PackedRows rows(row, p.group());
      const int head = head_kv * int(p.group()) + rows.head(0), i = int(sequence.first_query) + rows.query(0);
      lse = load_lse(params.call.lse, batch, head, i);
      // A row without keys: exp(-inf - inf) is 0, exp(-inf + inf) would not be.
      if (lse == -__builtin_inf()) lse = __builtin_inf();
      double base = lse;
      float log_sum = 0;
      if constexpr (kNeedsLow<T, kModified>) {
        if (lse - lse == 0 && fabs(lse) > kFar) {
          const Partial far = far_row(params, batch, head_kv, row);
          const double natural = double(params.scale.natural);
          // The maximum as the tiled product rounds it, where lse is nothing but that.
          const float max = fabs(lse) > kBeyondSums ? float(lse / natural) : far.max;
          base = double(max) * natural;
          log_sum = logf(far.sum);
        }
      }
      if (is_finite(float(base))) low = float(base - double(float(base))) + log_sum;
      delta =
          dot_rows(params, params.call.out.offset(batch, head, i), params.call.dout.offset(batch, head, i));
      if (params.call.dlse.present()) delta -= float(load_lse(params.call.dlse, batch, head, i));
      if constexpr (kModified) {
        if (params.stats.dsink) {
          const float sink = load_head_value(p.score.sinks, batch, head);
          // The log-sum-exp is the sink alone for rows without keys, to which nothing has a gradient.
          if (sink != kHidden && (lse != sink || sees_any(params, batch, head_kv, row))) {
            dsink = -probability_of_sink((sink - base) - log_sum) * delta;
          }
        }
      }
      lse = base;
    }
    if (lane_index() != 0) return;
    store_global(params.stats.lse + at, float(lse));
    store_global(params.stats.lse_low + at, low);
    store_global(params.stats.delta + at, delta);
    if (kModified && params.stats.dsink) store_global(params.stats.dsink + at, dsink);
  }

  static FAE_DEVICE float probability_of_sink(double above_lse) {
    if constexpr (kWideLse) return float(exp(above_lse));
    else return expf(float(above_lse));
  }

  static FAE_DEVICE_COLD bool sees_any(const Params& params, int batch, int head_kv, int packed_row) {
    const BlockSequence sequence(params.call.problem, batch);
    ScoreTile row = single_row(params.call.problem, params.scale, sequence, head_kv, packed_row);
    const int i = row.rows.query(0);
    const KeyRange seen = visible_keys(sequence.band(), sequence.kv_length, i, i + 1);
    if (seen.empty()) return false;  // and it may lie beyond 32 bits
    bool any = false;
    for (int j = int(seen.begin) + lane_index(); j < seen.end && !any; j += kWarpSize) {
      row.key = j;
      any = sees_key(row) && pair_bias(row) != kHidden;
    }
    return warp_ballot(any) != 0;
  }

  struct Partial { float max, sum; };

  // The largest score value of a row and the sum of exp(score - max), for rows whose lse is too coarse
  // to hold the logarithm of that sum (a bias of finfo.min). Products are summed in another order
  // than elsewhere: far from 0 only the differences of these scores are to be trusted.
  static FAE_DEVICE_COLD Partial far_row(const Params& params, int batch, int head_kv, int packed_row) {
    const Problem& p = params.call.problem;
    const BlockSequence sequence(p, batch);
    const ScoreTile row = single_row(p, params.scale, sequence, head_kv, packed_row);
    const int i = row.rows.query(0);
    const int64_t query = p.q.offset(batch, row.sequence.head() + row.rows.head(0), sequence.first_query + i);
    const KeyRange seen = visible_keys(sequence.band(), sequence.kv_length, i, i + 1);
    const int64_t end = kModified && seen.empty() ? 0 : seen.end;  // a row of a sink alone
    Partial part{kHidden, 0};
    if (kModified && p.score.sinks.present() && lane_index() == 0) {
      const float sink = load_head_value(p.score.sinks, batch, row.sequence.head() + row.rows.head(0));
      if (sink != kHidden) part = {sink, 1};
    }
    for (int j = int(seen.begin) + lane_index(); j < end; j += kWarpSize) {
      const float s =
          exact_score<T, kModified>(row, query, p.k.offset(batch, head_kv, sequence.first_key + j), j).value;
      if (s == kHidden) continue;
      if (s > part.max) {
        part.sum *= exp2_fast((part.max - s) * params.scale.exponent);
        part.max = s;
      }
      part.sum += exp2_fast((s - part.max) * params.scale.exponent);
    }
    const float max = warp_max(part.max);
    return {max,
            warp_sum(part.sum == 0 ? 0.0f : part.sum * exp2_fast((part.max - max) * params.scale.exponent))};
  }

  static FAE_DEVICE float dot_rows(const Params& params, int64_t out, int64_t dout) {
    const View4 &a = params.call.out, &b = params.call.dout;
    const int columns = int(params.call.problem.dim_v);
    const bool vector = params.vector.out && params.vector.dout;
    float sum = 0;
    // The same order of additions either way.
    for (int c = lane_index() * kChunk; c < columns; c += kWarpSize * kChunk) {
      if (vector) {
        T x[kChunk], y[kChunk];
        const Vec16 xs = load_global(reinterpret_cast<const Vec16*>(static_cast<const T*>(a.data) + out + c));
        const Vec16 ys =
            load_global(reinterpret_cast<const Vec16*>(static_cast<const T*>(b.data) + dout + c));
        memcpy(x, &xs, 16);
        memcpy(y, &ys, 16);
        FAE_UNROLL
        for (int e = 0; e < kChunk; ++e) sum += to_float(x[e]) * to_float(y[e]);
      } else {
        for (int e = 0; e < kChunk && c + e < columns; ++e) {
          sum += load_element<T>(a, out, c + e) * load_element<T>(b, dout, c + e);
        }
      }
    }
    return warp_sum(sum);
  }
};

}  // namespace fae::cuda
