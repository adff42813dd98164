#include "cpu/api.h"
#include "torch/arguments.h"
#include "torch/executor.h"
#include "torch/ops.h"

namespace fae::torch_ops {
namespace {

// Runs a valid call into `out`; returns the LSE, or an empty tensor.
TensorRef run_forward(const CallDesc& call, const TensorDesc& out, bool return_lse) {
  ForwardCall forward;
  forward.problem = make_problem(call);
  forward.out = attention_view(out, call.layout);

  int64_t shape[3] = {0, 0, 0};
  const int rank = return_lse ? lse_shape(call.q, call.layout, shape) : 1;
  NewTensor lse = new_tensor(lse_dtype(call.q.dtype), rank, shape);
  if (return_lse) forward.lse = lse.desc.data;

  const cpu::Executor executor = torch_executor();
  cpu::forward(forward, cpu::plan_forward(forward.problem, cpu::active_isa(), executor.threads), executor);
  return std::move(lse.tensor);
}

}  // namespace

void attention_forward(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  Arguments arguments(stack);
  const TensorRef q = arguments.tensor();
  const TensorRef k = arguments.tensor();
  const TensorRef v = arguments.tensor();
  const Options options = take_options(arguments);
  const CallDesc call = describe_call(q, k, v, options);

  int64_t shape[4];
  out_shape(call, shape);
  NewTensor out = new_tensor(call.q.dtype, call.q.rank, shape);
  TensorRef lse = run_forward(call, out.desc, options.extra_result);
  give(&stack[0], std::move(out.tensor));
  give(&stack[1], std::move(lse));
}

void attention_forward_out(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  Arguments arguments(stack);
  const TensorRef q = arguments.tensor();
  const TensorRef k = arguments.tensor();
  const TensorRef v = arguments.tensor();
  const TensorRef out = arguments.tensor();
  const Options options = take_options(arguments);
  const CallDesc call = describe_call(q, k, v, options, &out);
  give(&stack[0], run_forward(call, call.out, options.extra_result));
}

}  // namespace fae::torch_ops
