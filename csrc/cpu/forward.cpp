// Plans and runs the forward pass.
#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace fae::cpu {

void forward(const ForwardCall& call, const Plan& plan, const Executor& executor) {
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
