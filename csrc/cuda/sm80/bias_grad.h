// Gradient of the bias in its own, perhaps broadcast, shape: a block makes one tile of it and
// goes over all tiles of scores that share it, in a fixed order and without atomics.
#pragma once

#include "cuda/sm80/config.h"
#include "cuda/tile/gmem_tile.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/product.h"
#include "cuda/tile/score_grad.h"

namespace fae::cuda::sm80 {

// Head dims of any length: operands come in slices of kDim columns.
template <class T, int kDim>
class BiasGrad {
  static constexpr int kWarps = 4;

 public:
  using Params = BackwardParams;
  static constexpr int kTileQ = 16 * kWarps;
  static constexpr int kTileKV = 64;

 private:
  using TileQ = SmemTile<T, kTileQ, kDim>;
  using TileKV = SmemTile<T, kTileKV, kDim>;
  using Ring = Pipeline<2, TileKV::kBytes + TileQ::kBytes>;
  using Scores = FragC[1][kTileKV / 8];
  // dS at the end: rows one word longer than a multiple of the banks.
  static constexpr int kSumPitch = kTileKV + 1;

 public:
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSumBytes = kTileQ * kSumPitch * int(sizeof(float));
  static constexpr int kSharedBytes = Ring::kBytes > kSumBytes ? Ring::kBytes : kSumBytes;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) { BiasGrad(params).run_block(); }

 private:
  // A position in the loop over everything that shares the block's tile of the bias.
  struct Place {
    BlockSequence sequence;
    int head, query, key;
    bool done;
  };

  explicit FAE_DEVICE BiasGrad(const Params& params)
      : params_(params), p_(params.call.problem), shape_(params.call.dbias_shape), smem_(shared_memory()) {
    // Blocks: (bias batch, bias head, query tile, key tile), one tile where the axis is broadcast.
    const int64_t key_tiles = shape_[3] == 1 ? 1 : (p_.seq_kv + kTileKV - 1) / kTileKV;
    const int64_t query_tiles = shape_[2] == 1 ? 1 : (p_.seq_q + kTileQ - 1) / kTileQ;
    int64_t rest = block_index();
    key_ = int(rest % key_tiles) * kTileKV;
    rest /= key_tiles;
    query_ = int(rest % query_tiles) * kTileQ;
    rest /= query_tiles;
    head_ = int(rest % shape_[1]);
    batch_ = int(rest / shape_[1]);
  }

  FAE_DEVICE Place first() const {
    Place at{BlockSequence(p_, batch_), head_, query_, key_, false};
    if (!is_visible(at)) advance(at);
    return at;
  }
  // To the next visible tile of scores.
  FAE_DEVICE void advance(Place& at) const {
    do {
      if (shape_[3] == 1 && (at.key += kTileKV) < p_.seq_kv) continue;
      at.key = key_;
      if (shape_[2] == 1 && (at.query += kTileQ) < p_.seq_q) continue;
      at.query = query_;
      if (shape_[1] == 1 && ++at.head < p_.heads_q) continue;
      at.head = head_;
      if (shape_[0] == 1 && at.sequence.batch + 1 < p_.batch) {
        at.sequence = BlockSequence(p_, at.sequence.batch + 1);
        continue;
      }
      at.done = true;
    } while (!at.done && !is_visible(at));
  }
  FAE_DEVICE bool is_visible(const Place& at) const {
    return query_count(at) > 0 && classify_tile(at) != TileClass::kSkip;
  }
  FAE_DEVICE TileClass classify_tile(const Place& at) const {
    return classify(at.sequence.band(), at.sequence.kv_length, at.query, at.query + query_count(at), at.key,
                    at.key + kTileKV);
  }
  FAE_DEVICE int query_count(const Place& at) const {
    const int left = at.sequence.seq_q - at.query;
    return left < kTileQ ? left : kTileQ;
  }

  FAE_DEVICE void load(const Place& at, Smem<std::byte> slot, int step) const {
    const int steps_k = int((p_.dim + kDim - 1) / kDim);
    const bool score = step < steps_k;
    const int column = (score ? step : step - steps_k) * kDim;
    const int columns = int(score ? p_.dim : p_.dim_v);
    const int head_kv = at.head / int(p_.group()), keys_left = at.sequence.seq_kv - at.key;
    load_tile<kThreads>(
        TileKV{slot},
        RowSource<const T>(score ? p_.k : p_.v, at.sequence.batch, head_kv, at.sequence.first_key),
        PlainRows{at.key}, keys_left < kTileKV ? keys_left : kTileKV, column, columns,
        score ? params_.vector.k : params_.vector.v);
    load_tile<kThreads>(TileQ{slot + TileKV::kBytes},
                        RowSource<const T>(score ? p_.q : params_.call.dout, at.sequence.batch, at.head,
                                           at.sequence.first_query),
                        PlainRows{at.query}, query_count(at), column, columns,
                        score ? params_.vector.q : params_.vector.dout);
  }

