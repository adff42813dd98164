// Gradient of queries without atomics on mma.sync: a block keeps kTileQ packed query rows and
// goes over the keys they see, in a fixed order. The deterministic backward pass uses it, and so do head
// dims beyond the largest bucket and slopes of ALiBi that want a gradient, for it sees whole rows.
#pragma once

#include "cuda/sm80/config.h"
#include "cuda/tile/exact_row.h"
#include "cuda/tile/gmem_tile.h"
#include "cuda/tile/mask_class.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/product.h"
#include "cuda/tile/score_grad.h"

namespace fae::cuda::sm80 {

// kDim, kSplit: as in KeyGrad.
template <class T, int kDim, bool kSplit, bool kModified>
class QueryGrad {
  using Config = QueryGradConfig<T, kDim, kSplit>;

 public:
  using Params = BackwardParams;
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr int kTileKV = Config::kTileKV;

 private:
  using TileQ = SmemTile<T, kTileQ, kDim>;
  using TileKV = SmemTile<T, kTileKV, kDim>;
  static constexpr int kResidentBytes = kSplit ? 0 : 2 * TileQ::kBytes;
  using Ring = Pipeline<2, kSplit ? TileKV::kBytes + TileQ::kBytes : 2 * TileKV::kBytes>;
  using Scores = FragC[1][kTileKV / 8];

 public:
  static constexpr int kThreads = Config::kWarps * kWarpSize;
  static constexpr int kSharedBytes = kResidentBytes + Ring::kBytes + SharedSequence<T>::kBytes;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    QueryGrad block(params);
    if (block.row_count_ > 0) block.run_block();
  }

 private:
  explicit FAE_DEVICE QueryGrad(const Params& params)
      : params_(params),
        p_(params.call.problem),
        smem_(shared_memory()),
        sequence_(smem_ + (kSharedBytes - SharedSequence<T>::kBytes)) {
    const BlockOrder::Place place = params.order.place(block_index());
    const int slices = kSplit ? int((p_.dim + kDim - 1) / kDim) : 1;
    const int64_t unit = place.unit / slices;
    slice_ = int(place.unit % slices);
    const BlockSequence sequence(p_, unit / p_.heads_kv);
    const int head_kv = int(unit % p_.heads_kv);
    row_begin_ = int(place.tile * kTileQ);
    const int left = sequence.seq_q * int(p_.group()) - row_begin_;
    row_count_ = left < kTileQ ? left : kTileQ;
    if (row_count_ <= 0) return;  // past the end of its sequence
    sequence_.write(p_, sequence, head_kv, params.call.dout,
                    params.stats.place(sequence.batch, head_kv, sequence.first_query * p_.group()));
    rows_ = PackedRows(row_begin_, p_.group());
    query_end_ = rows_.query(row_count_ - 1) + 1;
    KeyRange keys = visible_keys(sequence.band(), sequence.kv_length, rows_.query_begin, query_end_);
    if (p_.masking.has_ranges()) {
      keys = trim_keys<kThreads>(p_, sequence.batch, head_kv, rows_.query_begin, query_end_, keys);
    }
    if (keys.empty()) return;
    key_end_ = int(keys.end);
    load_key_ = int(keys.begin) / kTileKV * kTileKV;
  }

  FAE_DEVICE int column() const { return slice_ * kDim; }
  FAE_DEVICE TileQ resident_q() const { return {smem_}; }
  FAE_DEVICE TileQ resident_dout() const { return {smem_ + TileQ::kBytes}; }
  FAE_DEVICE int steps_k() const { return kSplit ? int((p_.dim + kDim - 1) / kDim) : 1; }
  FAE_DEVICE int steps_v() const { return kSplit ? int((p_.dim_v + kDim - 1) / kDim) : 1; }

  using Operand = Slices<const T>;
  FAE_DEVICE Operand k() const { return {sequence_.k(p_), int(p_.dim), params_.vector.k}; }
  FAE_DEVICE Operand v() const { return {sequence_.v(p_), int(p_.dim_v), params_.vector.v}; }
  FAE_DEVICE Operand q() const { return {sequence_.q(p_), int(p_.dim), params_.vector.q}; }
  FAE_DEVICE Operand dout() const {
    return {sequence_.dout(params_.call.dout), int(p_.dim_v), params_.vector.dout};
  }
  FAE_DEVICE void load_rows(TileQ tile, const Operand& x, int column) const {
    load_tile<kThreads>(tile, x.source, rows_, row_count_, column, x.columns, x.vector);
  }
  FAE_DEVICE void load_keys(TileKV tile, const Operand& x, int column) const {
    const int left = key_end_ - load_key_;
    load_tile<kThreads>(tile, x.source, PlainRows{load_key_}, left < kTileKV ? left : kTileKV, column,
                        x.columns, x.vector);
  }

  // The next item of the sequence. Whole: K and V of a tile of keys. Split: slices of K and Q,
  // slices of V and dO, then the slice of K that dQ is made of.
  FAE_DEVICE void load_next(Smem<std::byte> slot) {
    if (load_key_ >= key_end_) return;
    const TileKV keys{slot};
    if constexpr (!kSplit) {
      load_keys(keys, k(), 0);
      load_keys(TileKV{slot + TileKV::kBytes}, v(), 0);
      load_key_ += kTileKV;
    } else {
      // Loads are long code: one of keys and one of rows, whatever they are of.
      const int step = load_step_, last = steps_k() + steps_v();
      const bool second = step >= steps_k() && step < last;
      const int c = step == last ? column() : (second ? step - steps_k() : step) * kDim;
      load_keys(keys, second ? v() : k(), c);
      if (step < last) {
        load_rows(TileQ{slot + TileKV::kBytes}, second ? dout() : q(), c);
        load_step_ = step + 1;
      } else {
        load_step_ = 0;
        load_key_ += kTileKV;
      }
    }
  }

