// A call on a cache of keys and values, as a caller handed it in: see describe.h.
#pragma once

#include "core/describe.h"

namespace fae {

struct CacheCallDesc {
  TensorDesc q;                 // (batch, seq_q, heads_q, dim); with cu_seqlens_q (total_q, heads_q, dim)
  TensorDesc k_cache, v_cache;  // (entries, capacity, heads_kv, dim); in pages (pages, page_size, ...)
  TensorDesc k, v;              // to be appended: (batch, seq_new, heads_kv, dim); both or none
  TensorDesc cache_lengths;     // (batch,) int32 or int64; none: cache_length
  TensorDesc block_table;       // (batch, pages of a sequence) int32 or int64; with it the cache is in pages
  TensorDesc cache_batch_idx;   // (batch,) int32 or int64: whose entry of the cache
  TensorDesc cache_leftpad;     // (batch,) int32 or int64: keys at the begin of an entry that do not count
  TensorDesc rotary_cos, rotary_sin;  // (positions, rotary_dim / 2), floating; both or none
  TensorDesc cu_seqlens_q;            // (batch + 1,) int32 or int64; q is packed then
  TensorDesc alibi_slopes, sinks;
  int64_t cache_length = 0;
  int64_t max_seqlen_q = -1;
  bool rotary_interleaved = false;
  Causal causal = Causal::kNone;
  int64_t window_left = -1;
  int64_t window_right = -1;
  std::optional<double> scale;
  double softcap = 0.0;

  bool appends() const { return k.present; }
  bool rotates() const { return rotary_cos.present; }
  // Whether each query is turned by its own position; else all by that of the first.
  bool queries_move() const { return causal != Causal::kNone || window_left >= 0 || window_right >= 0; }
  int64_t batch() const { return cu_seqlens_q.present ? cu_seqlens_q.shape[0] - 1 : q.shape[0]; }
  int64_t added() const { return k.present ? k.shape[1] : 0; }
  int64_t capacity() const {
    if (k_cache.shape[0] == 0) return 0;  // whatever a table or an index says
    return block_table.present ? block_table.shape[1] * k_cache.shape[1] : k_cache.shape[1];
  }
};

std::optional<CallError> validate(const CacheCallDesc& call);

// Requires validate(call) to have found nothing, and what is appended to be counted in.
Problem make_problem(const CacheCallDesc& call);

}  // namespace fae
