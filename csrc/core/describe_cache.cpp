#include "core/describe_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fae {
namespace {

// Of lengths that cannot be read here, the most that there can be.
int64_t most_keys(const KeyCache& cache, const CacheCallDesc& call, int64_t batch) {
  const bool readable = !call.cache_lengths.present || std::strcmp(call.q.device, "cpu") == 0;
  if (!readable) return cache.capacity;
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) most = std::max(most, cache.end(b) - cache.first(b));
  return most;
}

}  // namespace

Problem make_problem(const CacheCallDesc& call) {
  Problem p;
  p.dtype = call.q.dtype;
  p.batch = call.batch();
  const bool packed = call.cu_seqlens_q.present;
  const Axes4 q = attention_axes(call.q, Layout::kBshd);
  const Axes4 k = attention_axes(call.k_cache, Layout::kBshd);
  p.heads_q = q.shape[1];
  p.seq_q = q.shape[2];
  p.dim = q.shape[3];
  p.heads_kv = k.shape[1];
  p.dim_v = call.v_cache.shape[3];
  p.q = attention_view(call.q, Layout::kBshd);
  p.k = attention_view(call.k_cache, Layout::kBshd);
  p.v = attention_view(call.v_cache, Layout::kBshd);
  if (packed) {
    bool known = true;
    p.packing.starts_q = integers_of(call.cu_seqlens_q);
    p.packing.total_q = q.shape[2];
    p.seq_q = longest_sequence(call.cu_seqlens_q, q.shape[2], call.max_seqlen_q, &known);
  }

  KeyCache& cache = p.cache;
  cache.capacity = call.capacity();
  cache.lengths = integers_of(call.cache_lengths);
  cache.length = call.cache_length;
  cache.added = call.added();
  cache.left_pad = integers_of(call.cache_leftpad);
  cache.batch = integers_of(call.cache_batch_idx);
  cache.entries = call.k_cache.shape[0];
  if (const TensorDesc& table = call.block_table; table.present) {
    cache.pages = {integers_of(table), table.stride[1], call.k_cache.shape[1], call.k_cache.shape[0]};
  }
  p.seq_kv = most_keys(cache, call, p.batch);

  p.band_rule = {call.causal, call.window_left, call.window_right};
  p.score.scale = call.scale ? *call.scale : 1.0 / std::sqrt(double(p.dim));
  p.score.softcap = call.softcap;
  p.score.alibi = per_head(call.alibi_slopes);
  p.score.sinks = per_head(call.sinks);
  return p;
}

}  // namespace fae
