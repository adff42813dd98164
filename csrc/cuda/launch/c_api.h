// The planner as plain C, for callers without a C++ compiler: flash_attn_ext/_cuda.py.
#pragma once

#include <cstdint>

#define FAE_EXPORT __attribute__((visibility("default")))

extern "C" {

// A problem without its data, and the device it is planned for.
struct FaeCudaQuery {
  int64_t batch, heads_q, heads_kv, seq_q, seq_kv, dim, dim_v;
  int64_t dbias_shape[4];  // backward: of the bias gradient that is asked for; else zeros
  int64_t shared_bytes, l2_bytes, multiprocessors;
  int64_t num_splits;
  double scale, softcap;
  int32_t dtype;  // fae::DType
  int32_t biased, need_bias_grad, backward, deterministic, fast_fp32;
  int32_t with_sinks, need_sink_grad, with_slopes, need_slope_grad, with_dropout;
  int32_t compute_capability, batch_invariant;
};

// Writes the plan as JSON: {"objections": [text], "workspace_bytes": n, "num_splits": n, "launches":
// [{"kernel": name, "dim": columns, "split": bool, "tile_q", "tile_kv", "threads", "shared_bytes",
// "blocks"}]}, in the order of the launches. Returns the text's length; nothing is written when `size` is not
// larger.
FAE_EXPORT int64_t fae_cuda_plan(const FaeCudaQuery* query, char* text, int64_t size);

// The compiled kernels in the same form: [{"kernel", "dtype", "dim", "split", "modified", ...}].
FAE_EXPORT int64_t fae_cuda_variants(char* text, int64_t size);

}  // extern "C"
