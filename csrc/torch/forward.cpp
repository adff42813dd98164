#include "cpu/api.h"
#include "torch/errors.h"
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

struct Inputs { TensorRef q, k, v; };

Inputs take_inputs(Arguments& arguments, CallDesc* call) {
  Inputs inputs{arguments.tensor(), arguments.tensor(), arguments.tensor()};
  call->q = describe(inputs.q);
  call->k = describe(inputs.k);
  call->v = describe(inputs.v);
  return inputs;
}

}  // namespace

Options take_options(Arguments& arguments, CallDesc* call) {
  Options options{arguments.optional_tensor(), arguments.optional_tensor(), arguments.optional_tensor()};
  call->mask = describe(options.mask);
  call->bias = describe(options.bias);
  call->kv_lengths = describe(options.kv_lengths);
  call->layout = arguments.integer() == 0 ? Layout::kBshd : Layout::kBhsd;
  const int64_t causal = arguments.integer();
  call->causal = causal == 0 ? Causal::kNone : causal == 1 ? Causal::kBottomRight : Causal::kTopLeft;
  call->window_left = arguments.integer();
  call->window_right = arguments.integer();
  call->scale = arguments.optional_real();
  call->softcap = arguments.real();
  return options;
}

void attention_forward(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  Arguments arguments(stack);
  CallDesc call;
  const Inputs inputs = take_inputs(arguments, &call);
  const Options options = take_options(arguments, &call);
  const bool return_lse = arguments.boolean();
  check_call(call);

  // q's shape with v's last axis, in every rank and layout.
  int64_t shape[4];
  for (int axis = 0; axis < call.q.rank; ++axis) shape[axis] = call.q.shape[axis];
  shape[call.q.rank - 1] = call.v.shape[call.v.rank - 1];
  NewTensor out = new_tensor(call.q.dtype, call.q.rank, shape);
  TensorRef lse = run_forward(call, out.desc, return_lse);
  give(&stack[0], std::move(out.tensor));
  give(&stack[1], std::move(lse));
}

void attention_forward_out(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  Arguments arguments(stack);
  CallDesc call;
  const Inputs inputs = take_inputs(arguments, &call);
  const TensorRef out = arguments.tensor();
  const Options options = take_options(arguments, &call);
  const bool return_lse = arguments.boolean();
  call.out = describe(out, Access::kWrite);
  check_call(call);
  give(&stack[0], run_forward(call, call.out, return_lse));
}

}  // namespace fae::torch_ops
