// Gradients of keys and values on mma.sync, and with atomics of the queries: a block keeps
// kTileKV keys of one K/V head and goes over the packed query rows that see them.
//
//   P = exp(score - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  dK = dS^T Q,  dQ = dS K
//
// With dropout, dV is of what it leaves of P, and dO V^T of what it leaves of that.
// (FlashAttention-2, section 3.1.) Scores are computed transposed, keys as rows: P^T and dS^T
// are then in the registers that the products after them want; only dS goes through shared
// memory, for dQ.
#pragma once

#include "cuda/sm80/config.h"
#include "cuda/tile/exact_row.h"
#include "cuda/tile/gmem_tile.h"
#include "cuda/tile/mask_class.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/product.h"
#include "cuda/tile/score_grad.h"

namespace fae::cuda::sm80 {

// kDim: columns of all tiles. kSplit: the head dims are longer; operands of scores and dP come in
// slices of kDim, and the block makes one slice of dK and of dV, and no dQ.
template <class T, int kDim, bool kSplit, bool kModified>
class KeyGrad {
  using Config = KeyGradConfig<T, kDim, kSplit, kModified>;

 public:
  using Params = BackwardParams;
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr int kTileKV = Config::kTileKV;

 private:
  using TileQ = SmemTile<T, kTileQ, kDim>;
  using TileKV = SmemTile<T, kTileKV, kDim>;
  using TileDS = SmemTile<T, kTileKV, kTileQ>;  // dS^T
  static constexpr int kResidentBytes = kSplit ? 0 : 2 * TileKV::kBytes + TileDS::kBytes;
  using Ring = Pipeline<2, kSplit ? TileKV::kBytes + TileQ::kBytes : 2 * TileQ::kBytes>;
  using Scores = FragC[1][kTileQ / 8];
  using Sums = FragC[1][kDim / 8];
  static_assert(2 * TileKV::kBytes <= kResidentBytes + Ring::kBytes, "room to stage dK and dV");

 public:
  static constexpr int kThreads = Config::kWarps * kWarpSize;
  static constexpr int kSharedBytes = kResidentBytes + Ring::kBytes + SharedSequence<T>::kBytes;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    KeyGrad block(params);
    if (block.key_count_ > 0) block.run_block();
  }

 private:
  explicit FAE_DEVICE KeyGrad(const Params& params)
      : params_(params),
        p_(params.call.problem),
        smem_(shared_memory()),
        sequence_(smem_ + (kSharedBytes - SharedSequence<T>::kBytes)) {
    const BlockOrder::Place place = params.order.place(block_index());
    const int slices = kSplit ? int(((p_.dim > p_.dim_v ? p_.dim : p_.dim_v) + kDim - 1) / kDim) : 1;
    const int64_t unit = place.unit / slices;
    slice_ = int(place.unit % slices);
    const BlockSequence sequence(p_, unit / p_.heads_kv);
    const int head_kv = int(unit % p_.heads_kv);
    key_ = int(place.tile * kTileKV);
    key_count_ = sequence.seq_kv - key_ < kTileKV ? sequence.seq_kv - key_ : kTileKV;
    if (key_count_ <= 0) return;  // past the end of its sequence
    sequence_.write(p_, sequence, head_kv, params.call.dout,
                    params.stats.place(sequence.batch, head_kv, sequence.first_query * p_.group()));
    const int seen_end = key_ + key_count_ < sequence.kv_length ? key_ + key_count_ : sequence.kv_length;
    if (key_ >= seen_end) return;
    KeyRange queries = seeing_queries(sequence.band(), sequence.seq_q, key_, seen_end);
    if (p_.masking.has_ranges()) {
      queries = trim_queries<kThreads>(p_, sequence.batch, head_kv, key_, seen_end, queries);
    }
    if (queries.empty()) return;
    const int group = int(p_.group());
    row_ = int(queries.begin) * group / kTileQ * kTileQ;
    row_end_ = int(queries.end) * group;
    load_row_ = row_;
  }

