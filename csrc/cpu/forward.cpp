// Plans and runs the forward pass.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/partial.h"
#include "cpu/dispatch.h"

namespace fae::cpu {
namespace {

// Rows of q that belong to no sequence: output 0, as of rows without keys.
void clear_rows_behind(const ForwardCall& call) {
  const Problem& p = call.problem;
  const DType lse = lse_dtype(p.dtype);
  for (int64_t row = p.packing.starts_q.at(p.batch); row < p.packing.total_q; ++row) {
    for (int64_t h = 0; h < p.heads_q; ++h) {
      const int64_t at = call.out.offset(0, h, row);
      for (int64_t c = 0; c < p.dim_v; ++c)
        store_from_double(call.out.data, p.dtype, at + c * call.out.stride[3], 0);
      if (call.lse.present()) store_from_double(call.lse.data, lse, call.lse.index(0, h, row), -INFINITY);
    }
  }
}

// Rows of one K/V head from what the ranges of its keys contribute, in their order: added up where the first
// range's share lies, as memory that cannot be had now would be missed too late.
template <class Real>
void merge_splits(const ForwardCall& call, const Plan& plan, std::byte* parts, int64_t unit) {
  const Problem& p = call.problem;
  const int64_t b = unit / p.heads_kv, group = p.group();
  const Sequence sequence = p.sequence(b);
  for (int64_t row = 0; row < sequence.seq_q * group; ++row) {
    Real* const acc = KeySplit<Real>::at(parts, p, plan, 0, unit).acc + row * p.dim_v;
    bool empty = true;
    SoftmaxState<Real> state;
    for (int64_t split = 0; split < plan.splits; ++split) {
      const auto part = KeySplit<Real>::at(parts, p, plan, split, unit);
      if (part.sum[row] == 0) continue;  // no key of the range is seen; what is NaN is no reason
      MergeFactors<Real> factors;
      state = merge(state, SoftmaxState<Real>{part.max[row], part.sum[row]}, &factors);
      const Real* const values = part.acc + row * p.dim_v;
      for (int64_t c = 0; c < p.dim_v; ++c)
        acc[c] = (empty ? Real(0) : factors.a * acc[c]) + factors.b * values[c];
      empty = false;
    }
    if (empty) std::fill_n(acc, p.dim_v, Real(0));
    const int64_t query = sequence.first_query + row / group, head = unit % p.heads_kv * group + row % group;
    const int64_t at = call.out.offset(b, head, query);
    const Real scale = state.sum == 0 ? Real(1) : Real(p.dropout.keep_scale) / state.sum;
    for (int64_t c = 0; c < p.dim_v; ++c)
      store_from_double(call.out.data, p.dtype, at + c * call.out.stride[3], double(acc[c] * scale));
    if (call.lse.present()) {
      SoftmaxState<double> wide{double(state.max), double(state.sum)};
      if (p.score.sinks.present() && state.sum == 1) {
        const double sink = p.score.sinks.at(b, head);
        if (state.max == Real(sink)) wide.max = sink;
      }
      store_from_double(call.lse.data, lse_dtype(p.dtype), call.lse.index(b, head, query), log_sum_exp(wide));
    }
  }
}

}  // namespace

void forward(const ForwardCall& call, const Plan& plan, const Executor& executor) {
  forward(call, plan, PlanMemory(plan), executor);
}

void forward(const ForwardCall& call, const Plan& plan, const PlanMemory& memory, const Executor& executor) {
  const Problem& p = call.problem;
  if (p.packing.present()) clear_rows_behind(call);
  if (plan.tasks == 0) return;
  const DTypeKernels& kernels = kernels_for(plan.isa, p.dtype);
  std::byte* const parts = memory.shared.data();
  Executor limited = executor;
  limited.threads = plan.threads;
  const bool alike = plan.direct || plan.tasks == p.batch * p.heads_kv;
  for_each_task(
      limited, plan.tasks,
      [&](int worker, int64_t task) {
        kernels.forward.run(call, plan, task, parts,
                            memory.workers.data() + size_t(worker) * plan.worker_bytes);
      },
      alike ? Sharing::kNeighbours : Sharing::kInOrder);
  if (plan.splits == 1) return;
  for_each_task(limited, p.batch * p.heads_kv, [&](int, int64_t unit) {
    if (p.dtype == DType::kFloat64) merge_splits<double>(call, plan, parts, unit);
    else merge_splits<float>(call, plan, parts, unit);
  });
}

}  // namespace fae::cpu
