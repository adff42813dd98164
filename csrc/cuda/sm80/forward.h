// Forward attention on mma.sync: a block attends kTileQ packed query rows of one K/V head to
// all keys they see, kTileKV at a time (FlashAttention-2's loop order; Dao 2023).
#pragma once

#include "cuda/sm80/config.h"
#include "cuda/tile/dropout.h"
#include "cuda/tile/exact_row.h"
#include "cuda/tile/gmem_tile.h"
#include "cuda/tile/mask_class.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/product.h"
#include "cuda/tile/softmax.h"

namespace fae::cuda::sm80 {

// kDim: columns of q, k and v tiles. kSplit: the head dims are longer; q and k come in
// slices of kDim, and the block makes one slice of the output. kModified: not plain scores.
template <class T, int kDim, bool kSplit, bool kModified>
class Forward {
  using Config = ForwardConfig<T, kDim, kSplit, kModified>;

 public:
  using Params = ForwardParams;
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr int kTileKV = Config::kTileKV;

 private:
  static constexpr int kRowsOfWarp = kTileQ / Config::kWarps;
  static constexpr int kM = kRowsOfWarp / 16;
  using TileQ = SmemTile<T, kTileQ, kDim>;
  using TileKV = SmemTile<T, kTileKV, kDim>;
  static constexpr int kResidentBytes = kSplit ? 0 : TileQ::kBytes;
  using Ring = Pipeline<Config::kSlots, TileKV::kBytes + (kSplit ? TileQ::kBytes : 0)>;

 public:
  static constexpr int kThreads = Config::kWarps * kWarpSize;
  static constexpr int kSharedBytes = kResidentBytes + Ring::kBytes + SharedSequence<T>::kBytes;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    Forward block(params);
    if (block.row_count_ > 0) block.run_block();
  }

 private:
  explicit FAE_DEVICE Forward(const Params& params)
      : params_(params),
        p_(params.call.problem),
        smem_(shared_memory()),
        sequence_(smem_ + (kSharedBytes - SharedSequence<T>::kBytes)) {
    const Work work = work_of(int(block_index()));
    slice_ = work.slice;
    const BlockSequence sequence(p_, work.unit / p_.heads_kv);
    const int head_kv = int(work.unit % p_.heads_kv);
    row_begin_ = work.tile * kTileQ;
    const int left = sequence.seq_q * int(p_.group()) - row_begin_;
    row_count_ = left < kTileQ ? left : kTileQ;
    if (row_count_ <= 0) return;  // past the end of its sequence
    sequence_.write(p_, sequence, head_kv);
    rows_ = PackedRows(row_begin_, p_.group());
    query_end_ = rows_.query(row_count_ - 1) + 1;
    KeyRange keys = visible_keys(sequence.band(), sequence.kv_length, rows_.query_begin, query_end_);
    if (p_.masking.has_ranges()) {
      keys = trim_keys<kThreads>(p_, sequence.batch, head_kv, rows_.query_begin, query_end_, keys);
    }
    if (keys.empty()) return;
    key_end_ = int(keys.end);
    // Tiles of keys begin at multiples of kTileKV whatever the rows are: a row's result does
    // not depend on which rows share its block.
    load_key_ = int(keys.begin) / kTileKV * kTileKV;
    if (params.partials.count > 1) take_range(work.range, params.partials.count);
  }

  // What a block works on: a tile of rows of a K/V head of the batch, a slice of its columns, and a range of
  // its keys.
  struct Work {
    int64_t unit;
    int tile, slice, range;
  };
  FAE_DEVICE Work work_of(int block) const {
    const BlockOrder::Place place = params_.order.place(block);
    const int ranges = params_.partials.count, slices = kSplit ? int((p_.dim_v + kDim - 1) / kDim) : 1;
    const int64_t unit = place.unit / ranges;
    return {unit / slices, int(place.tile), int(unit % slices), int(place.unit % ranges)};
  }

  // Of the keys, one of `ranges` ranges of whole tiles.
  FAE_DEVICE void take_range(int range, int ranges) {
    const int tiles = (key_end_ - load_key_ + kTileKV - 1) / kTileKV;
    const int begin = load_key_ + int(int64_t(tiles) * range / ranges) * kTileKV;
    const int end = load_key_ + int(int64_t(tiles) * (range + 1) / ranges) * kTileKV;
    load_key_ = begin;
    key_end_ = end < key_end_ ? end : key_end_;
  }

