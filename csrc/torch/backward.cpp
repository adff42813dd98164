#include <string>

#include "torch/arguments.h"
#include "torch/backend.h"
#include "torch/errors.h"
#include "torch/ops.h"

namespace fae::torch_ops {
namespace {

// What the forward pass handed on has one legal shape and dtype each.
void check_saved(const char* name, const TensorDesc& given, DType dtype, int rank, const int64_t* shape,
                 const char* device) {
  TensorDesc expected;
  expected.rank = rank;
  for (int axis = 0; axis < rank; ++axis) expected.shape[axis] = shape[axis];
  bool same = given.rank == rank;
  for (int axis = 0; same && axis < rank; ++axis) same = given.shape[axis] == shape[axis];
  if (!same) {
    raise({CallError::Kind::kValue,
           std::string(name) + " has shape " + shape_text(given) + ", expected " + shape_text(expected)});
  }
  if (given.dtype != dtype) {
    const char* given_name = given.dtype_name ? given.dtype_name : name_of(given.dtype);
    raise({CallError::Kind::kType,
           std::string(name) + " has dtype " + given_name + ", expected " + name_of(dtype)});
  }
  if (std::string(given.device) != device) {
    raise({CallError::Kind::kValue,
           std::string(name) + " is on device " + given.device + ", but must be on q's device " + device});
  }
}

NewTensor new_like(const TensorDesc& desc, Place place, const TensorDesc* order = nullptr) {
  return new_tensor(desc.dtype, desc.rank, desc.shape, place, order);
}

}  // namespace

template <Family family>
void attention_backward(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  Arguments arguments(stack);
  const TensorRef dout = arguments.tensor();
  TensorRef dlse = arguments.optional_tensor();
  const TensorRef q = arguments.tensor();
  const TensorRef k = arguments.tensor();
  const TensorRef v = arguments.tensor();
  const TensorRef out = arguments.tensor();
  TensorRef lse = arguments.tensor();
  const Options options = take_options(arguments, family, Direction::kBackward);

  const CallDesc call = describe_call(q, k, v, options);
  const TensorDesc out_desc = describe("out", out);
  const TensorDesc dout_desc = describe("dout", dout);
  const TensorDesc lse_desc = describe("lse", lse);
  const TensorDesc dlse_desc = describe("dlse", dlse);
  int64_t expected[4];
  out_shape(call, expected);
  check_saved("out", out_desc, call.q.dtype, call.q.rank, expected, call.q.device);
  check_saved("dout", dout_desc, call.q.dtype, call.q.rank, expected, call.q.device);
  int64_t shape[3];
  const int lse_rank = lse_shape(call.q, call.layout, shape);
  check_saved("lse", lse_desc, lse_dtype(call.q.dtype), lse_rank, shape, call.q.device);
  if (dlse) check_saved("dlse", dlse_desc, lse_dtype(call.q.dtype), lse_rank, shape, call.q.device);

  BackwardCall backward;
  backward.problem = make_problem(call);
  backward.out = attention_view(out_desc, call.layout);
  backward.dout = attention_view(dout_desc, call.layout);
  const NewTensor lse_rows = contiguous(std::move(lse), lse_desc);
  backward.lse = row_values<const void>(lse_rows.desc, call);
  backward.lse_count = 1;
  for (int axis = 0; axis < lse_rank; ++axis) backward.lse_count *= shape[axis];
  NewTensor dlse_rows;
  if (dlse) {
    dlse_rows = contiguous(std::move(dlse), dlse_desc);
    backward.dlse = row_values<const void>(dlse_rows.desc, call);
  }

  const Place place = place_of(q);
  NewTensor dq = new_like(call.q, place, order_of(call.q, options));
  NewTensor dk = new_like(call.k, place, order_of(call.k, options));
  NewTensor dv = new_like(call.v, place, order_of(call.v, options));
  backward.dq = attention_view(dq.desc, call.layout);
  backward.dk = attention_view(dk.desc, call.layout);
  backward.dv = attention_view(dv.desc, call.layout);
  const bool bias_grad = options.need_bias_grad && call.bias.present;
  const bool slope_grad = options.need_slope_grad && call.alibi_slopes.present;
  const bool sink_grad = options.need_sink_grad && call.sinks.present;
  const auto gradient = [&](const TensorDesc& of, bool needed) {
    const int64_t none = 0;
    return needed ? new_like(of, place) : new_tensor(call.q.dtype, 1, &none, place);
  };
  NewTensor dbias = gradient(call.bias, bias_grad);
  NewTensor dalibi = gradient(call.alibi_slopes, slope_grad);
  NewTensor dsinks = gradient(call.sinks, sink_grad);
  if (bias_grad) backward.dbias = broadcast_view(dbias.desc, backward.dbias_shape);
  if (slope_grad) backward.dalibi = per_head(dalibi.desc);
  if (sink_grad) backward.dsinks = per_head(dsinks.desc);
  if (backward.problem.has_output() && backward.problem.seq_kv > 0) {
    run_backward(backward, place, options.run);
  } else {
    for (const NewTensor* grad : {&dq, &dk, &dv, &dbias, &dalibi, &dsinks}) fill_with_zeros(*grad);
  }
  give(&stack[0], std::move(dq.tensor));
  give(&stack[1], std::move(dk.tensor));
  give(&stack[2], std::move(dv.tensor));
  give(&stack[3], std::move(dbias.tensor));
  if constexpr (family == Family::kExtended) {
    give(&stack[4], std::move(dalibi.tensor));
    give(&stack[5], std::move(dsinks.tensor));
  }
}

template void attention_backward<Family::kPlain>(StableIValue*, uint64_t, uint64_t);
template void attention_backward<Family::kExtended>(StableIValue*, uint64_t, uint64_t);

}  // namespace fae::torch_ops
