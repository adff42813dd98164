// What one isa/*.cpp offers: a row of functions per dtype.
#pragma once

#include <cstddef>

#include "cpu/api.h"

namespace fae::cpu {

// What ranges of keys contribute to the rows of K/V heads, to be merged by core/partial.h.
template <class Real>
struct KeySplit {
  Real* max;  // [block_q], natural logarithm
  Real* sum;  // [block_q]
  Real* acc;  // [block_q][dim_v], unnormalised

  FAE_HD static int64_t elements(const Problem& p, const Plan& plan) { return plan.block_q * (p.dim_v + 2); }
  // That of range `split` to unit b * heads_kv + head_kv.
  FAE_HD static KeySplit at(std::byte* parts, const Problem& p, const Plan& plan, int64_t split,
                            int64_t unit) {
    Real* const begin =
        reinterpret_cast<Real*>(parts) + (split * p.batch * p.heads_kv + unit) * elements(p, plan);
    return {begin, begin + plan.block_q, begin + 2 * plan.block_q};
  }
};

// With several ranges of keys, each leaves its share in `parts`.
struct ForwardKernel {
  size_t (*workspace)(const ForwardCall&, const Plan&);  // bytes per worker
  void (*run)(const ForwardCall&, const Plan&, int64_t task, std::byte* parts, std::byte* workspace);
};

// dq: running sums of one K/V head's query gradients; dkv: sums of one block's dK and dV,
// both in the accumulator type, sizes in bytes. run_chunk leaves its share of dK and dV in
// the workspace, from where merge_keys takes it, and tells whether there is any.
struct BackwardKernel {
  size_t (*workspace)(const BackwardCall&, const Plan&);
  size_t (*dq_bytes)(const Problem&);
  size_t (*dkv_bytes)(const Problem&, const Plan&);
  void (*run_head)(const BackwardCall&, const Plan&, int64_t unit, std::byte* workspace);
  bool (*run_chunk)(const BackwardCall&, const Plan&, int64_t unit, int64_t chunk, int64_t k, std::byte* dq,
                    std::byte* workspace);
  void (*merge_keys)(const BackwardCall&, const Plan&, int64_t unit, int64_t chunk, int64_t k, bool any,
                     std::byte* dkv, std::byte* workspace);
};

struct BiasGradKernel {
  size_t (*workspace)(const BackwardCall&, const Plan&);
  int64_t (*tasks)(const BackwardCall&, const Plan&);
  void (*run)(const BackwardCall&, const Plan&, int64_t task, std::byte* workspace);
};

// A pass before the gradients, where rounding took too much from some row's lse: fills call.lse_low.
struct LogSumKernel {
  bool (*needed)(const BackwardCall&);
  size_t (*workspace)(const BackwardCall&, const Plan&);
  int64_t (*tasks)(const BackwardCall&, const Plan&);
  void (*run)(const BackwardCall&, const Plan&, int64_t task, std::byte* workspace);
};

// How a kernel computes one dtype.
struct KernelInfo {
  const char* name;   // "f32", "bf16_dot", ...
  int element_bytes;  // of packed operands
  int accumulator_bytes;
  int register_rows;
  int register_cols;
};

struct DTypeKernels {
  KernelInfo info;
  ForwardKernel forward;
  BackwardKernel backward;
  BiasGradKernel bias_grad;
  LogSumKernel log_sum;
};

struct KernelTable {
  // Indexed by DType: float16, bfloat16, float32, float64. An empty row, without a name, leaves
  // the dtype to the next ISA of the dispatch table.
  DTypeKernels dtype[4];
};

// Defined where the ISA is compiled in. The tables are constants: one may be read, for what
// there is, on a processor that could not run the code that would build it.
const KernelTable& scalar_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512bf16_kernels();
const KernelTable& amx_kernels();
const KernelTable& neon_kernels();

}  // namespace fae::cpu