  FAE_DEVICE TileQ resident_q() const { return {smem_}; }
  FAE_DEVICE int steps() const { return kSplit ? int((p_.dim + kDim - 1) / kDim) : 1; }
  FAE_DEVICE int column_v() const { return slice_ * kDim; }

  FAE_DEVICE void load_q(TileQ tile, int column) const {
    load_tile<kThreads>(tile, sequence_.q(p_), rows_, row_count_, column, int(p_.dim), params_.vector.q);
  }

  // The next item of the sequence: per tile of keys its K (in slices, each with its Q), then V.
  FAE_DEVICE void load_next(Smem<std::byte> slot) {
    if (load_key_ >= key_end_) return;
    const int count = key_end_ - load_key_ < kTileKV ? key_end_ - load_key_ : kTileKV;
    // Loads are long code: one, whatever it is of.
    const bool values = load_step_ == steps();
    const Slices<const T> x{values ? sequence_.v(p_) : sequence_.k(p_), int(values ? p_.dim_v : p_.dim),
                            values ? params_.vector.v : params_.vector.k};
    load_keys<kThreads>(TileKV{slot}, x, (values ? p_.v : p_.k).stride[0], p_, sequence_, load_key_, count,
                        values ? column_v() : load_step_ * kDim);
    if (values) {
      load_step_ = 0;
      load_key_ += kTileKV;
    } else {
      if constexpr (kSplit) load_q(TileQ{slot + TileKV::kBytes}, load_step_ * kDim);
      ++load_step_;
    }
  }

  FAE_DEVICE void run_block() {
    Ring ring(smem_ + kResidentBytes);
    const auto load = [this](Smem<std::byte> slot) { load_next(slot); };
    const int row = warp_index() * kRowsOfWarp;
    FragC out[kM][kDim / 8];
    clear(out);
    OnlineSoftmax<kM> softmax;
    if constexpr (kModified) {
      if (p_.score.sinks.present() && work_of(opaque(int(block_index()))).range == 0)
        begin_with_sinks(softmax, row);
    }
    const int first_key = load_key_;
    constexpr FragC(*no_slope)[kTileKV / 8] = nullptr;
    // Without keys no barrier would keep these loads from what is staged at the end.
    if (!kSplit && first_key < key_end_) load_q(resident_q(), 0);
    ring.start(load);
    for (int key = first_key; key < key_end_; key += kTileKV) {
      const ScoreTile tile = score_tile(key);
      uint32_t kept[kM] = {};  // by dropout; found before scores take up registers
      if constexpr (kModified) {
        if (p_.dropout.present()) {
          FAE_UNROLL
          for (int m = 0; m < kM; ++m) kept[m] = kept_elements<false, kTileKV / 8>(tile, row + 16 * m, 0);
        }
      }
      FragC s[kM][kTileKV / 8];
      clear(s);
      const TileClass mask_class =
          p_.has_mask() ? classify_masks<kRowsOfWarp, kTileKV>(tile, row, 0) : TileClass::kFull;
      // A warp whose rows see nothing of the tile only keeps step with the others.
      const bool seen = mask_class != TileClass::kSkip;
      for (int step = 0; step < steps(); ++step) {
        const Smem<std::byte> slot = ring.next(load);
        const TileQ q = kSplit ? TileQ{slot + TileKV::kBytes} : resident_q();
        if (seen) multiply_rows<T>(s, q, row, TileKV{slot}, 0, params_.fast_fp32);
      }
      if (seen) {
        const bool partial = classify(sequence_.band(), sequence_.kv_length(), rows_.query_begin, query_end_,
                                      key, key + kTileKV) != TileClass::kFull;
        const bool masked = mask_class == TileClass::kPartial;
        if (kModified || partial || masked) {
          finish_scores<kModified, false>(s, no_slope, tile, row, 0, partial, masked);
        }
        softmax.update(s, out, params_.scale.exponent);
        if constexpr (kModified) {
          if (p_.dropout.present()) {
            FAE_UNROLL
            for (int m = 0; m < kM; ++m) drop(s[m], kept[m]);
          }
        }
      }
      const Smem<std::byte> slot = ring.next(load);
      if (seen) accumulate<T>(out, s, TileKV{slot}, params_.fast_fp32);
    }
    copy_async_wait<0>();
    softmax.finish();
    if (params_.partials.count > 1) store_partial(out, softmax, row);
    else store(out, softmax, row);
  }