  FAE_DEVICE void run_block() {
    Ring ring(smem_ + kResidentBytes);
    const auto load = [this](Smem<std::byte> slot) { load_next(slot); };
    const bool fast = params_.fast_fp32;
    const int row = warp_index() * 16;
    const int64_t at = sequence_.stats_row() + row_begin_ + row;
    const LaneRowStats stats = load_row_stats<kNeedsLow<T, kModified>>(params_.stats, at);
    FragC dq[1][kDim / 8];
    clear(dq);
    float distances[2] = {0, 0};  // sums of dS times the distance of ALiBi
    const int first_key = load_key_;
    if (!kSplit && first_key < key_end_) {  // without keys no barrier would follow
      load_rows(resident_q(), q(), 0);
      load_rows(resident_dout(), dout(), 0);
    }
    ring.start(load);
    for (int key = first_key; key < key_end_; key += kTileKV) {
      Scores s, ds;
      clear(s);
      clear(ds);
      const ScoreTile tile{p_, params_.scale, tile_sequence(sequence_), rows_, row_count_, key};
      const TileClass mask_class =
          p_.has_mask() ? classify_masks<16, kTileKV>(tile, row, 0) : TileClass::kFull;
      // A warp whose rows see nothing of the tile only keeps step with the others.
      const bool seen = mask_class != TileClass::kSkip;
      TileKV keys;
      if constexpr (!kSplit) {
        const Smem<std::byte> slot = ring.next(load);
        keys = TileKV{slot};
        if (seen) {
          multiply_rows<T>(s, resident_q(), row, keys, 0, fast);
          multiply_rows<T>(ds, resident_dout(), row, TileKV{slot + TileKV::kBytes}, 0, fast);
        }
      } else {
        for (int step = 0; step < steps_k(); ++step) {
          const Smem<std::byte> slot = ring.next(load);
          if (seen) multiply_rows<T>(s, TileQ{slot + TileKV::kBytes}, row, TileKV{slot}, 0, fast);
        }
        for (int step = 0; step < steps_v(); ++step) {
          const Smem<std::byte> slot = ring.next(load);
          if (seen) multiply_rows<T>(ds, TileQ{slot + TileKV::kBytes}, row, TileKV{slot}, 0, fast);
        }
        keys = TileKV{ring.next(load)};
      }
      if (!seen) continue;
      const bool partial = classify(sequence_.band(), sequence_.kv_length(), rows_.query_begin, query_end_,
                                    key, key + kTileKV) != TileClass::kFull;
      const bool masked = mask_class == TileClass::kPartial;
      if constexpr (kModified) {
        Scores slope;
        score_gradients<true>(s, ds, slope, stats, tile, row, partial, masked);
        if (params_.stats.dalibi) add_distances(distances, ds, tile, row);
        multiply_elements(ds, slope);
      } else {
        constexpr FragC(*no_slope)[kTileKV / 8] = nullptr;
        score_gradients<false>(s, ds, no_slope, stats, tile, row, partial, masked);
      }
      accumulate<T>(dq, ds, keys, fast);
    }
    copy_async_wait<0>();
    if (kModified && params_.stats.dalibi && slice_ == 0) store_slope_terms(distances, row, at);
    store(dq, row);
  }

  // `at`: of the warp's first row in the statistics.
  FAE_DEVICE void store_slope_terms(const float (&distances)[2], int row, int64_t at) const {
    const int g = lane_index() / 4;
    FAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(distances[half]);
      if (lane_index() % 4 == 0 && row + 8 * half + g < row_count_) {
        store_global(params_.stats.dalibi + at + 8 * half + g, -sum);
      }
    }
  }

  FAE_DEVICE void store(const FragC (&dq)[1][kDim / 8], int row) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const float scale = float(p_.score.scale);
    // Q's tile is free once this warp is done: each has read only its own rows of it.
    if (kSplit) block_barrier();
    else warp_barrier();
    const TileQ staging{smem_};
    FAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const LaneChunk pair = lane_pair(staging, row + 8 * half + g);
      float probe = 0;  // stays 0 when everything is finite
      FAE_UNROLL
      for (int n = 0; n < kDim / 8; ++n) {
        const float x = dq[0][n][2 * half], y = dq[0][n][2 * half + 1];
        probe += (x - x) + (y - y);
        store_pair<TileQ>(pair, n, x * scale, y * scale);
      }
      for (uint32_t bad = warp_ballot(probe != 0); bad;) {
        const int quad = (__builtin_ffs(int(bad)) - 1) / 4, r = row + 8 * half + quad;
        bad &= ~(0xfu << (4 * quad));
        if (r >= row_count_) continue;
        exact_query_grad_row<T, kModified, kDim>(params_, sequence_.batch(), sequence_.head_kv(),
                                                 row_begin_ + r, column(), staging, r);
      }
    }
    warp_barrier();
    const RowSource<T> target(params_.call.dq, sequence_.batch(), sequence_.head_q(),
                              sequence_.first_query());
    store_rows<16>(staging, target, rows_, row, row_count_, column(), int(p_.dim), params_.vector.dq);
  }

  const Params& params_;
  const Problem& p_;
  const Smem<std::byte> smem_;
  const SharedSequence<T> sequence_;
  int slice_;      // of dQ's columns
  int row_begin_;  // first packed row of the block
  int row_count_;  // rows of its tile that exist
  int query_end_;
  int key_end_ = 0;  // of the keys that at least one row sees
  PackedRows rows_;
  // What load_next loads next.
  int load_key_ = 0;
  int load_step_ = 0;
};

}  // namespace fae::cuda::sm80