  FAE_DEVICE int packed_rows() const { return sequence_.seq_q() * int(p_.group()); }
  FAE_DEVICE int column() const { return slice_ * kDim; }
  FAE_DEVICE TileKV resident_k() const { return {smem_}; }
  FAE_DEVICE TileKV resident_v() const { return {smem_ + TileKV::kBytes}; }
  FAE_DEVICE TileDS resident_ds() const { return {smem_ + 2 * TileKV::kBytes}; }
  FAE_DEVICE int steps_k() const { return kSplit ? int((p_.dim + kDim - 1) / kDim) : 1; }
  FAE_DEVICE int steps_v() const { return kSplit ? int((p_.dim_v + kDim - 1) / kDim) : 1; }

  using Operand = Slices<const T>;
  FAE_DEVICE Operand k() const { return {sequence_.k(p_), int(p_.dim), params_.vector.k}; }
  FAE_DEVICE Operand v() const { return {sequence_.v(p_), int(p_.dim_v), params_.vector.v}; }
  FAE_DEVICE Operand q() const { return {sequence_.q(p_), int(p_.dim), params_.vector.q}; }
  FAE_DEVICE Operand dout() const {
    return {sequence_.dout(params_.call.dout), int(p_.dim_v), params_.vector.dout};
  }
  FAE_DEVICE void load_keys(TileKV tile, const Operand& x, int column) const {
    load_tile<kThreads>(tile, x.source, PlainRows{key_}, key_count_, column, x.columns, x.vector);
  }
  FAE_DEVICE void load_rows(TileQ tile, const Operand& x, int column) const {
    const int left = packed_rows() - load_row_;
    load_tile<kThreads>(tile, x.source, PackedRows(load_row_, p_.group()), left < kTileQ ? left : kTileQ,
                        column, x.columns, x.vector);
  }

  // The next item of the sequence. Whole: Q and dO of a tile of rows. Split: slices of K and Q,
  // slices of V and dO, then the slices of dO and Q that dV and dK are made of.
  FAE_DEVICE void load_next(Smem<std::byte> slot) {
    if (load_row_ >= row_end_) return;
    if constexpr (!kSplit) {
      load_rows(TileQ{slot}, q(), 0);
      load_rows(TileQ{slot + TileQ::kBytes}, dout(), 0);
      load_row_ += kTileQ;
    } else {
      // Loads are long code: one of keys and two of rows, whatever they are of.
      const int step = load_step_, last = steps_k() + steps_v();
      const bool second = step >= steps_k() && step < last;
      const int c = step == last ? column() : (second ? step - steps_k() : step) * kDim;
      if (step == last) load_rows(TileQ{slot}, dout(), c);
      else load_keys(TileKV{slot}, second ? v() : k(), c);
      load_rows(TileQ{slot + TileKV::kBytes}, second ? dout() : q(), c);
      load_step_ = step == last ? 0 : step + 1;
      if (step == last) load_row_ += kTileQ;
    }
  }

  FAE_DEVICE void run_block() {
    Ring ring(smem_ + kResidentBytes);
    const auto load = [this](Smem<std::byte> slot) { load_next(slot); };
    const bool fast = params_.fast_fp32;
    const int key_row = warp_index() * 16;  // this warp's keys within the tile
    Sums dk, dv;
    clear(dk);
    clear(dv);
    if constexpr (!kSplit) {
      load_keys(resident_k(), k(), 0);
      load_keys(resident_v(), v(), 0);
    }
    ring.start(load);
    for (int row = row_; row < row_end_; row += kTileQ) {
      const ScoreTile tile = score_tile(row);
      uint32_t kept = 0;  // by dropout; found before scores take up registers
      if constexpr (kModified) {
        if (p_.dropout.present()) kept = kept_elements<true, kTileQ / 8>(tile, key_row, 0);
      }
      Scores p, ds;
      clear(p);
      clear(ds);
      const TileClass mask_class =
          p_.has_mask() ? classify_masks<kTileQ, 16>(tile, 0, key_row) : TileClass::kFull;
      // A warp whose keys nobody of the tile sees only keeps step with the others.
      const bool seen = mask_class != TileClass::kSkip;
      if constexpr (!kSplit) {
        const Smem<std::byte> slot = ring.next(load);
        const TileQ q{slot}, dout{slot + TileQ::kBytes};
        if (seen) {
          multiply_rows<T, true>(p, resident_k(), key_row, q, 0, fast);
          score_gradients(
              p, tile, mask_class, kept, key_row, row,
              [&](Scores& weights) {
                accumulate<T>(dv, weights, dout, fast);
                multiply_rows<T>(ds, resident_v(), key_row, dout, 0, fast);
              },
              ds);
          accumulate<T>(dk, ds, q, fast);
        }
        if (params_.dq_sum) add_query_gradients(ds, row, key_row);
      } else {
        for (int step = 0; step < steps_k(); ++step) {
          const Smem<std::byte> slot = ring.next(load);
          if (seen) multiply_rows<T, true>(p, TileKV{slot}, key_row, TileQ{slot + TileKV::kBytes}, 0, fast);
        }
        Scores weights;
        score_gradients(
            p, tile, mask_class, kept, key_row, row,
            [&](Scores& w) {
              copy(weights, w);
              for (int step = 0; step < steps_v(); ++step) {
                const Smem<std::byte> slot = ring.next(load);
                if (seen) multiply_rows<T>(ds, TileKV{slot}, key_row, TileQ{slot + TileKV::kBytes}, 0, fast);
              }
            },
            ds);
        const Smem<std::byte> slot = ring.next(load);
        if (seen) {
          accumulate<T>(dv, weights, TileQ{slot}, fast);
          accumulate<T>(dk, ds, TileQ{slot + TileKV::kBytes}, fast);
        }
      }
    }
    copy_async_wait<0>();
    block_barrier();
    store(dk, dv, key_row);
  }

