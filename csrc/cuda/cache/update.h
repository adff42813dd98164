// New keys and values into a cache, and queries turned by their positions: a warp for each row of a head.
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
  static constexpr int kWarps = CacheParams::kWarps;

 public:
  using Params = CacheParams;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    if (params.queries) turn_queries(params);
    else append(params);
  }

 private:
  static FAE_DEVICE void turn_queries(const Params& params) {
    const Problem& p = params.problem;
    const int64_t count = p.batch * p.seq_q * p.heads_q;
    for (int64_t n = block_index() * kWarps + warp_index(); n < count; n += params.blocks * kWarps)
      turn_query(params, n / p.heads_q / p.seq_q, n % p.heads_q, n / p.heads_q % p.seq_q);
  }

  static FAE_DEVICE void turn_query(const Params& params, int64_t b, int64_t head, int64_t i) {
    const Problem& p = params.problem;
    const View4& out = params.update.turned;
    const int64_t position = p.cache.filled(b) + (params.update.queries_move ? i : 0);
    turn(p.dtype, {p.q.data, p.q.offset(b, head, i), p.q.stride[3]},
         {out.data, out.offset(b, head, i), out.stride[3]}, p.dim, params.update.rotary, position);
  }

  static FAE_DEVICE void append(const Params& params) {
    const int64_t runs = params.runs();
    for (int64_t n = block_index(); n < params.problem.batch * runs; n += params.blocks)
      append_run(params, n / runs, n % runs * Params::kRun);
  }

  // New rows of sequence b from the `first` of them, page by page: whether a page is written by more than one
  // sequence is found out once.
  static FAE_DEVICE void append_run(const Params& params, int64_t b, int64_t first) {
    const Problem& p = params.problem;
    const KeyCache& cache = p.cache;
    const Sequence sequence = p.sequence(b);
    const int64_t filled = cache.filled(b), size = page_size(cache);
    const int64_t last = first + Params::kRun < cache.added ? first + Params::kRun : cache.added;
    for (int64_t i = first; i < last;) {
      const int64_t piece = (filled + i) / size, left = (piece + 1) * size - filled;
      const int64_t end = left < last ? left : last;
      const bool shared = is_written_again(p, b, piece);
      for (int64_t n = warp_index(); n < (end - i) * p.heads_kv; n += kWarps) {
        const int64_t row = i + n / p.heads_kv;
        if (!shared || !is_overwritten(p, b, filled + row))
          append_row(params, sequence, b, n % p.heads_kv, row, filled + row);
      }
      i = end;
    }
  }

  static FAE_DEVICE void append_row(const Params& params, const Sequence& sequence, int64_t b, int64_t head,
                                    int64_t i, int64_t position) {
    const Problem& p = params.problem;
    const View4 &k = params.update.k, &v = params.update.v;
    const int64_t j = position - sequence.first_key;
    const RowPlace key{p.k.data, p.key_offset(p.k, sequence, head, j), p.k.stride[3]};
    const RowPlace value{p.v.data, p.key_offset(p.v, sequence, head, j), p.v.stride[3]};
    const RowPlace new_key{k.data, k.offset(b, head, i), k.stride[3]};
    if (params.update.rotary.present()) turn(p.dtype, new_key, key, p.dim, params.update.rotary, position);
    else copy(p.dtype, new_key, key, 0, p.dim);
    copy(p.dtype, {v.data, v.offset(b, head, i), v.stride[3]}, value, 0, p.dim_v);
  }

  // An entry of a cache without pages is one.
  static FAE_DEVICE int64_t page_size(const KeyCache& cache) {
    return cache.pages.present() ? cache.pages.page_size : cache.capacity;
  }
  static FAE_DEVICE int64_t page(const KeyCache& cache, int64_t b, int64_t piece) {
    return cache.pages.present() ? cache.pages.at(b, piece) : cache.entry(b);
  }
  // Most pages that new rows of a sequence touch.
  static FAE_DEVICE int64_t most_pieces(const KeyCache& cache) {
    const int64_t size = page_size(cache);
    return (cache.added + size - 1) / size + 1;
  }

  // What sequence `other` writes to the n-th page that it touches.
  struct Written {
    int64_t other, piece, begin, end;  // positions of its new rows, in any page
    bool any;
  };
  static FAE_DEVICE Written written(const KeyCache& cache, int64_t other, int64_t n) {
    const int64_t begin = cache.filled(other), end = begin + cache.added, size = page_size(cache);
    const int64_t piece = begin / size + n;
    return {other, piece, begin, end, piece * size < end};
  }

  // Whether a later sequence, or a later piece of this one, puts rows into the same page. For the block.
  static FAE_DEVICE bool is_written_again(const Problem& p, int64_t b, int64_t piece) {
    const KeyCache& cache = p.cache;
    if (!cache.pages.present() && !cache.batch.present()) return false;
    const int64_t pieces = most_pieces(cache), own = page(cache, b, piece);
    bool found = false;
    for (int64_t n = thread_index(); n < (p.batch - b) * pieces; n += kThreads) {
      const Written there = written(cache, b + n / pieces, n % pieces);
      if (!there.any || (there.other == b && there.piece <= piece)) continue;
      found |= page(cache, there.other, there.piece) == own;
    }
    return block_any(found);
  }

  // Whether a later row is put at the same place: of sequences that share one, the last one's stays.
  static FAE_DEVICE bool is_overwritten(const Problem& p, int64_t b, int64_t position) {
    const KeyCache& cache = p.cache;
    const int64_t size = page_size(cache), pieces = most_pieces(cache), own = page(cache, b, position / size);
    bool found = false;
    for (int64_t n = lane_index(); n < (p.batch - b) * pieces; n += kWarpSize) {
      const Written there = written(cache, b + n / pieces, n % pieces);
      if (!there.any || page(cache, there.other, there.piece) != own) continue;
      const int64_t same = there.piece * size + position % size;
      found |= same >= there.begin && same < there.end && (there.other > b || same > position);
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
      const float cos =
          load_as_float(rotary.cos, rotary.cos_dtype, row * rotary.cos_stride[0] + n * rotary.cos_stride[1]);
      const float sin =
          load_as_float(rotary.sin, rotary.sin_dtype, row * rotary.sin_stride[0] + n * rotary.sin_stride[1]);
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
