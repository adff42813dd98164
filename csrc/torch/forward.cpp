#include "torch/arguments.h"
#include "torch/backend.h"
#include "torch/ops.h"

namespace fae::torch_ops {
namespace {

// Runs a valid call into `out`; returns the LSE, or an empty tensor.
TensorRef compute(const CallDesc& call, const TensorDesc& out, const Options& options, Place place) {
  ForwardCall forward;
  forward.problem = make_problem(call);
  forward.out = attention_view(out, call.layout);

  int64_t shape[3] = {0, 0, 0};
  const int rank = options.return_lse ? lse_shape(call.q, call.layout, shape) : 1;
  NewTensor lse = new_tensor(lse_dtype(call.q.dtype), rank, shape, place);
  if (options.return_lse) forward.lse = row_values<void>(lse.desc, call);
  if (forward.problem.has_rows()) run_forward(forward, place, options.run);
  return std::move(lse.tensor);
}

}  // namespace

template <Family family>
void attention_forward(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  Arguments arguments(stack);
  const TensorRef q = arguments.tensor();
  const TensorRef k = arguments.tensor();
  const TensorRef v = arguments.tensor();
  const Options options = take_options(arguments, family, Direction::kForward);
  const CallDesc call = describe_call(q, k, v, options);

  int64_t shape[4];
  out_shape(call, shape);
  const Place place = place_of(q);
  const bool same_dim = call.q.shape[call.q.rank - 1] == shape[call.q.rank - 1];
  const TensorDesc* order = same_dim ? order_of(call.q, options) : nullptr;
  NewTensor out = new_tensor(call.q.dtype, call.q.rank, shape, place, order);
  TensorRef lse = compute(call, out.desc, options, place);
  give(&stack[0], std::move(out.tensor));
  give(&stack[1], std::move(lse));
}

template <Family family>
void attention_forward_out(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  Arguments arguments(stack);
  const TensorRef q = arguments.tensor();
  const TensorRef k = arguments.tensor();
  const TensorRef v = arguments.tensor();
  const TensorRef out = arguments.tensor();
  const Options options = take_options(arguments, family, Direction::kForward);
  const CallDesc call = describe_call(q, k, v, options, &out);
  give(&stack[0], compute(call, call.out, options, place_of(q)));
}

template void attention_forward<Family::kPlain>(StableIValue*, uint64_t, uint64_t);
template void attention_forward<Family::kExtended>(StableIValue*, uint64_t, uint64_t);
template void attention_forward_out<Family::kPlain>(StableIValue*, uint64_t, uint64_t);
template void attention_forward_out<Family::kExtended>(StableIValue*, uint64_t, uint64_t);

}  // namespace fae::torch_ops
