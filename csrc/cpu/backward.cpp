// Runs the backward pass.
#include <atomic>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace fae::cpu {
namespace {

// Enough heads to keep every thread busy: a task is a whole head.
void run_heads(const BackwardCall& call, const Plan& plan, const BackwardKernel& kernel, std::byte* workspace,
               const Executor& executor) {
  for_each_task(executor, plan.tasks, [&](int worker, int64_t unit) {
    kernel.run_head(call, plan, unit, workspace + size_t(worker) * plan.worker_bytes);
  });
}

// Few heads: their query rows are cut into chunks, a number that depends on the problem
// alone, and all chunks go through the key blocks in step. Whoever finishes a head's last
// chunk adds up the chunks' dK and dV, always in the same order.
void run_chunks(const BackwardCall& call, const Plan& plan, const BackwardKernel& kernel, std::byte* workspace,
                std::byte* shared, const Executor& executor) {
  const Problem& p = call.problem;
  const int64_t units = plan.tasks / plan.chunks;
  const size_t dq_bytes = kernel.dq_bytes(p), dkv_bytes = kernel.dkv_bytes(p, plan);
  std::byte* const dkv = shared + size_t(units) * dq_bytes;
  const std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[size_t(units)]);
  for (int64_t k = 0; k < p.seq_kv; k += plan.block_kv) {
    for (int64_t u = 0; u < units; ++u) left[size_t(u)].store(plan.chunks, std::memory_order_relaxed);
    for_each_task(executor, plan.tasks, [&](int worker, int64_t task) {
      const int64_t unit = task % units, chunk = task / units;
      std::byte* const own = workspace + size_t(worker) * plan.worker_bytes;
      std::byte* const unit_dkv = dkv + size_t(unit * plan.chunks) * dkv_bytes;
      kernel.run_chunk(call, plan, unit, chunk, k, shared + size_t(unit) * dq_bytes,
                       unit_dkv + size_t(chunk) * dkv_bytes, own);
      if (left[size_t(unit)].fetch_sub(1, std::memory_order_acq_rel) == 1) {
        kernel.finish_keys(call, plan, unit, k, unit_dkv, own);
      }
    });
  }
}

}  // namespace

void backward(const BackwardCall& call, const Plan& plan, const Executor& executor) {
  const DTypeKernels& kernels = kernels_for(plan.isa, call.problem.dtype);
  Executor limited = executor;
  limited.threads = plan.threads;
  const Workspace workspace(plan.worker_bytes * size_t(plan.threads));
  if (plan.tasks > 0) {
    const Workspace shared(plan.shared_bytes);
    if (plan.chunks == 1) run_heads(call, plan, kernels.backward, workspace.data(), limited);
    else run_chunks(call, plan, kernels.backward, workspace.data(), shared.data(), limited);
  }
  if (call.dbias.present()) {
    for_each_task(limited, kernels.bias_grad.tasks(call, plan), [&](int worker, int64_t task) {
      kernels.bias_grad.run(call, plan, task, workspace.data() + size_t(worker) * plan.worker_bytes);
    });
  }
}

}  // namespace fae::cpu
