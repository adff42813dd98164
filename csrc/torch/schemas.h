// The schemas of the operators: each is defined for our kernels, and once more for their emulation.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

#include "torch/errors.h"
#include "torch/ops.h"

namespace fae::torch_ops {

// The plain operators take what most calls need; every argument costs a small call time. The extended
// ones, NAME_extended..., take everything.
// layout: 0 bshd, 1 bhsd, 2 bhsd with results whose axes are ordered in memory as those of what they belong
// to (out as q, if dim is dim_v). causal: 0 none, 1 bottom right, 2 top left.
// window_left, window_right: -1 unbounded. scale: none for 1 / sqrt(dim).
inline const std::string kOptions =
    "Tensor? mask, Tensor? bias, Tensor? kv_lengths, "
    "int layout, int causal, int window_left, int window_right, float? scale, float softcap";
// The same for the operators of eager calls, which leave out at the end what is default.
inline const std::string kEagerOptions =
    "Tensor? mask=None, Tensor? bias=None, Tensor? kv_lengths=None, int layout=0, int causal=0, "
    "int window_left=-1, int window_right=-1, float? scale=None, float softcap=0.0";

// rng_state: seed and offset of dropout. row_labels, key_bounds: see Intervals in core/mask.h. With
// cu_seqlens_q and cu_seqlens_k, q, k and v are packed sequences; max_seqlen: bounds of their lengths, -1
// unknown.
inline const std::string kExtendedOptions =
    "Tensor? mask, Tensor? bias, Tensor? kv_lengths, Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, "
    "Tensor? row_labels, Tensor? key_bounds, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "int layout, int causal, int window_left, int window_right, float? scale, float softcap, "
    "float dropout_p, int mask_block_q, int mask_block_kv, int max_seqlen_q, int max_seqlen_k";

// For CUDA, deterministic: the gradients, bitwise from run to run; tf32: one TF32 product for fp32
// instead of three. For the CPU: advice on tile sizes and on the ranges that few rows' keys are cut into, 0
// for none, and whether a row's result must not depend on how many rows come with it.
inline const std::string kAdvice =
    ", bool deterministic=False, bool tf32=False, int block_q=0, int block_kv=0, int num_splits=0, "
    "bool batch_invariant=False";

// lse and gradients that are not asked for: an empty (0,) tensor.
inline std::string forward_schema(const std::string& options, const std::string& return_lse = "return_lse") {
  return "(Tensor q, Tensor k, Tensor v, " + options + ", bool " + return_lse + kAdvice +
         ") -> (Tensor out, Tensor lse)";
}
inline std::string forward_out_schema(const std::string& options) {
  return "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, " + options + ", bool return_lse" + kAdvice +
         ") -> Tensor lse";
}
inline std::string backward_schema(const std::string& options, const std::string& needs,
                                   const std::string& grads) {
  return "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " + options +
         ", " + needs + kAdvice + ") -> (Tensor dq, Tensor dk, Tensor dv, " + grads + ")";
}

// k and v, if given, are written behind what is in the caches. cache_length: where cache_lengths is none.
inline const std::string kKvCacheSchema =
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor? cache_lengths, "
    "Tensor? block_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? cu_seqlens_q, Tensor? alibi_slopes, Tensor? sinks, int cache_length, "
    "int max_seqlen_q, bool rotary_interleaved, int causal, int window_left, int window_right, float? scale, "
    "float softcap, bool return_lse, int num_splits=0, bool batch_invariant=False) "
    "-> (Tensor out, Tensor lse)";

// `name` is differentiable (the package registers its gradient); name_forward is the same
// kernel without that layer, whose price a small call would feel.
template <class Library>
void define_family(Library& m, const std::string& name, const std::string& options,
                   const std::string& eager_forward, const std::string& backward) {
  m.def((name + forward_schema(options)).c_str());
  m.def((name + "_forward" + eager_forward).c_str());
  m.def((name + "_forward_out" + forward_out_schema(options)).c_str());
  m.def((name + "_backward" + backward).c_str());
}

template <class Library>
void define(Library& m, const std::string& name) {
  define_family(m, name, kOptions, forward_schema(kEagerOptions, "return_lse=False"),
                backward_schema(kEagerOptions, "bool need_bias_grad=False", "Tensor dbias"));
  define_family(
      m, name + "_extended", kExtendedOptions, forward_schema(kExtendedOptions),
      backward_schema(kExtendedOptions, "bool need_bias_grad, bool need_slope_grad, bool need_sink_grad",
                      "Tensor dbias, Tensor dalibi_slopes, Tensor dsinks"));
  m.def((name + "_kvcache" + kKvCacheSchema).c_str());
}

template <Family family, class Library>
void implement_family(Library& m, const std::string& name) {
  m.impl(name.c_str(), &reporting<attention_forward<family>>);
  m.impl((name + "_forward").c_str(), &reporting<attention_forward<family>>);
  m.impl((name + "_forward_out").c_str(), &reporting<attention_forward_out<family>>);
  m.impl((name + "_backward").c_str(), &reporting<attention_backward<family>>);
}

template <class Library>
void implement(Library& m, const std::string& name) {
  implement_family<Family::kPlain>(m, name);
  implement_family<Family::kExtended>(m, name + "_extended");
  m.impl((name + "_kvcache").c_str(), &reporting<attention_kvcache>);
}

}  // namespace fae::torch_ops
