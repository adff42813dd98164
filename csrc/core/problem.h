// One attention problem, described once; kernels, checks, planners and
// explanations all read this value.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/mask.h"
#include "core/score_mod.h"
#include "core/tensor_view.h"

namespace fae {

struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t heads_q = 0;
  int64_t heads_kv = 0;
  int64_t seq_q = 0;
  int64_t seq_kv = 0;
  int64_t dim = 0;
  int64_t dim_v = 0;

  View4 q;  // (batch, heads_q, seq_q, dim)
  View4 k;  // (batch, heads_kv, seq_kv, dim)
  View4 v;  // (batch, heads_kv, seq_kv, dim_v)

  Masking masking;
  ScoreMod score;

  FAE_HD int64_t group() const { return heads_kv ? heads_q / heads_kv : 0; }
  // Query rows that share one K/V head: queries of all heads of a group, packed
  // query-major (row = query * group + head_in_group) so that neighbouring rows
  // see nearly the same keys.
  FAE_HD int64_t packed_rows() const { return seq_q * group(); }
  // Nothing to compute: the output is empty, or all zeros for want of keys.
  FAE_HD bool has_output() const { return batch > 0 && heads_q > 0 && seq_q > 0; }
};

// Matrix-product FLOPs of the forward pass if every key were visible.
FAE_HD inline double dense_forward_flops(const Problem& p) {
  return 2.0 * double(p.batch) * double(p.heads_q) * double(p.seq_q) * double(p.seq_kv) *
         double(p.dim + p.dim_v);
}

// Whether query i of head_q may see key j, all rules together. Kernels decide by tiles;
// this per-element form is for single rows and for tests.
FAE_HD inline bool is_visible(const Problem& p, int64_t b, int64_t head_q, int64_t i, int64_t j) {
  const Masking& m = p.masking;
  if (j < i + m.band.lo || j > i + m.band.hi || j >= m.kv_lengths.at(b, p.seq_kv)) return false;
  if (m.mask.present() &&
      !static_cast<const uint8_t*>(m.mask.data)[m.mask.offset(b, head_q, i) + j * m.mask.stride[3]]) {
    return false;
  }
  const View4& bias = p.score.bias;
  if (!bias.present()) return true;
  const double x =
      load_as_double(bias.data, p.score.bias_dtype, bias.offset(b, head_q, i) + j * bias.stride[3]);
  return !(x < 0 && x - x != 0);  // -inf hides
}

// The type of the log-sum-exp between forward and backward. For fp32 it is wider than
// what callers see: P = exp(score - lse), so rounding lse to fp32 would put a relative
// error of half an ulp of lse, several ulp of P, into a whole row of gradients.
FAE_HD constexpr DType lse_dtype(DType t) {
  return t == DType::kFloat32 || t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

struct ForwardCall {
  Problem problem;
  View4 out;            // (batch, heads_q, seq_q, dim_v), in problem.dtype
  void* lse = nullptr;  // (batch, heads_q, seq_q) contiguous, in lse_dtype(), or none
};

struct BackwardCall {
  Problem problem;
  View4 out;                   // (batch, heads_q, seq_q, dim_v): the forward result
  View4 dout;                  // same shape
  const void* lse = nullptr;   // (batch, heads_q, seq_q) contiguous, in lse_dtype()
  const void* dlse = nullptr;  // same shape, or none
  // What rounding took from lse, to be added to it; same shape and type. None: nothing.
  const void* lse_low = nullptr;
  View4 dq;     // (batch, heads_q, seq_q, dim)
  View4 dk;     // (batch, heads_kv, seq_kv, dim)
  View4 dv;     // (batch, heads_kv, seq_kv, dim_v)
  View4 dbias;  // bias's own shape (stride 0 where it broadcasts), score.bias_dtype; or none
  int64_t dbias_shape[4] = {0, 0, 0, 0};
};

}  // namespace fae
