// The operators on CPU tensors, and the schemas of flash_attn_ext.
#include "cpu/api.h"
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

}  // namespace fae::torch_ops

STABLE_TORCH_LIBRARY(flash_attn_ext, m) {
  fae::torch_ops::define(m, "attention");
  m.def(("attention_kvcache" + fae::torch_ops::kKvCacheSchema).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) {
  fae::torch_ops::implement(m, "attention");
  m.impl("attention_kvcache", &fae::torch_ops::reporting<fae::torch_ops::attention_kvcache>);
}
