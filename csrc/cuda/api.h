// The CUDA backend as its callers see it: plan, then run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/launch/variant.h"
#include "cuda/params.h"

namespace fae::cuda {

// What the planner asks of a card.
struct Device {
  int compute_capability = 80;       // 10 major + minor
  int64_t shared_bytes = 99 * 1024;  // that a block may have
  int64_t l2_bytes = 32 * 1024 * 1024;
  int64_t multiprocessors = 16;
};

struct Options {
  bool deterministic = false;    // backward: no atomics, so bitwise the same from run to run
  bool fast_fp32 = false;        // one TF32 product for fp32 instead of three
  int64_t num_splits = 0;        // forward: ranges of keys that are worked on side by side, 0 to choose
  bool batch_invariant = false;  // forward: a row's result does not depend on how many rows come with it
};

// One launch: a kernel, its grid, and the order of the grid's blocks.
struct Launch {
  const Variant* variant = nullptr;  // null: not part of this plan
  BlockOrder order;
  int64_t blocks = 0;
};

// What a call will do: chosen from the problem before anything runs. A plan with objections
// cannot run: each is a reason why no kernel of this build serves the problem on this device.
struct Plan {
  std::vector<std::string> objections;
  Options options;
  Launch forward, merge_partials;  // the latter where keys are cut into ranges
  int64_t num_splits = 1;
  // Backward, in this order.
  Launch row_stats, key_grad, query_grad, round_query_grad, bias_grad, head_grad;
  int64_t rows_padded = 0;  // of a sequence's head, see Partials and RowStats
  int64_t stats_rows = 0;   // of all
  int64_t dim_padded = 0;
  size_t workspace_bytes = 0;
};

// Which gradients a caller will ask for, beyond those of q, k and v.
struct MoreGradients {
  const int64_t* dbias_shape = nullptr;  // null: none of the bias
  bool dsinks = false, dalibi = false;
};

Plan plan_forward(const Problem& problem, const Device& device, const Options& options);
Plan plan_backward(const Problem& problem, const Device& device, const Options& options,
                   const MoreGradients& more = {});
// What of that a call asks for.
inline MoreGradients more_gradients(const BackwardCall& call) {
  return {call.dbias.present() ? call.dbias_shape : nullptr, call.dsinks.present(), call.dalibi.present()};
}

// Begin the work on a stream; nothing waits. `workspace`: plan.workspace_bytes on the device,
// aligned to 16 bytes; none if there are none. Throw std::runtime_error when a kernel cannot be launched.
void forward(const ForwardCall& call, const Plan& plan, void* workspace, Stream stream);
void backward(const BackwardCall& call, const Plan& plan, void* workspace, Stream stream);

// What a call on a cache does before forward(), whose queries are then those of `update.turned` if it has
// any.
void update_cache(const Problem& problem, const CacheUpdate& update, Stream stream);

}  // namespace fae::cuda
