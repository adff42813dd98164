// Plans and runs the forward pass.
#include <algorithm>
#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/workspace.h"

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

}  // namespace

void forward(const ForwardCall& call, const Plan& plan, const Executor& executor) {
  if (call.problem.packing.present()) clear_rows_behind(call);
  if (plan.tasks == 0) return;
  const DTypeKernels& kernels = kernels_for(plan.isa, call.problem.dtype);
  const Workspace workspace(plan.worker_bytes * size_t(plan.threads));
  Executor limited = executor;
  limited.threads = plan.threads;
  for_each_task(limited, plan.tasks, [&](int worker, int64_t task) {
    kernels.forward.run(call, plan, task, workspace.data() + size_t(worker) * plan.worker_bytes);
  });
}

}  // namespace fae::cpu