  // The keys of the block against the packed rows from `row` on.
  FAE_DEVICE ScoreTile score_tile(int row) const {
    const int left = packed_rows() - row;
    return {p_,
            params_.scale,
            tile_sequence(sequence_),
            PackedRows(row, p_.group()),
            left < kTileQ ? left : kTileQ,
            key_};
  }

  // s: dot products of this warp's keys with the rows of a tile. Makes P of them, hands what dropout leaves
  // of P to use(p), which also leaves dP in ds, and makes dS of that.
  template <class Use>
  FAE_DEVICE void score_gradients(Scores& s, const ScoreTile& tile, TileClass mask_class, uint32_t kept,
                                  int key_row, int row, Use&& use, Scores& ds) const {
    const bool partial =
        classify(sequence_.band(), sequence_.kv_length(), tile.rows.query_begin,
                 tile.rows.query(tile.row_count - 1) + 1, key_, key_ + kTileKV) != TileClass::kFull;
    const bool masked = mask_class != TileClass::kFull;
    FragC slope[1][kModified ? kTileQ / 8 : 1];
    if constexpr (kModified) {
      finish_scores<true, true>(s, slope, tile, key_row, 0, partial, masked);
    } else if (partial || masked) {
      constexpr FragC(*no_slope)[kTileQ / 8] = nullptr;
      finish_scores<false, true>(s, no_slope, tile, key_row, 0, partial, masked);
    }
    const int64_t at = sequence_.stats_row() + row;
    probabilities_transposed<kNeedsLow<T, kModified>>(s, params_.stats, at, params_.scale.natural);
    if constexpr (kModified) {
      multiply_elements(slope, s);
      if (p_.dropout.present()) drop(s[0], kept);
      use(s);
      if (p_.dropout.present()) scale_kept(ds[0], kept, float(p_.dropout.keep_scale));
      gradients_transposed(ds, slope, params_.stats, at);
    } else {
      use(s);
      gradients_transposed(ds, s, params_.stats, at);
    }
  }

