// The operator on a cache of keys and values: appends, then attends.
#include <iterator>

#include "core/describe_cache.h"
#include "torch/arguments.h"
#include "torch/backend.h"
#include "torch/errors.h"
#include "torch/ops.h"

namespace fae::torch_ops {
namespace {

// The operator's tensors, in the order of the schema.
struct CacheTensor {
  const char* name;
  TensorDesc CacheCallDesc::* desc;
};
constexpr CacheTensor kRequired[] = {
    {"q", &CacheCallDesc::q}, {"k_cache", &CacheCallDesc::k_cache}, {"v_cache", &CacheCallDesc::v_cache}};
constexpr CacheTensor kOptional[] = {{"k", &CacheCallDesc::k},
                                     {"v", &CacheCallDesc::v},
                                     {"cache_lengths", &CacheCallDesc::cache_lengths},
                                     {"block_table", &CacheCallDesc::block_table},
                                     {"cache_batch_idx", &CacheCallDesc::cache_batch_idx},
                                     {"cache_leftpad", &CacheCallDesc::cache_leftpad},
                                     {"rotary_cos", &CacheCallDesc::rotary_cos},
                                     {"rotary_sin", &CacheCallDesc::rotary_sin},
                                     {"cu_seqlens_q", &CacheCallDesc::cu_seqlens_q},
                                     {"alibi_slopes", &CacheCallDesc::alibi_slopes},
                                     {"sinks", &CacheCallDesc::sinks}};

// What the operator takes off its stack.
struct CacheArguments {
  TensorRef required[std::size(kRequired)], optional[std::size(kOptional)];
  CacheCallDesc call;  // without tensors and causal
  int64_t causal = 0;
  bool return_lse = false;
  RunOptions options;
};

// Everything is taken before anything can fail: what is left on the stack would leak.
CacheArguments take(StableIValue* stack) {
  Arguments arguments(stack);
  CacheArguments taken;
  for (TensorRef& t : taken.required) t = arguments.tensor();
  for (TensorRef& t : taken.optional) t = arguments.optional_tensor();
  CacheCallDesc& call = taken.call;
  call.cache_length = arguments.integer();
  call.max_seqlen_q = arguments.integer();
  call.rotary_interleaved = arguments.boolean();
  taken.causal = arguments.integer();
  call.window_left = arguments.integer();
  call.window_right = arguments.integer();
  call.scale = arguments.optional_real();
  call.softcap = arguments.real();
  taken.return_lse = arguments.boolean();
  taken.options.num_splits = arguments.integer();
  taken.options.batch_invariant = arguments.boolean();
  return taken;
}

// A valid call, whose caches may be written if it appends; raises what is wrong with it.
CacheCallDesc describe_call(const CacheArguments& given) {
  CacheCallDesc call = given.call;
  for (size_t i = 0; i < std::size(kRequired); ++i)
    call.*kRequired[i].desc = describe(kRequired[i].name, given.required[i]);
  for (size_t i = 0; i < std::size(kOptional); ++i)
    call.*kOptional[i].desc = describe(kOptional[i].name, given.optional[i]);
  CallDesc checked;
  if (const auto error = set_layout_and_causal(&checked, 0, given.causal)) raise(*error);
  call.causal = checked.causal;
  if (const auto error = validate(call)) raise(*error);
  // A cache that shares its memory until it is written gets its own only now.
  for (int i = 1; i < 3 && call.appends(); ++i)
    call.*kRequired[i].desc = describe(kRequired[i].name, given.required[i], Access::kWrite);
  return call;
}

Rotary rotary_of(const CacheCallDesc& call) {
  const TensorDesc &cos = call.rotary_cos, &sin = call.rotary_sin;
  if (!cos.present) return {};
  return {cos.data,
          sin.data,
          cos.dtype,
          sin.dtype,
          {cos.stride[0], cos.stride[1]},
          {sin.stride[0], sin.stride[1]},
          cos.shape[0],
          cos.shape[1],
          call.rotary_interleaved};
}

// What is to be done before attending; `turned`: where queries go that are turned.
CacheUpdate update_of(const CacheCallDesc& call, const NewTensor& turned) {
  CacheUpdate update;
  if (call.appends()) {
    update.k = attention_view(call.k, Layout::kBshd);
    update.v = attention_view(call.v, Layout::kBshd);
  }
  if (call.rotates()) {
    update.rotary = rotary_of(call);
    update.turned = attention_view(turned.desc, Layout::kBshd);
    update.queries_move = call.queries_move();
  }
  return update;
}

}  // namespace

void attention_kvcache(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  const CacheArguments given = take(stack);
  const CacheCallDesc call = describe_call(given);
  const Place place = place_of(given.required[0]);
  const TensorDesc& q = call.q;
  int64_t shape[4];
  for (int axis = 0; axis < q.rank; ++axis) shape[axis] = q.shape[axis];
  NewTensor turned;
  if (call.rotates()) turned = new_tensor(q.dtype, q.rank, shape, place);
  shape[q.rank - 1] = call.v_cache.shape[3];
  NewTensor out = new_tensor(q.dtype, q.rank, shape, place);
  int64_t rows[3] = {0, 0, 0};
  const int rank = given.return_lse ? lse_shape(q, Layout::kBshd, rows) : 1;
  NewTensor lse = new_tensor(lse_dtype(q.dtype), rank, rows, place);

  CachedCall cached;
  Problem& p = cached.forward.problem = make_problem(call);
  cached.forward.out = attention_view(out.desc, Layout::kBshd);
  if (given.return_lse) {
    cached.forward.lse = row_values<void>(lse.desc, q, Layout::kBshd, call.cu_seqlens_q.present);
  }
  cached.update = update_of(call, turned);
  if (call.appends() || p.has_rows()) run_kvcache(cached, place, given.options);
  give(&stack[0], std::move(out.tensor));
  give(&stack[1], std::move(lse.tensor));
}

}  // namespace fae::torch_ops
