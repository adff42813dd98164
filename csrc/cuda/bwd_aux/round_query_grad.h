// dQ from its fp32 sums.
#pragma once

#include "cuda/params.h"
#include "cuda/tile/exact_row.h"
#include "cuda/tile/smem_tile.h"

namespace fae::cuda {

// kModified: for rows that have to be computed again, see exact_row.h.
template <class T, bool kModified>
class RoundQueryGrad {
  static constexpr int kWarps = 8;
  static constexpr int kCols = 128;  // of an exact row at a time
  using Staging = SmemTile<T, kWarps, kCols>;

 public:
  using Params = BackwardParams;
  static constexpr int kTileQ = 32;
  static constexpr int kTileKV = 0;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSharedBytes = Staging::kBytes;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    const BlockOrder::Place place = params.order.place(block_index());
    for (int r = warp_index(); r < kTileQ; r += kWarps) {
      run_row(params, place.unit, int(place.tile) * kTileQ + r);
    }
  }

 private:
  static FAE_DEVICE void run_row(const Params& params, int64_t unit, int row) {
    const Problem& p = params.call.problem;
    const int batch = int(unit / p.heads_kv), head_kv = int(unit % p.heads_kv);
    const Sequence sequence = p.sequence(batch);
    if (row >= sequence.seq_q * p.group()) return;
    const PackedRows rows(row, p.group());
    const int head = head_kv * int(p.group()) + rows.head(0);
    const View4& dq = params.call.dq;
    T* const target = static_cast<T*>(dq.data) + dq.offset(batch, head, sequence.first_query + rows.query(0));
    const int64_t at = params.stats.place(batch, head_kv, sequence.first_query * p.group()) + row;
    const float* const sums = params.dq_sum + at * params.dim_padded;
    const float scale = float(p.score.scale);
    bool finite = true;
    for (int c = lane_index(); c < p.dim; c += kWarpSize) finite &= is_finite(load_global(sums + c));
    if (warp_ballot(!finite) == 0) {
      for (int c = lane_index(); c < p.dim; c += kWarpSize) {
        store_global(target + c * dq.stride[3], from_double<T>(load_global(sums + c) * scale));
      }
      return;
    }
    const Staging staging{shared_memory()};
    const int slot = warp_index();
    for (int column = 0; column < p.dim; column += kCols) {
      exact_query_grad_row<T, kModified, kCols>(params, batch, head_kv, row, column, staging, slot);
      warp_barrier();
      for (int c = lane_index(); c < kCols && column + c < p.dim; c += kWarpSize) {
        store_global(target + (column + c) * dq.stride[3], load_shared(staging.at(slot, c)));
      }
    }
  }
};

}  // namespace fae::cuda
