// Runs the backward pass.
#include <atomic>
#include <memory>
#include <thread>

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
// alone. Tasks are drawn block of keys by block, last first (under a causal mask the first
// keys keep most chunks busy), chunk by chunk, head by head. A chunk adds
// to its dQ rows block after block, and a block's dK and dV are summed chunk after chunk;
// a task that comes too early for that waits for one that was drawn before it, so the
// order of every sum is fixed and nothing can wait for ever.
void run_chunks(const BackwardCall& call, const Plan& plan, const BackwardKernel& kernel,
                std::byte* workspace, std::byte* shared, const Executor& executor) {
  const Problem& p = call.problem;
  const int64_t units = plan.tasks / plan.chunks, last = plan.chunks - 1;
  const int64_t blocks = (p.seq_kv + plan.block_kv - 1) / plan.block_kv;
  const size_t dq_bytes = kernel.dq_bytes(p), dkv_bytes = kernel.dkv_bytes(p, plan);
  // Two sets of sums, so that a block can begin while the one before waits for its last chunk.
  std::byte* const sums = shared + size_t(units) * dq_bytes;
  // Blocks that (unit, chunk) has finished.
  const std::unique_ptr<std::atomic<int64_t>[]> finished(new std::atomic<int64_t>[size_t(plan.tasks)]);
  for (int64_t i = 0; i < plan.tasks; ++i) finished[size_t(i)].store(0, std::memory_order_relaxed);
  const auto wait = [&](int64_t unit, int64_t chunk, int64_t count) {
    while (finished[size_t(unit * plan.chunks + chunk)].load(std::memory_order_acquire) < count) {
      std::this_thread::yield();
    }
  };
  for_each_task(executor, plan.tasks * blocks, [&](int worker, int64_t task) {
    const int64_t unit = task % units, chunk = task / units % plan.chunks, step = task / plan.tasks;
    const int64_t k = (blocks - 1 - step) * plan.block_kv;
    std::byte* const own = workspace + size_t(worker) * plan.worker_bytes;
    wait(unit, chunk, step);
    const bool any = kernel.run_chunk(call, plan, unit, chunk, k, shared + size_t(unit) * dq_bytes, own);
    if (chunk == 0) wait(unit, last, step - 1);
    else wait(unit, chunk - 1, step + 1);
    kernel.merge_keys(call, plan, unit, chunk, k, any, sums + size_t(2 * unit + step % 2) * dkv_bytes, own);
    finished[size_t(unit * plan.chunks + chunk)].store(step + 1, std::memory_order_release);
  });
}

}  // namespace

void backward(const BackwardCall& given, const Plan& plan, const Executor& executor) {
  const DTypeKernels& kernels = kernels_for(plan.isa, given.problem.dtype);
  Executor limited = executor;
  limited.threads = plan.threads;
  const Workspace workspace(plan.worker_bytes * size_t(plan.threads));
  const auto own = [&](int worker) { return workspace.data() + size_t(worker) * plan.worker_bytes; };

  BackwardCall call = given;
  const Problem& p = call.problem;
  const bool far_rows = plan.tasks > 0 && p.seq_kv > 0 && kernels.log_sum.needed(call);
  const int64_t rows = p.batch * p.heads_q * p.seq_q;
  const Workspace lse_low(far_rows ? size_t(rows) * size_of(lse_dtype(p.dtype)) : 0);
  if (far_rows) {
    for_each_task(limited, kernels.log_sum.tasks(call, plan), [&](int worker, int64_t task) {
      kernels.log_sum.run(call, plan, task, lse_low.data(), own(worker));
    });
    call.lse_low = lse_low.data();
  }
  if (plan.tasks > 0) {
    const Workspace shared(plan.shared_bytes);
    if (plan.chunks == 1) run_heads(call, plan, kernels.backward, workspace.data(), limited);
    else run_chunks(call, plan, kernels.backward, workspace.data(), shared.data(), limited);
  }
  if (call.dbias.present()) {
    for_each_task(limited, kernels.bias_grad.tasks(call, plan),
                  [&](int worker, int64_t task) { kernels.bias_grad.run(call, plan, task, own(worker)); });
  }
}

}  // namespace fae::cpu
