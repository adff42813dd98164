// The operator on a cache of keys and values: appends, then attends.
#include "core/describe_cache.h"
#include "torch/arguments.h"
#include "torch/backend.h"
#include "torch/errors.h"
#include "torch/ops.h"

namespace fae::torch_ops {
namespace {

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

}  // namespace

void attention_kvcache(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  // Everything is taken before anything can fail: what is left on the stack would leak.
  Arguments arguments(stack);
  constexpr const char* kRequired[] = {"q", "k_cache", "v_cache"};
  constexpr const char* kOptional[] = {"k",
                                       "v",
                                       "cache_lengths",
                                       "block_table",
                                       "cache_batch_idx",
                                       "cache_leftpad",
                                       "rotary_cos",
                                       "rotary_sin",
                                       "cu_seqlens_q",
                                       "alibi_slopes",
                                       "sinks"};
  TensorRef required[3], optional[11];
  for (TensorRef& t : required) t = arguments.tensor();
  for (TensorRef& t : optional) t = arguments.optional_tensor();
  CacheCallDesc call;
  call.cache_length = arguments.integer();
  call.max_seqlen_q = arguments.integer();
  call.rotary_interleaved = arguments.boolean();
  const int64_t causal = arguments.integer();
  call.window_left = arguments.integer();
  call.window_right = arguments.integer();
  call.scale = arguments.optional_real();
  call.softcap = arguments.real();
  const bool return_lse = arguments.boolean();
  RunOptions options;
  options.num_splits = arguments.integer();
  options.batch_invariant = arguments.boolean();

  TensorDesc* const described[] = {&call.q, &call.k_cache, &call.v_cache};
  for (int i = 0; i < 3; ++i) *described[i] = describe(kRequired[i], required[i]);
  TensorDesc* const described_too[] = {&call.k,
                                       &call.v,
                                       &call.cache_lengths,
                                       &call.block_table,
                                       &call.cache_batch_idx,
                                       &call.cache_leftpad,
                                       &call.rotary_cos,
                                       &call.rotary_sin,
                                       &call.cu_seqlens_q,
                                       &call.alibi_slopes,
                                       &call.sinks};
  for (int i = 0; i < 11; ++i) *described_too[i] = describe(kOptional[i], optional[i]);
  CallDesc checked;
  if (const auto error = set_layout_and_causal(&checked, 0, causal)) raise(*error);
  call.causal = checked.causal;
  if (const auto error = validate(call)) raise(*error);
  if (call.appends()) {
    // One that shares its memory until it is written gets its own only now.
    call.k_cache = describe("k_cache", required[1], Access::kWrite);
    call.v_cache = describe("v_cache", required[2], Access::kWrite);
  }

  const Place place = place_of(required[0]);
  const TensorDesc& q = call.q;
  int64_t shape[4];
  for (int axis = 0; axis < q.rank; ++axis) shape[axis] = q.shape[axis];
  NewTensor turned;
  if (call.rotates()) turned = new_tensor(q.dtype, q.rank, shape, place);
  shape[q.rank - 1] = call.v_cache.shape[3];
  NewTensor out = new_tensor(q.dtype, q.rank, shape, place);
  int64_t rows[3] = {0, 0, 0};
  const int rank = return_lse ? lse_shape(q, Layout::kBshd, rows) : 1;
  NewTensor lse = new_tensor(lse_dtype(q.dtype), rank, rows, place);

  CachedCall cached;
  Problem& p = cached.forward.problem = make_problem(call);
  cached.forward.out = attention_view(out.desc, Layout::kBshd);
  if (return_lse) {
    cached.forward.lse = row_values<void>(lse.desc, q, Layout::kBshd, call.cu_seqlens_q.present);
  }
  if (call.appends()) {
    cached.update.k = attention_view(call.k, Layout::kBshd);
    cached.update.v = attention_view(call.v, Layout::kBshd);
  }
  if (call.rotates()) {
    cached.update.rotary = rotary_of(call);
    cached.update.turned = attention_view(turned.desc, Layout::kBshd);
    cached.update.queries_move = call.queries_move();
  }
  if (call.appends() || p.has_rows()) run_kvcache(cached, place, options);
  give(&stack[0], std::move(out.tensor));
  give(&stack[1], std::move(lse.tensor));
}

}  // namespace fae::torch_ops
