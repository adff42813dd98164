// What can be wrong with a call on a cache of keys and values; nothing is written before all is checked.
#include <algorithm>
#include <cstring>

#include "core/checks.h"
#include "core/describe_cache.h"
#include "core/overlap.h"

namespace fae {
namespace {

using namespace checks;

std::string text(int64_t n) { return std::to_string(n); }

std::optional<CallError> check_dtypes(const CacheCallDesc& call) {
  if (!is_floating(call.q.dtype)) {
    return CallError{Kind::kType, "q has dtype " + dtype_text(call.q) +
                                      ", but must be float16, bfloat16, float32 or float64"};
  }
  const Named same[] = {
      {"k_cache", &call.k_cache}, {"v_cache", &call.v_cache}, {"k", &call.k}, {"v", &call.v}};
  for (const Named& t : same) {
    if (t.tensor->present && t.tensor->dtype != call.q.dtype) {
      return CallError{Kind::kType, std::string(t.name) + " has dtype " + dtype_text(*t.tensor) +
                                        ", but must have q's dtype " + dtype_text(call.q)};
    }
  }
  const Named integers[] = {{"cache_lengths", &call.cache_lengths},
                            {"block_table", &call.block_table},
                            {"cache_batch_idx", &call.cache_batch_idx},
                            {"cache_leftpad", &call.cache_leftpad},
                            {"cu_seqlens_q", &call.cu_seqlens_q}};
  for (const Named& t : integers) {
    if (auto e = check_integers(t)) return e;
  }
  const Named floating[] = {{"rotary_cos", &call.rotary_cos},
                            {"rotary_sin", &call.rotary_sin},
                            {"alibi_slopes", &call.alibi_slopes},
                            {"sinks", &call.sinks}};
  for (const Named& t : floating) {
    if (auto e = check_floating(t)) return e;
  }
  return std::nullopt;
}

std::optional<CallError> check_devices(const CacheCallDesc& call) {
  const Named tensors[] = {{"k_cache", &call.k_cache},
                           {"v_cache", &call.v_cache},
                           {"k", &call.k},
                           {"v", &call.v},
                           {"cache_lengths", &call.cache_lengths},
                           {"block_table", &call.block_table},
                           {"cache_batch_idx", &call.cache_batch_idx},
                           {"cache_leftpad", &call.cache_leftpad},
                           {"rotary_cos", &call.rotary_cos},
                           {"rotary_sin", &call.rotary_sin},
                           {"cu_seqlens_q", &call.cu_seqlens_q},
                           {"alibi_slopes", &call.alibi_slopes},
                           {"sinks", &call.sinks}};
  for (const Named& t : tensors) {
    if (auto e = check_device(call.q, t)) return e;
  }
  return std::nullopt;
}

std::optional<CallError> check_rank(const Named& t, int rank, const char* axes) {
  if (!t.tensor->present || t.tensor->rank == rank) return std::nullopt;
  return value_error(quoted(t) + ", but must be " + axes);
}

// sizes: the wanted ones; -1 for any.
std::optional<CallError> check_sizes(const Named& t, const char* axes, const int64_t* sizes, int rank) {
  if (!t.tensor->present) return std::nullopt;
  bool same = t.tensor->rank == rank;
  for (int axis = 0; same && axis < rank; ++axis)
    same = sizes[axis] < 0 || t.tensor->shape[axis] == sizes[axis];
  if (same) return std::nullopt;
  std::string wanted;
  for (int axis = 0; axis < rank; ++axis)
    wanted += (axis ? ", " : "") + (sizes[axis] < 0 ? std::string("any") : text(sizes[axis]));
  return value_error(quoted(t) + ", but must be " + axes + " = (" + wanted + (rank == 1 ? ",)" : ")"));
}

std::optional<CallError> check_shapes(const CacheCallDesc& call) {
  const bool packed = call.cu_seqlens_q.present, paged = call.block_table.present;
  const Named q{"q", &call.q};
  if (auto e = check_rank({"cu_seqlens_q", &call.cu_seqlens_q}, 1, "(batch + 1,)")) return e;
  if (packed && call.cu_seqlens_q.shape[0] < 1) {
    return value_error(quoted({"cu_seqlens_q", &call.cu_seqlens_q}) + ", but must be (batch + 1,)");
  }
  if (auto e =
          check_rank(q, packed ? 3 : 4, packed ? "(total_q, heads_q, dim)" : "(batch, seq_q, heads_q, dim)"))
    return e;
  const char* const axes = paged ? "(pages, page_size, heads_kv, dim)" : "(batch, capacity, heads_kv, dim)";
  if (auto e = check_rank({"k_cache", &call.k_cache}, 4, axes)) return e;
  const int64_t batch = call.batch(), dim = call.q.shape[call.q.rank - 1];
  const int64_t *keys = call.k_cache.shape, heads_q = call.q.shape[call.q.rank - 2];
  const int64_t key_sizes[4] = {-1, -1, -1, dim};
  if (auto e = check_sizes({"k_cache", &call.k_cache}, axes, key_sizes, 4)) return e;
  const int64_t value_sizes[4] = {keys[0], keys[1], keys[2], -1};
  if (auto e = check_sizes({"v_cache", &call.v_cache}, axes, value_sizes, 4)) return e;
  const int64_t dim_v = call.v_cache.shape[3];
  if (dim < 1 || dim > 1024 || dim_v < 1 || dim_v > 1024) {
    return value_error("q has shape " + shape_text(call.q) + " and v_cache " + shape_text(call.v_cache) +
                       ", but head dims must be between 1 and 1024");
  }
  if (keys[2] == 0 ? heads_q != 0 : heads_q % keys[2] != 0) {
    return value_error("q has " + text(heads_q) + " heads (shape " + shape_text(call.q) +
                       "), but the number must be a multiple of the " + text(keys[2]) +
                       " heads of k_cache (shape " + shape_text(call.k_cache) + ")");
  }
  if (paged && keys[1] < 1) {
    return value_error(quoted({"k_cache", &call.k_cache}) + ", but a page must hold at least one key");
  }
  if (call.k.present != call.v.present) {
    return value_error(std::string(call.k.present ? "k" : "v") + " was given without " +
                       (call.k.present ? "v" : "k"));
  }
  const int64_t new_keys[4] = {batch, -1, keys[2], dim};
  if (auto e = check_sizes({"k", &call.k}, "(batch, seq_new, heads_kv, dim)", new_keys, 4)) return e;
  const int64_t new_values[4] = {batch, call.added(), keys[2], dim_v};
  if (auto e = check_sizes({"v", &call.v}, "(batch, seq_new, heads_kv, dim_v)", new_values, 4)) return e;
  for (const Named& t :
       {Named{"cache_lengths", &call.cache_lengths}, Named{"cache_batch_idx", &call.cache_batch_idx},
        Named{"cache_leftpad", &call.cache_leftpad}}) {
    if (auto e = check_sizes(t, "(batch,)", &batch, 1)) return e;
  }
  const int64_t table[2] = {batch, -1};
  if (auto e = check_sizes({"block_table", &call.block_table}, "(batch, pages of a sequence)", table, 2))
    return e;
  if (paged && call.cache_batch_idx.present) {
    return value_error("cache_batch_idx must be None together with block_table, whose rows say it already");
  }
  if (!paged && !call.cache_batch_idx.present && keys[0] < batch) {
    return value_error(quoted({"k_cache", &call.k_cache}) + ", but must have at least q's batch, " +
                       text(batch));
  }
  if (auto e = check_slopes(call.alibi_slopes, batch, heads_q)) return e;
  return check_sizes({"sinks", &call.sinks}, "(heads_q,)", &heads_q, 1);
}

std::optional<CallError> check_rotary(const CacheCallDesc& call) {
  const TensorDesc &cos = call.rotary_cos, &sin = call.rotary_sin;
  if (cos.present != sin.present) {
    return value_error(std::string(cos.present ? "rotary_cos" : "rotary_sin") + " was given without " +
                       (cos.present ? "rotary_sin" : "rotary_cos"));
  }
  if (!cos.present) return std::nullopt;
  if (!call.appends()) return value_error("rotary_cos was given without k and v, whose positions it is for");
  if (call.cu_seqlens_q.present) {
    return value_error("rotary_cos must be None together with cu_seqlens_q");
  }
  const int64_t any[2] = {-1, -1};
  if (auto e = check_sizes({"rotary_cos", &cos}, "(positions, rotary_dim / 2)", any, 2)) return e;
  if (auto e = check_sizes({"rotary_sin", &sin}, "(positions, rotary_dim / 2)", cos.shape, 2)) return e;
  if (2 * cos.shape[1] > call.q.shape[3]) {
    return value_error(quoted({"rotary_cos", &cos}) +
                       ", but rotary_dim / 2 must be at most half of q's dim " + text(call.q.shape[3]));
  }
  return std::nullopt;
}

// What is written must be a place of its own.
std::optional<CallError> check_memory(const CacheCallDesc& call) {
  if (!call.appends()) return std::nullopt;
  const Named caches[] = {{"k_cache", &call.k_cache}, {"v_cache", &call.v_cache}};
  for (const Named& cache : caches) {
    if (overlaps_itself(*cache.tensor)) {
      return value_error(quoted(cache) + " and strides that make several of its elements share memory; " +
                         "to append, it must have none that do");
    }
    for (const Named& t : {Named{"q", &call.q}, Named{"k", &call.k}, Named{"v", &call.v}}) {
      if (share_memory(*cache.tensor, *t.tensor)) {
        return value_error(std::string(cache.name) + " overlaps the memory of " + t.name);
      }
    }
  }
  if (share_memory(call.k_cache, call.v_cache)) {
    return value_error("k_cache overlaps the memory of v_cache; to append, they must be apart");
  }
  return std::nullopt;
}

std::optional<CallError> check_entry(const Named& t, int64_t b, int64_t value, int64_t most, const char* of) {
  if (value >= 0 && value <= most) return std::nullopt;
  return value_error(std::string(t.name) + " is " + text(value) + " for sequence " + text(b) +
                     ", but must be between 0 and " + text(most) + ": " + of);
}

std::optional<CallError> check_pages(const CacheCallDesc& call, int64_t b, int64_t first, int64_t end) {
  const TensorDesc& table = call.block_table;
  const int64_t size = call.k_cache.shape[1], pages = call.k_cache.shape[0];
  const Integers row{static_cast<const char*>(table.data) + b * table.stride[0] * size_of(table.dtype),
                     table.stride[1], table.dtype == DType::kInt64};
  for (int64_t n = first / size; n * size < end; ++n) {
    if (row.at(n) < 0 || row.at(n) >= pages) {
      return value_error("block_table has " + text(row.at(n)) + " at (" + text(b) + ", " + text(n) +
                         "), where sequence " + text(b) + " has keys, but must name one of the " +
                         text(pages) + " pages of k_cache");
    }
  }
  return std::nullopt;
}

// Whether lengths, tables and the like have values that can be read here.
bool are_readable(const CacheCallDesc& call) {
  if (std::strcmp(call.q.device, "cpu") != 0) return false;
  for (const TensorDesc* t : {&call.cache_lengths, &call.cache_leftpad, &call.cache_batch_idx,
                              &call.block_table, &call.cu_seqlens_q}) {
    int64_t count = t->present ? 1 : 0;
    for (int axis = 0; axis < t->rank; ++axis) count *= t->shape[axis];
    if (count && !t->data) return false;  // a description without values
  }
  return true;
}

// "7", or what is known of a length that cannot be read.
std::string length_text(const CacheCallDesc& call, int64_t length) {
  return (call.cache_lengths.present && !are_readable(call) ? "at least " : "") + text(length);
}

// Whether sequence b, of that length, has room for those that are appended.
std::optional<CallError> check_room(const CacheCallDesc& call, int64_t b, int64_t length) {
  const int64_t capacity = call.capacity(), added = call.added();
  if (length <= capacity && added <= capacity - length) return std::nullopt;
  const std::string more = added ? " and " + text(added) + " to append" : "";
  if (call.block_table.present) {
    return CallError{Kind::kRuntime, "block_table has shape " + shape_text(call.block_table) +
                                         " with pages of " + text(call.k_cache.shape[1]) +
                                         " keys: room for " + text(capacity) + ", but sequence " + text(b) +
                                         " has " + length_text(call, length) + more};
  }
  return value_error("cache_lengths is " + length_text(call, length) + " for sequence " + text(b) + more +
                     ", but k_cache has room for " + text(capacity) + ": its shape is " +
                     shape_text(call.k_cache));
}

// Whether the tables of angles reach as far as its keys and queries.
std::optional<CallError> check_positions(const CacheCallDesc& call, int64_t b, int64_t length) {
  if (!call.rotates()) return std::nullopt;
  const int64_t queries = call.queries_move() ? call.q.shape[1] : 1;
  const int64_t end = length + std::max(call.added(), queries);
  if (end <= call.rotary_cos.shape[0]) return std::nullopt;
  return value_error(quoted({"rotary_cos", &call.rotary_cos}) + ", but sequence " + text(b) +
                     " has positions up to " + length_text(call, end - 1));
}

// Of lengths that cannot be read here, only that they are not negative is sure.
std::optional<CallError> check_least_length(const CacheCallDesc& call) {
  const int64_t least = call.cache_lengths.present ? 0 : call.cache_length;
  if (call.batch() == 0) return std::nullopt;
  if (auto e = check_room(call, 0, least)) return e;
  return check_positions(call, 0, least);
}

std::optional<CallError> check_values(const CacheCallDesc& call) {
  if (!call.cache_lengths.present && call.cache_length < 0) {
    return value_error("cache_lengths is " + text(call.cache_length) + ", but must be at least 0");
  }
  if (!are_readable(call)) return check_least_length(call);
  const Integers lengths = integers_of(call.cache_lengths), pads = integers_of(call.cache_leftpad);
  const Integers entries = integers_of(call.cache_batch_idx);
  for (int64_t b = 0; b < call.batch(); ++b) {
    const int64_t length = lengths.present() ? lengths.at(b) : call.cache_length;
    if (length < 0)
      return value_error("cache_lengths is " + text(length) + " for sequence " + text(b) +
                         ", but must be at least 0");
    if (auto e = check_room(call, b, length)) return e;
    const int64_t pad = pads.present() ? pads.at(b) : 0;
    if (auto e = check_entry({"cache_leftpad", nullptr}, b, pad, length, "the sequence's cache_lengths"))
      return e;
    if (entries.present()) {
      if (auto e = check_entry({"cache_batch_idx", nullptr}, b, entries.at(b), call.k_cache.shape[0] - 1,
                               "an entry of k_cache"))
        return e;
    }
    if (call.block_table.present) {
      if (auto e = check_pages(call, b, pad, length + call.added())) return e;
    }
    if (auto e = check_positions(call, b, length)) return e;
  }
  return check_starts({"cu_seqlens_q", &call.cu_seqlens_q}, {"q", &call.q}, call.max_seqlen_q,
                      "max_seqlen_q");
}

}  // namespace

std::optional<CallError> validate(const CacheCallDesc& call) {
  if (auto e = check_shapes(call)) return e;
  if (auto e = check_dtypes(call)) return e;
  if (auto e = check_devices(call)) return e;
  if (auto e = check_rotary(call)) return e;
  if (auto e = check_options(call.window_left, call.window_right, call.scale, call.softcap)) return e;
  if (auto e = check_memory(call)) return e;
  return check_values(call);
}

}  // namespace fae
