// Who computes: each operator library is linked with one of backend_*.cpp.
#pragma once

#include "core/cache_update.h"
#include "torch/view.h"

namespace fae::torch_ops {

// Each backend takes what it has a use for.
struct RunOptions {
  bool deterministic = false;  // gradients bitwise the same from run to run
  bool tf32 = false;           // one TF32 product for fp32 where there are such
  int64_t block_q = 0;         // advice on tile sizes, 0 for none
  int64_t block_kv = 0;
  int64_t num_splits = 0;        // advice on ranges of keys, 0 for none
  bool batch_invariant = false;  // a row's result must not depend on how many rows come with it
};

// Compute a valid call that has an output, on the device of its tensors; nothing is written when
// they throw. For gradients there are keys, too.
void run_forward(const ForwardCall& call, Place place, const RunOptions& options);
void run_backward(const BackwardCall& call, Place place, const RunOptions& options);

// Appends, turns and attends; where the problem has no rows it only appends.
void run_kvcache(const CachedCall& call, Place place, const RunOptions& options);

}  // namespace fae::torch_ops
