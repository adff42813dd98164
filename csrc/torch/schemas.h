// The schemas of the operators: each is defined for our kernels, and once more for their emulation.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

#include "torch/errors.h"
#include "torch/ops.h"

namespace fae::torch_ops {

// layout: 0 bshd, 1 bhsd. causal: 0 none, 1 bottom right, 2 top left.
// window_left, window_right: -1 unbounded. scale: none for 1 / sqrt(dim).
inline const std::string kOptions =
    "Tensor? mask, Tensor? bias, Tensor? kv_lengths, "
    "int layout, int causal, int window_left, int window_right, float? scale, float softcap";

// For CUDA, deterministic: the gradients, bitwise from run to run; tf32: one TF32 product for fp32
// instead of three. For the CPU, block_q, block_kv: advice on tile sizes, 0 for none.
inline const std::string kAdvice =
    ", bool deterministic=False, bool tf32=False, int block_q=0, int block_kv=0";

// lse, dbias: an empty (0,) tensor when not asked for.
inline const std::string kForward = "(Tensor q, Tensor k, Tensor v, " + kOptions + ", bool return_lse" +
                                    kAdvice + ") -> (Tensor out, Tensor lse)";
inline const std::string kForwardOut = "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, " + kOptions +
                                       ", bool return_lse" + kAdvice + ") -> Tensor lse";
inline const std::string kBackward =
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " + kOptions +
    ", bool need_bias_grad" + kAdvice + ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)";

// `name` is differentiable (the package registers its gradient); name_forward is the same
// kernel without that layer, whose price a small call would feel.
template <class Library>
void define(Library& m, const std::string& name) {
  m.def((name + kForward).c_str());
  m.def((name + "_forward" + kForward).c_str());
  m.def((name + "_forward_out" + kForwardOut).c_str());
  m.def((name + "_backward" + kBackward).c_str());
}

template <class Library>
void implement(Library& m, const std::string& name) {
  m.impl(name.c_str(), &reporting<attention_forward>);
  m.impl((name + "_forward").c_str(), &reporting<attention_forward>);
  m.impl((name + "_forward_out").c_str(), &reporting<attention_forward_out>);
  m.impl((name + "_backward").c_str(), &reporting<attention_backward>);
}

}  // namespace fae::torch_ops