  FAE_DEVICE void begin_with_sinks(OnlineSoftmax<kM>& softmax, int row) const {
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int head = sequence_.head_q() + rows_.head(row + 16 * m + 8 * half + lane_index() / 4);
        softmax.begin_with(load_head_value(p_.score.sinks, sequence_.batch(), head), m, half);
      }
    }
  }

  FAE_DEVICE ScoreTile score_tile(int key) const {
    return {p_, params_.scale, tile_sequence(sequence_), rows_, row_count_, key};
  }

  FAE_DEVICE void store(FragC (&out)[kM][kDim / 8], const OnlineSoftmax<kM>& softmax, int row) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    // Q's tile is free: each warp has read only its own rows of it.
    if (kSplit) block_barrier();
    const TileQ staging{smem_};
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float sum = softmax.sum[m][half];
        const float factor = result_factor<kModified>(p_.dropout, sum);
        const int r = row + 16 * m + 8 * half + g;
        const LaneChunk pair = lane_pair(staging, r);
        float probe = sum - sum;  // 0 when everything is finite
        FAE_UNROLL
        for (int n = 0; n < kDim / 8; ++n) {
          const float x = out[m][n][2 * half] * factor;
          const float y = out[m][n][2 * half + 1] * factor;
          probe += (x - x) + (y - y);
          store_pair<TileQ>(pair, n, x, y);
        }
        const bool exact = repair(staging, row + 16 * m + 8 * half, warp_ballot(probe != 0));
        if (t == 0 && !exact && slice_ == 0 && r < row_count_) {
          store_lse_of(r, row_lse<T>(softmax.max[m][half], sum, params_.scale));
        }
      }
    }
    warp_barrier();
    const RowSource<T> target(params_.call.out, sequence_.batch(), sequence_.head_q(),
                              sequence_.first_query());
    store_rows<kRowsOfWarp>(staging, target, rows_, row, row_count_, column_v(), int(p_.dim_v),
                            params_.vector.out);
  }

  // Of 8 rows from `row` on, one to each quad of lanes, computes those again that a lane in
  // `bad` found not to be finite (see exact_row.h). Whether this lane's row was one of them.
  FAE_DEVICE bool repair(TileQ staging, int row, uint32_t bad) const {
    bool mine = false;
    while (bad) {
      const int quad = (__builtin_ffs(int(bad)) - 1) / 4, r = row + quad;
      bad &= ~(0xfu << (4 * quad));
      mine |= quad == lane_index() / 4;
      if (r >= row_count_) continue;
      const double lse = exact_output_row<T, kModified, kDim>(params_, sequence_.batch(), sequence_.head_kv(),
                                                              row_begin_ + r, column_v(), staging, r);
      if (lane_index() == 0 && slice_ == 0) store_lse_of(r, lse);
    }
    return mine;
  }

  FAE_DEVICE void store_lse_of(int r, double lse) const {
    store_lse<T>(params_.call.lse, sequence_.batch(), sequence_.head_q() + rows_.head(r),
                 sequence_.first_query() + rows_.query(r), lse);
  }

  // Of a range of keys, as it is: see MergePartials.
  FAE_DEVICE void store_partial(const FragC (&out)[kM][kDim / 8], const OnlineSoftmax<kM>& softmax,
                                int row) const {
    const Partials& to = params_.partials;
    const Work work = work_of(opaque(int(block_index())));
    const int g = lane_index() / 4, t = lane_index() % 4;
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = row + 16 * m + 8 * half + g;
        if (r >= row_count_) continue;
        const int64_t at = to.at(work.range, work.unit, row_begin_ + r);
        if (t == 0 && slice_ == 0) {
          store_global(to.max + at, softmax.max[m][half]);
          store_global(to.sum + at, softmax.sum[m][half]);
        }
        float* const target = to.out + at * to.columns + column_v() + 2 * t;
        FAE_UNROLL
        for (int n = 0; n < kDim / 8; ++n) {
          const FloatPair pair{out[m][n][2 * half], out[m][n][2 * half + 1]};
          store_global(reinterpret_cast<FloatPair*>(target + 8 * n), pair);
        }
      }
    }
  }

  const Params& params_;
  const Problem& p_;
  const Smem<std::byte> smem_;
  const SharedSequence<T> sequence_;
  int slice_;      // of the output's columns
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
