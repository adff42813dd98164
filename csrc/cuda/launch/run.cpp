// Runs planned calls: fills in what kernels are launched with, and launches them.
#include <algorithm>
#include <limits>

#include "cuda/api.h"
#include "cuda/launch/memory.h"

namespace fae::cuda {
namespace {

// Whether rows of `columns` elements may be moved 16 bytes at a time.
bool has_vector_rows(const View4& view, int64_t columns, DType dtype) {
  const int64_t chunk = 16 / size_of(dtype);
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0 || columns % chunk != 0) return false;
  if (columns > 1 && view.stride[3] != 1) return false;
  return view.stride[0] % chunk == 0 && view.stride[1] % chunk == 0 && view.stride[2] % chunk == 0;
}

ScoreScale score_scale(const Problem& p) {
  ScoreScale scale;
  scale.natural = is_modified(p) ? 1.0f : float(p.score.scale);
  scale.exponent = float(double(scale.natural) * 1.4426950408889634);
  scale.modified_scale = float(p.score.scale);
  return scale;
}

void run(const Launch& launch, const void* params, Stream stream) {
  if (launch.variant && launch.blocks > 0) launch.variant->launch(params, launch.blocks, stream);
}

// Names a result whose rows that no packed sequence has are to be set.
void add_result(ClearUnownedParams* params, const SequenceRows& rows, const View4& view, int64_t heads,
                int64_t columns, DType dtype, bool to_minus_infinity = false) {
  constexpr int64_t kElementsOfBlock = 16 * 1024, kMostBlocks = 1024;
  const int64_t blocks = std::min(rows.total * heads * columns / kElementsOfBlock + 1, kMostBlocks);
  params->blocks = std::max(params->blocks, blocks);
  params->results[params->count++] = {view, heads, columns, int(size_of(dtype)), to_minus_infinity, rows};
}

// Kernels count the elements of a block in 32 bits.
void limit_blocks(Problem* p) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  BoolMask& mask = p->masking.mask;
  mask.block_q = std::min(mask.block_q, kMost);
  mask.block_kv = std::min(mask.block_kv, kMost);
}

}  // namespace

void update_cache(const Problem& p, const CacheUpdate& update, Stream stream) {
  CacheParams params;
  params.problem = p;
  params.update = update;
  const auto launch = [&](bool queries, int64_t blocks) {
    constexpr int64_t kMostBlocks = 1 << 20;
    if (blocks <= 0) return;
    params.queries = queries;
    params.blocks = std::min(blocks, kMostBlocks);
    update_cache(params, stream);
  };
  if (update.k.present() && p.heads_kv > 0) launch(false, p.batch * params.runs());
  if (update.turned.present())
    launch(true, (p.batch * p.seq_q * p.heads_q + CacheParams::kWarps - 1) / CacheParams::kWarps);
}

void forward(const ForwardCall& call, const Plan& plan, void* workspace, Stream stream) {
  const Problem& p = call.problem;
  ForwardParams params;
  params.call = call;
  limit_blocks(&params.call.problem);
  params.order = plan.forward.order;
  params.scale = score_scale(p);
  params.vector.q = has_vector_rows(p.q, p.dim, p.dtype);
  params.vector.k = has_vector_rows(p.k, p.dim, p.dtype);
  params.vector.v = has_vector_rows(p.v, p.dim_v, p.dtype);
  params.vector.out = has_vector_rows(call.out, p.dim_v, p.dtype);
  params.fast_fp32 = plan.options.fast_fp32;
  if (plan.merge_partials.variant) {
    Partials& to = params.partials;
    to.count = int(plan.num_splits);
    to.rows_padded = plan.rows_padded;
    to.rows = plan.stats_rows;
    to.columns = plan.dim_padded;
    const int64_t rows = to.count * to.rows;
    to.out = static_cast<float*>(workspace);
    to.max = to.out + rows * to.columns;
    to.sum = to.max + rows;
  }
  run(plan.forward, &params, stream);
  params.order = plan.merge_partials.order;
  run(plan.merge_partials, &params, stream);
  if (!p.packing.present()) return;
  ClearUnownedParams unowned;
  unowned.batch = p.batch;
  add_result(&unowned, p.query_rows(), call.out, p.heads_q, p.dim_v, p.dtype);
  if (const RowValues<void>& lse = call.lse; lse.present()) {
    const View4 view = {lse.data, {0, lse.head_stride, 1, 0}};
    add_result(&unowned, p.query_rows(), view, p.heads_q, 1, lse_dtype(p.dtype), true);
  }
  clear_unowned(unowned, stream);
}

void backward(const BackwardCall& call, const Plan& plan, void* workspace, Stream stream) {
  const Problem& p = call.problem;
  BackwardParams params;
  params.call = call;
  limit_blocks(&params.call.problem);
  params.scale = score_scale(p);
  params.vector.q = has_vector_rows(p.q, p.dim, p.dtype);
  params.vector.k = has_vector_rows(p.k, p.dim, p.dtype);
  params.vector.v = has_vector_rows(p.v, p.dim_v, p.dtype);
  params.vector.out = has_vector_rows(call.out, p.dim_v, p.dtype);
  params.vector.dout = has_vector_rows(call.dout, p.dim_v, p.dtype);
  params.vector.dq = has_vector_rows(call.dq, p.dim, p.dtype);
  params.vector.dk = has_vector_rows(call.dk, p.dim, p.dtype);
  params.vector.dv = has_vector_rows(call.dv, p.dim_v, p.dtype);
  params.fast_fp32 = plan.options.fast_fp32;

  const int64_t rows = plan.stats_rows;
  float* next = static_cast<float*>(workspace);
  const auto take = [&](int64_t floats) {
    float* const taken = next;
    next += floats;
    return taken;
  };
  params.stats.lse = take(rows);
  params.stats.lse_low = take(rows);
  params.stats.delta = take(rows);
  if (call.dsinks.present()) params.stats.dsink = take(rows);
  if (call.dalibi.present()) params.stats.dalibi = take(rows);
  params.stats.head_stride = p.packing.present() ? rows / p.heads_kv : plan.rows_padded;
  params.stats.batch_stride = p.packing.present() ? kRowPadding : p.heads_kv * plan.rows_padded;
  if (plan.round_query_grad.variant) {
    params.dq_sum = take(rows * plan.dim_padded);
    params.dim_padded = plan.dim_padded;
    zero_memory(params.dq_sum, size_t(rows * plan.dim_padded) * sizeof(float), stream);
  }
  for (const Launch* launch : {&plan.row_stats, &plan.key_grad, &plan.query_grad, &plan.round_query_grad,
                               &plan.bias_grad, &plan.head_grad}) {
    params.order = launch->order;
    run(*launch, &params, stream);
  }
  if (!p.packing.present()) return;
  ClearUnownedParams unowned;
  unowned.batch = p.batch;
  add_result(&unowned, p.query_rows(), call.dq, p.heads_q, p.dim, p.dtype);
  add_result(&unowned, p.key_rows(), call.dk, p.heads_kv, p.dim, p.dtype);
  add_result(&unowned, p.key_rows(), call.dv, p.heads_kv, p.dim_v, p.dtype);
  clear_unowned(unowned, stream);
}

}  // namespace fae::cuda