  // dQ of the rows from `row` on: all warps' dS^T meet in shared memory, and each warp makes
  // 16 rows of a part of the columns.
  FAE_DEVICE void add_query_gradients(const Scores& ds, int row, int key_row) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    // Modified scores need the registers that these addresses would take from tile to tile.
    const LaneChunk pair = lane_pair(resident_ds(), (kModified ? opaque(key_row) : key_row) + g);
    FAE_UNROLL
    for (int n = 0; n < kTileQ / 8; ++n) {
      store_pair<TileDS>(pair, n, ds[0][n][0], ds[0][n][1]);
      store_pair<TileDS>(TileDS::move(pair, 8, 0), n, ds[0][n][2], ds[0][n][3]);
    }
    block_barrier();
    constexpr int kRowWarps = kTileQ / 16, kColumnWarps = Config::kWarps / kRowWarps;
    constexpr int kCols = kDim / kColumnWarps;
    const int warp = kModified && sizeof(T) == 4 ? opaque(warp_index()) : warp_index();
    const int first_row = warp % kRowWarps * 16, first_column = warp / kRowWarps * kCols;
    FragC dq[1][kCols / 8];
    clear(dq);
    multiply_columns<T, kTileKV>(dq, resident_ds(), first_row, resident_k(), first_column, params_.fast_fp32);
    const int64_t first = sequence_.stats_row();
    FAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = row + first_row + 8 * half + g;
      if (r >= packed_rows()) continue;
      float* const sum = params_.dq_sum + (first + r) * params_.dim_padded + first_column + 2 * t;
      FAE_UNROLL
      for (int n = 0; n < kCols / 8; ++n) {
        if (first_column + 8 * n >= params_.dim_padded) break;
        add_global(sum + 8 * n, dq[0][n][2 * half]);
        add_global(sum + 8 * n + 1, dq[0][n][2 * half + 1]);
      }
    }
  }

  FAE_DEVICE void store(const Sums& dk, const Sums& dv, int key_row) const {
    const TileKV dk_tile{smem_}, dv_tile{smem_ + TileKV::kBytes};
    const uint32_t bad_top = stage(dk, dv, dk_tile, dv_tile, key_row, 0);
    const uint32_t bad_bottom = stage(dk, dv, dk_tile, dv_tile, key_row, 1);
    for (uint32_t half = 0; half < 2; ++half) {
      for (uint32_t bad = half ? bad_bottom : bad_top; bad;) {
        const int quad = (__builtin_ffs(int(bad)) - 1) / 4, r = key_row + 8 * int(half) + quad;
        bad &= ~(0xfu << (4 * quad));
        if (r >= key_count_) continue;
        exact_key_grad_row<T, kModified, kDim>(params_, sequence_.batch(), sequence_.head_kv(), key_ + r,
                                               column(), dk_tile, dv_tile, r);
      }
    }
    warp_barrier();
    const RowSource<T> dk_rows(params_.call.dk, sequence_.batch(), sequence_.head_kv(),
                               sequence_.first_key());
    const RowSource<T> dv_rows(params_.call.dv, sequence_.batch(), sequence_.head_kv(),
                               sequence_.first_key());
    store_rows<16>(dk_tile, dk_rows, PlainRows{key_}, key_row, key_count_, column(), int(p_.dim),
                   params_.vector.dk);
    store_rows<16>(dv_tile, dv_rows, PlainRows{key_}, key_row, key_count_, column(), int(p_.dim_v),
                   params_.vector.dv);
  }

  // Rounds rows lane / 4 + 8 half into the tiles; a bit for each lane that holds something
  // not finite.
  FAE_DEVICE uint32_t stage(const Sums& dk, const Sums& dv, TileKV dk_tile, TileKV dv_tile, int key_row,
                            int half) const {
    const float scale = float(p_.score.scale), kept = kModified ? float(p_.dropout.keep_scale) : 1.0f;
    const int r = key_row + 8 * half + lane_index() / 4;
    const LaneChunk dk_pair = lane_pair(dk_tile, r), dv_pair = lane_pair(dv_tile, r);
    float probe = 0;  // stays 0 when everything is finite
    FAE_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      const float kx = half ? dk[0][n][2] : dk[0][n][0], ky = half ? dk[0][n][3] : dk[0][n][1];
      const float vx = half ? dv[0][n][2] : dv[0][n][0], vy = half ? dv[0][n][3] : dv[0][n][1];
      probe += ((kx - kx) + (ky - ky)) + ((vx - vx) + (vy - vy));
      store_pair<TileKV>(dk_pair, n, kx * scale, ky * scale);
      store_pair<TileKV>(dv_pair, n, vx * kept, vy * kept);
    }
    return warp_ballot(probe != 0);
  }

  const Params& params_;
  const Problem& p_;
  const Smem<std::byte> smem_;
  const SharedSequence<T> sequence_;
  int slice_;                  // of the columns of dK and dV
  int key_;                    // first key of the block
  int key_count_;              // keys of its tile that exist
  int row_ = 0, row_end_ = 0;  // packed rows that see one of the keys, from a tile's first on
  // What load_next loads next.
  int load_row_ = 0;
  int load_step_ = 0;
};

}  // namespace fae::cuda::sm80