  FAE_DEVICE void run_block() {
    Ring ring(smem_);
    const int row = warp_index() * 16;
    const int steps_k = int((p_.dim + kDim - 1) / kDim);
    const int steps = steps_k + int((p_.dim_v + kDim - 1) / kDim);
    Place next = first(), at = next;
    int next_step = 0;
    const auto load_next = [&](Smem<std::byte> slot) {
      if (next.done) return;
      load(next, slot, next_step);
      if (++next_step == steps) {
        next_step = 0;
        advance(next);
      }
    };
    Scores sum;
    clear(sum);
    ring.start(load_next);
    for (; !at.done; advance(at)) {
      Scores s, ds;
      clear(s);
      clear(ds);
      for (int step = 0; step < steps; ++step) {
        const Smem<std::byte> slot = ring.next(load_next);
        const TileQ rows{slot + TileKV::kBytes};
        if (step < steps_k) multiply_rows<T>(s, rows, row, TileKV{slot}, 0, params_.fast_fp32);
        else multiply_rows<T>(ds, rows, row, TileKV{slot}, 0, params_.fast_fp32);
      }
      // One head: rows are queries, and the statistics lie a group apart.
      ScoreTile tile{p_,           params_.scale,   tile_sequence(at.sequence, at.head),
                     PackedRows(), query_count(at), at.key};
      tile.rows.query_begin = at.query;
      constexpr FragC(*no_slope)[kTileKV / 8] = nullptr;
      score_gradients<true>(s, ds, no_slope, load_stats(at, row), tile, row,
                            classify_tile(at) != TileClass::kFull, p_.has_mask());
      FAE_UNROLL
      for (int n = 0; n < kTileKV / 8; ++n) {
        FAE_UNROLL
        for (int e = 0; e < 4; ++e) sum[0][n][e] += ds[0][n][e];
      }
    }
    copy_async_wait<0>();
    block_barrier();
    store(sum, row);
  }

  FAE_DEVICE LaneRowStats load_stats(const Place& at, int row) const {
    const int group = int(p_.group());
    LaneRowStats rows;
    FAE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int query = at.query + row + 8 * half + lane_index() / 4;
      // Rows that do not exist are hidden; they read the last one's.
      const int clamped = query < at.sequence.seq_q ? query : at.sequence.seq_q - 1;
      const int64_t index =
          params_.stats.place(at.sequence.batch, at.head / group, int64_t(at.sequence.first_query) * group) +
          int64_t(clamped) * group + at.head % group;
      rows.lse[half] = load_global(params_.stats.lse + index);
      rows.lse_low[half] = load_global(params_.stats.lse_low + index);
      rows.delta[half] = load_global(params_.stats.delta + index);
    }
    return rows;
  }

  FAE_DEVICE void store(const Scores& sum, int row) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const Smem<float> sums = smem_.template as<float>();
    FAE_UNROLL
    for (int n = 0; n < kTileKV / 8; ++n) {
      FAE_UNROLL
      for (int e = 0; e < 4; ++e) {
        store_shared(sums + ((row + g + e / 2 * 8) * kSumPitch + 8 * n + 2 * t + e % 2), sum[0][n][e]);
      }
    }
    block_barrier();
    const int rows = shape_[2] == 1 ? 1 : (int(p_.seq_q) - query_ < kTileQ ? int(p_.seq_q) - query_ : kTileQ);
    const int columns =
        shape_[3] == 1 ? 1 : (int(p_.seq_kv) - key_ < kTileKV ? int(p_.seq_kv) - key_ : kTileKV);
    const View4& target = params_.call.dbias;
    for (int index = thread_index(); index < rows * columns; index += kThreads) {
      const int r = index / columns, c = index % columns;
      float total = 0;
      for (int i = shape_[2] == 1 ? 0 : r; i < (shape_[2] == 1 ? kTileQ : r + 1); ++i) {
        for (int j = shape_[3] == 1 ? 0 : c; j < (shape_[3] == 1 ? kTileKV : c + 1); ++j) {
          total += load_shared(sums + (i * kSumPitch + j));
        }
      }
      const int64_t at = target.offset(batch_, head_, shape_[2] == 1 ? 0 : query_ + r) +
                         (shape_[3] == 1 ? 0 : int64_t(key_ + c) * target.stride[3]);
      store_as(target.data, p_.score.bias_dtype, at, total);
    }
  }

  const Params& params_;
  const Problem& p_;
  const int64_t* const shape_;  // of the bias
  const Smem<std::byte> smem_;
  int batch_, head_, query_, key_;  // where the block's tile begins in the bias
};

}  // namespace fae::cuda::sm80
