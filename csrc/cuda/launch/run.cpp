// Runs planned calls: fills in what kernels are launched with, and launches them.
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

}  // namespace

void forward(const ForwardCall& call, const Plan& plan, Stream stream) {
  const Problem& p = call.problem;
  ForwardParams params;
  params.call = call;
  params.order = plan.forward.order;
  params.scale = score_scale(p);
  params.vector.q = has_vector_rows(p.q, p.dim, p.dtype);
  params.vector.k = has_vector_rows(p.k, p.dim, p.dtype);
  params.vector.v = has_vector_rows(p.v, p.dim_v, p.dtype);
  params.vector.out = has_vector_rows(call.out, p.dim_v, p.dtype);
  params.fast_fp32 = plan.options.fast_fp32;
  run(plan.forward, &params, stream);
}

void backward(const BackwardCall& call, const Plan& plan, void* workspace, Stream stream) {
  const Problem& p = call.problem;
  BackwardParams params;
  params.call = call;
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

  const int64_t rows = p.batch * p.heads_kv * plan.rows_padded;
  float* next = static_cast<float*>(workspace);
  const auto take = [&](int64_t floats) {
    float* const taken = next;
    next += floats;
    return taken;
  };
  params.stats.lse = take(rows);
  params.stats.lse_low = take(rows);
  params.stats.delta = take(rows);
  params.stats.rows_padded = plan.rows_padded;
  if (call.dsinks.present()) params.stats.dsink = take(rows);
  if (call.dalibi.present()) params.stats.dalibi = take(rows);
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
}

}  // namespace fae::cuda
