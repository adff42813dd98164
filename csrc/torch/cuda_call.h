// How the CUDA kernels are called, on a card or on the emulator.
//
// A Machine is made for one call from (Place, call): it has device(), stream() and
// use_scratch(data, bytes), and finish() once everything has been launched.
#pragma once

#include <string>

#include "cuda/api.h"
#include "torch/backend.h"
#include "torch/errors.h"

namespace fae::torch_ops {

inline void refuse_objections(const cuda::Plan& plan) {
  if (plan.objections.empty()) return;
  std::string text = "the CUDA kernels cannot serve this call: ";
  for (const std::string& objection : plan.objections) {
    if (&objection != &plan.objections.front()) text += "; ";
    text += objection;
  }
  raise({CallError::Kind::kNotImplemented, text});
}

// For the kernels of one call. Torch's allocator gives it to nobody else before the call's stream has passed.
template <class Machine>
NewTensor make_workspace(Machine& machine, const cuda::Plan& plan, Place place) {
  const int64_t count = int64_t(plan.workspace_bytes / sizeof(float));
  if (count == 0) return {};
  NewTensor workspace = new_tensor(DType::kFloat32, 1, &count, place);
  machine.use_scratch(workspace.desc.data, plan.workspace_bytes);
  return workspace;
}

inline cuda::Options options_of(const RunOptions& options) {
  return {options.deterministic, options.tf32, options.num_splits, options.batch_invariant};
}

template <class Machine>
void cuda_forward(const ForwardCall& call, Place place, const RunOptions& options) {
  Machine machine(place, call);
  const cuda::Plan plan = cuda::plan_forward(call.problem, machine.device(), options_of(options));
  refuse_objections(plan);
  const NewTensor workspace = make_workspace(machine, plan, place);
  cuda::forward(call, plan, workspace.desc.data, machine.stream());
  machine.finish();
}

template <class Machine>
void cuda_kvcache(const CachedCall& call, Place place, const RunOptions& options) {
  Machine machine(place, call);
  ForwardCall forward = call.forward;
  const cuda::Plan plan = cuda::plan_forward(forward.problem, machine.device(), options_of(options));
  refuse_objections(plan);
  const NewTensor workspace = make_workspace(machine, plan, place);
  cuda::update_cache(forward.problem, call.update, machine.stream());
  if (call.update.turned.present()) forward.problem.q = call.update.turned;
  if (forward.problem.has_rows()) cuda::forward(forward, plan, workspace.desc.data, machine.stream());
  machine.finish();
}

template <class Machine>
void cuda_backward(const BackwardCall& call, Place place, const RunOptions& options) {
  Machine machine(place, call);
  const cuda::Plan plan =
      cuda::plan_backward(call.problem, machine.device(), options_of(options), cuda::more_gradients(call));
  refuse_objections(plan);
  const NewTensor workspace = make_workspace(machine, plan, place);
  cuda::backward(call, plan, workspace.desc.data, machine.stream());
  machine.finish();
}

}  // namespace fae::torch_ops
