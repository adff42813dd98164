// The operators on CPU tensors, and the schemas of flash_attn_ext.
#include "cpu/api.h"
#include "cpu/append.h"
#include "torch/backend.h"
#include "torch/executor.h"
#include "torch/schemas.h"

namespace fae::torch_ops {

void run_forward(const ForwardCall& call, Place, const RunOptions& options) {
  const cpu::Executor executor = torch_executor();
  const cpu::Advice advice{options.block_q, options.block_kv, options.num_splits, options.batch_invariant};
  cpu::forward(call, cpu::plan_forward(call.problem, cpu::active_isa(), executor.threads, advice), executor);
}

void run_backward(const BackwardCall& call, Place, const RunOptions& options) {
  const cpu::Executor executor = torch_executor();
  const cpu::Advice advice{options.block_q, options.block_kv, options.num_splits, options.batch_invariant};
  cpu::backward(call, cpu::plan_backward(call.problem, cpu::active_isa(), executor.threads, advice),
                executor);
}

void run_kvcache(const CachedCall& call, Place, const RunOptions& options) {
  const cpu::Executor executor = torch_executor();
  const cpu::Advice advice{0, 0, options.num_splits, options.batch_invariant};
  ForwardCall forward = call.forward;
  Problem& p = forward.problem;
  const CacheUpdate& update = call.update;
  const cpu::Plan plan = cpu::plan_forward(p, cpu::active_isa(), executor.threads, advice);
  const cpu::PlanMemory memory(plan);
  if (update.k.present()) cpu::append(p, update.k, update.v, update.rotary, executor);
  if (update.turned.present()) {
    cpu::rotate_queries(p, update.turned, update.rotary, update.queries_move, executor);
    p.q = update.turned;
  }
  if (p.has_rows()) cpu::forward(forward, plan, memory, executor);
}

}  // namespace fae::torch_ops

STABLE_TORCH_LIBRARY(flash_attn_ext, m) { fae::torch_ops::define(m, "attention"); }

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) { fae::torch_ops::implement(m, "attention"); }
