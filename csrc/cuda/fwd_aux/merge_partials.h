// Results over ranges of keys become one (split-KV; FlashDecoding, Dao et al. 2023).
#pragma once

#include "core/partial.h"
#include "cuda/tile/exact_row.h"
#include "cuda/tile/smem_tile.h"

namespace fae::cuda {

// A warp for each packed row.
template <class T, bool kModified>
class MergePartials {
  static constexpr int kWarps = 4;
  static constexpr int kCols = 128;  // at a time
  static constexpr int kColsOfLane = kCols / kWarpSize;
  using Staging = SmemTile<T, 8, kCols>;  // a row for each warp; rows come by eights

 public:
  using Params = ForwardParams;
  static constexpr int kTileQ = kWarps;
  static constexpr int kTileKV = 0;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSharedBytes = Staging::kBytes;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    const Problem& p = params.call.problem;
    const BlockOrder::Place place = params.order.place(block_index());
    const int batch = int(place.unit / p.heads_kv), head_kv = int(place.unit % p.heads_kv);
    const int row = int(place.tile) * kTileQ + warp_index();
    const Sequence sequence = p.sequence(batch);
    if (row >= sequence.seq_q * p.group()) return;  // past the end of its sequence
    const PackedRows rows(row, p.group());
    const int head = head_kv * int(p.group()) + rows.head(0);
    const int query = int(sequence.first_query) + rows.query(0);
    const View4& out = params.call.out;
    T* const target = static_cast<T*>(out.data) + out.offset(batch, head, query);
    for (int column = 0; column < p.dim_v; column += kCols) {
      Merged merged = merge_row(params, place.unit, row, column);
      const float factor = result_factor<kModified>(p.dropout, merged.state.sum);
      bool finite = is_finite(merged.state.sum);
      FAE_UNROLL
      for (int n = 0; n < kColsOfLane; ++n) {
        merged.out[n] *= factor;
        finite &= is_finite(merged.out[n]);
      }
      double lse = row_lse<T>(merged.state.max, merged.state.sum, params.scale);
      const bool exact = warp_ballot(!finite) != 0;
      const Staging staging{shared_memory()};
      if (exact) {
        lse =
            exact_output_row<T, kModified, kCols>(params, batch, head_kv, row, column, staging, warp_index());
        warp_barrier();
      }
      FAE_UNROLL
      for (int n = 0; n < kColsOfLane; ++n) {
        const int c = lane_index() + n * kWarpSize;
        if (column + c >= p.dim_v) break;
        const T x = exact ? load_shared(staging.at(warp_index(), c)) : from_double<T>(merged.out[n]);
        store_global(target + (column + c) * out.stride[3], x);
      }
      if (column == 0 && lane_index() == 0) store_lse<T>(params.call.lse, batch, head, query, lse);
    }
  }

 private:
  struct Merged {
    SoftmaxState<float> state;
    float out[kColsOfLane];  // of columns column + lane, + lane + 32, ...
  };

  static FAE_DEVICE Merged merge_row(const Params& params, int64_t unit, int row, int column) {
    const Partials& from = params.partials;
    const float exponent = params.scale.exponent;
    Merged merged{};
    for (int range = 0; range < from.count; ++range) {
      const int64_t at = from.at(range, unit, row);
      const SoftmaxState<float> state{load_global(from.max + at), load_global(from.sum + at)};
      if (state.sum == 0) continue;  // saw nothing
      MergeFactors<float> factors;
      merged.state = merge(merged.state, state, &factors, [=](float x) { return exp2_fast(x * exponent); });
      const float* const part = from.out + at * from.columns + column;
      FAE_UNROLL
      for (int n = 0; n < kColsOfLane; ++n) {
        const int c = lane_index() + n * kWarpSize;
        const float x = column + c < from.columns ? load_global(part + c) : 0.0f;
        merged.out[n] = merged.out[n] * factors.a + x * factors.b;
      }
    }
    return merged;
  }
};

}  // namespace fae::cuda
