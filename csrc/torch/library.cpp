// The operators of flash_attn_ext: schemas and registration.
#include <torch/csrc/stable/library.h>

#include <string>

#include "torch/errors.h"
#include "torch/ops.h"

namespace {

// layout: 0 bshd, 1 bhsd. causal: 0 none, 1 bottom right, 2 top left.
// window_left, window_right: -1 unbounded. scale: none for 1 / sqrt(dim).
const std::string kOptions =
    "Tensor? mask, Tensor? bias, Tensor? kv_lengths, "
    "int layout, int causal, int window_left, int window_right, float? scale, float softcap";

// lse, dbias: an empty (0,) tensor when not asked for.
const std::string kForward =
    "(Tensor q, Tensor k, Tensor v, " + kOptions + ", bool return_lse) -> (Tensor out, Tensor lse)";
const std::string kForwardOut =
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, " + kOptions + ", bool return_lse) -> Tensor lse";
const std::string kBackward =
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " + kOptions +
    ", bool need_bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)";

}  // namespace

STABLE_TORCH_LIBRARY(flash_attn_ext, m) {
  // `attention` is differentiable (the package registers its gradient); attention_forward
  // is the same kernel without that layer, whose price a small call would feel.
  m.def(("attention" + kForward).c_str());
  m.def(("attention_forward" + kForward).c_str());
  m.def(("attention_forward_out" + kForwardOut).c_str());
  m.def(("attention_backward" + kBackward).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) {
  using namespace fae::torch_ops;
  m.impl("attention", &reporting<attention_forward>);
  m.impl("attention_forward", &reporting<attention_forward>);
  m.impl("attention_forward_out", &reporting<attention_forward_out>);
  m.impl("attention_backward", &reporting<attention_backward>);
}
