// New keys and values into a cache, and queries turned by their positions: a warp for each row.
#pragma once

#include "cuda/params.h"
#include "cuda/prim/convert.h"
#include "cuda/prim/warp.h"
#include "cuda/tile/score.h"

namespace fae::cuda {

FAE_DEVICE void store_rounded(void* data, DType dtype, int64_t at, float x) {
  switch (dtype) {
    case DType::kFloat16: store_global(static_cast<Float16*>(data) + at, to_float16(x)); break;
    case DType::kBFloat16: store_global(static_cast<BFloat16*>(data) + at, to_bfloat16(x)); break;
    default: store_global(static_cast<float*>(data) + at, x); break;
  }
}

// One row of a tensor in memory.
struct RowPlace {
  void* data;
  int64_t offset, stride;

  FAE_DEVICE int64_t at(int64_t c) const { return offset + c * stride; }
};

class UpdateCache {
  static constexpr int kWarps = 4;

 public:
  using Params = CacheParams;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    const Problem& p = params.problem;
    const int64_t heads = params.queries ? p.heads_q : p.heads_kv;
    const int64_t rows = params.queries ? p.seq_q : p.cache.added;
    const int64_t count = p.batch * rows * heads;
    for (int64_t n = block_index() * kWarps + warp_index(); n < count; n += params.blocks * kWarps) {
      const int64_t head = n % heads, i = n / heads % rows, b = n / heads / rows;
      if (params.queries) turn_query(params, b, head, i);
      else append(params, b, head, i);
    }
  }

 private:
  static FAE_DEVICE void turn_query(const Params& params, int64_t b, int64_t head, int64_t i) {
    const Problem& p = params.problem;
    const View4& out = params.update.turned;
    const int64_t position = p.cache.filled(b) + (params.update.queries_move ? i : 0);
    turn(p.dtype, {p.q.data, p.q.offset(b, head, i), p.q.stride[3]},
         {out.data, out.offset(b, head, i), out.stride[3]}, p.dim, params.update.rotary, position);
  }

  static FAE_DEVICE void append(const Params& params, int64_t b, int64_t head, int64_t i) {
    const Problem& p = params.problem;
    const View4 &k = params.update.k, &v = params.update.v;
    const Sequence sequence = p.sequence(b);
    const int64_t position = p.cache.filled(b) + i;
    if (is_overwritten(p, b, position)) return;
    const int64_t j = position - sequence.first_key;
    const RowPlace key{p.k.data, p.key_offset(p.k, sequence, head, j), p.k.stride[3]};
    const RowPlace value{p.v.data, p.key_offset(p.v, sequence, head, j), p.v.stride[3]};
    const RowPlace new_key{k.data, k.offset(b, head, i), k.stride[3]};
    if (params.update.rotary.present()) turn(p.dtype, new_key, key, p.dim, params.update.rotary, position);
    else copy(p.dtype, new_key, key, 0, p.dim);
    copy(p.dtype, {v.data, v.offset(b, head, i), v.stride[3]}, value, 0, p.dim_v);
  }

  // Whether a later row is put at the same place: of sequences that share one, the last one's stays.
  static FAE_DEVICE bool is_overwritten(const Problem& p, int64_t b, int64_t position) {
    const KeyCache& cache = p.cache;
    const bool paged = cache.pages.present();
    if (!paged && !cache.batch.present()) return false;
    const int64_t size = paged ? cache.pages.page_size : cache.capacity;
    const int64_t pieces = (cache.added + size - 1) / size + 1;  // pages that new rows of a sequence touch
    const int64_t own = paged ? cache.pages.at(b, position / size) : cache.entry(b);
    bool found = false;
    for (int64_t n = lane_index(); n < (p.batch - b) * pieces; n += kWarpSize) {
      const int64_t other = b + n / pieces, begin = cache.filled(other), end = begin + cache.added;
      const int64_t piece = begin / size + n % pieces;
      if (piece * size >= end) continue;
      const int64_t there = paged ? cache.pages.at(other, piece) : cache.entry(other);
      const int64_t same = piece * size + position % size;
      found |= there == own && same >= begin && same < end && (other > b || same > position);
    }
    return warp_ballot(found) != 0;
  }

  static FAE_DEVICE void copy(DType dtype, const RowPlace& from, const RowPlace& to, int64_t begin,
                              int64_t end) {
    for (int64_t c = begin + lane_index(); c < end; c += kWarpSize) {
      if (size_of(dtype) == 2) {
        const uint16_t x = load_global(static_cast<const uint16_t*>(from.data) + from.at(c));
        store_global(static_cast<uint16_t*>(to.data) + to.at(c), x);
      } else {
        const uint32_t x = load_global(static_cast<const uint32_t*>(from.data) + from.at(c));
        store_global(static_cast<uint32_t*>(to.data) + to.at(c), x);
      }
    }
  }

  // Rounded once, at the end.
  static FAE_DEVICE void turn(DType dtype, const RowPlace& from, const RowPlace& to, int64_t dim,
                              const Rotary& rotary, int64_t position) {
    const int64_t step = rotary.interleaved ? 2 : 1, partner = rotary.interleaved ? 1 : rotary.pairs;
    const int64_t row = rotary.row(position);
    for (int64_t n = lane_index(); n < rotary.pairs; n += kWarpSize) {
      const float cos = load_as_float(rotary.cos, rotary.cos_dtype,
                                      row * rotary.cos_stride[0] + n * rotary.cos_stride[1]);
      const float sin = load_as_float(rotary.sin, rotary.sin_dtype,
                                      row * rotary.sin_stride[0] + n * rotary.sin_stride[1]);
      const int64_t c = n * step;
      const float x = load_as_float(from.data, dtype, from.at(c));
      const float y = load_as_float(from.data, dtype, from.at(c + partner));
      store_rounded(to.data, dtype, to.at(c), x * cos - y * sin);
      store_rounded(to.data, dtype, to.at(c + partner), y * cos + x * sin);
    }
    copy(dtype, from, to, 2 * rotary.pairs, dim);
  }
};

}  // namespace fae::cuda
