// Chooses kernels and grids; host arithmetic only.
#include <algorithm>
#include <limits>
#include <utility>

#include "cuda/api.h"
#include "cuda/launch/variant.h"
#include "cuda/sm80/config.h"

namespace fae::cuda {
namespace {

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The variant with the smallest tile that holds `dim` columns, else the one that cuts them up.
const Variant* find_variant(Pass pass, DType dtype, int64_t dim, bool modified, const Device& device) {
  const Variant* best = nullptr;
  for (const Variant& v : variants()) {
    if (v.pass != pass || v.dtype != dtype || v.modified != modified) continue;
    if (v.shared_bytes > device.shared_bytes || (!v.split && v.dim < dim)) continue;
    if (!best || (best->split && !v.split) || (best->split == v.split && v.dim < best->dim)) best = &v;
  }
  return best;
}

void choose(Plan* plan, Launch* launch, Pass pass, const Problem& p, bool modified, const Device& device) {
  launch->variant = find_variant(pass, p.dtype, std::max(p.dim, p.dim_v), modified, device);
  if (!launch->variant) {
    plan->objections.push_back("this build has no CUDA kernel '" + std::string(name_of(pass)) + "' for " +
                               name_of(p.dtype) + " that fits " + std::to_string(device.shared_bytes) +
                               " bytes of shared memory");
  }
}

// Units whose keys and values share half the L2 cache: the rest is for what streams by.
int64_t section_units(const Problem& p, const Device& device, int64_t units) {
  const int64_t bytes = std::max<int64_t>(p.seq_kv * (p.dim + p.dim_v) * size_of(p.dtype), 1);
  return std::clamp<int64_t>(device.l2_bytes / 2 / bytes, 1, std::max<int64_t>(units, 1));
}

// A block for each tile of `count` rows or keys of each unit and slice.
void set_grid(Launch* launch, const Problem& p, const Device& device, int64_t count, int64_t tile,
              int64_t columns, bool descending) {
  const int64_t slices = launch->variant && launch->variant->split && launch->variant->dim > 0
                             ? ceil_div(columns, launch->variant->dim)
                             : 1;
  const int64_t units = p.batch * p.heads_kv * slices;
  launch->order = {ceil_div(count, tile), units, section_units(p, device, units), descending};
  launch->blocks = launch->order.blocks();
}

// Ranges that keys are cut into where rows alone would leave the card idle: two blocks for a multiprocessor,
// as one waits for memory while the other computes.
int64_t choose_splits(const Problem& p, const Device& device, const Plan& plan) {
  constexpr int64_t kLeastKeys = 256, kMostSplits = 128;
  const int64_t blocks = plan.forward.blocks;
  if (plan.options.batch_invariant || blocks == 0) return 1;
  const bool asked = plan.options.num_splits > 0;
  const int64_t wanted = asked ? plan.options.num_splits : 2 * device.multiprocessors / blocks;
  const int64_t pieces = asked ? ceil_div(p.seq_kv, plan.forward.variant->tile_kv) : p.seq_kv / kLeastKeys;
  const int64_t most = std::min({pieces, kMostSplits, std::numeric_limits<int>::max() / blocks});
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1));
}

void split_keys(Plan* plan, const Problem& p, const Device& device) {
  plan->num_splits = choose_splits(p, device, *plan);
  if (plan->num_splits == 1) return;
  choose(plan, &plan->merge_partials, Pass::kMergePartials, p, is_modified(p), device);
  if (!plan->objections.empty()) return;
  const Variant& v = *plan->forward.variant;
  const int64_t slices = v.split ? ceil_div(p.dim_v, v.dim) : 1;
  plan->forward.order.units *= plan->num_splits;
  plan->forward.blocks = plan->forward.order.blocks();
  plan->rows_padded = round_up(p.packed_rows(), v.tile_q);
  plan->stats_rows = p.batch * p.heads_kv * plan->rows_padded;
  plan->dim_padded = slices * v.dim;
  plan->workspace_bytes =
      size_t(plan->num_splits * plan->stats_rows * (plan->dim_padded + 2)) * sizeof(float);
  set_grid(&plan->merge_partials, p, device, p.packed_rows(), plan->merge_partials.variant->tile_q, 0, false);
}

Plan begin(const Problem& p, const Device& device, const Options& options) {
  Plan plan;
  plan.options = options;
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 4096;
  if (device.compute_capability < 80) {
    plan.objections.push_back("its kernels need compute capability 8.0 or newer, the device has " +
                              std::to_string(device.compute_capability / 10) + "." +
                              std::to_string(device.compute_capability % 10));
  }
  if (p.dtype == DType::kFloat64) plan.objections.push_back("there are no CUDA kernels for float64");
  if (std::max(p.seq_q, p.packing.total_q) * p.group() > kMost ||
      std::max({p.seq_kv, p.packing.total_kv, p.cache.capacity}) > kMost) {
    plan.objections.push_back("a head has more than 2^31 rows");
  }
  return plan;
}

void check_grids(Plan* plan) {
  for (const Launch* launch :
       {&plan->forward, &plan->merge_partials, &plan->row_stats, &plan->key_grad, &plan->query_grad,
        &plan->round_query_grad, &plan->bias_grad, &plan->head_grad}) {
    if (launch->blocks > std::numeric_limits<int>::max()) {
      plan->objections.push_back("the grid would have more than 2^31 blocks");
      return;
    }
  }
}

}  // namespace

Plan plan_forward(const Problem& p, const Device& device, const Options& options) {
  Plan plan = begin(p, device, options);
  if (!plan.objections.empty()) return plan;
  choose(&plan, &plan.forward, Pass::kForward, p, is_modified(p), device);
  if (!plan.objections.empty()) return plan;
  // Bottom rows see the most keys under a causal mask, so they go first.
  set_grid(&plan.forward, p, device, p.packed_rows(), plan.forward.variant->tile_q, p.dim_v, true);
  split_keys(&plan, p, device);
  check_grids(&plan);
  return plan;
}

Plan plan_backward(const Problem& p, const Device& device, const Options& options,
                   const MoreGradients& more) {
  Plan plan = begin(p, device, options);
  if (p.cache.present()) plan.objections.push_back("there are no gradients of a cache of keys");
  if (!plan.objections.empty()) return plan;
  const bool modified = is_modified(p);
  choose(&plan, &plan.row_stats, Pass::kRowStats, p, modified, device);
  choose(&plan, &plan.key_grad, Pass::kKeyGrad, p, modified, device);
  if (!plan.objections.empty()) return plan;
  // A kernel that cuts up the head dim sees no whole row of dS K.
  // Nor does one with atomics, and the slopes of ALiBi want to know it.
  const bool atomics = !options.deterministic && !plan.key_grad.variant->split && !more.dalibi;
  if (atomics) choose(&plan, &plan.round_query_grad, Pass::kRoundQueryGrad, p, modified, device);
  else choose(&plan, &plan.query_grad, Pass::kQueryGrad, p, modified, device);
  if (more.dbias_shape) choose(&plan, &plan.bias_grad, Pass::kBiasGrad, p, true, device);
  const bool head_grad = more.dsinks || more.dalibi;
  if (head_grad) choose(&plan, &plan.head_grad, Pass::kHeadGrad, p, true, device);
  if (!plan.objections.empty()) return plan;

  plan.rows_padded = round_up(p.packed_rows(), kRowPadding);
  // Packed sequences: see RowStats::place.
  plan.stats_rows = p.packing.present()
                        ? (p.packing.total_q * p.group() / kRowPadding + p.batch) * kRowPadding * p.heads_kv
                        : p.batch * p.heads_kv * plan.rows_padded;
  plan.dim_padded = round_up(p.dim, 8);
  const Launch whole = {plan.row_stats.variant, {}, 0};
  set_grid(&plan.row_stats, p, device, plan.rows_padded, whole.variant->tile_q, 0, false);
  // First keys keep most rows busy under a causal mask.
  set_grid(&plan.key_grad, p, device, p.seq_kv, plan.key_grad.variant->tile_kv, std::max(p.dim, p.dim_v),
           false);
  if (atomics) {
    set_grid(&plan.round_query_grad, p, device, plan.rows_padded, plan.round_query_grad.variant->tile_q, 0,
             false);
  } else {
    set_grid(&plan.query_grad, p, device, p.packed_rows(), plan.query_grad.variant->tile_q, p.dim, true);
  }
  if (const int64_t* const shape = more.dbias_shape) {
    const Variant& v = *plan.bias_grad.variant;
    plan.bias_grad.blocks = shape[0] * shape[1] * (shape[2] == 1 ? 1 : ceil_div(p.seq_q, v.tile_q)) *
                            (shape[3] == 1 ? 1 : ceil_div(p.seq_kv, v.tile_kv));
  }
  if (head_grad) plan.head_grad.blocks = p.heads_q;
  const size_t floats = size_t(3 + more.dsinks + more.dalibi + (atomics ? plan.dim_padded : 0));
  plan.workspace_bytes = size_t(plan.stats_rows) * sizeof(float) * floats;
  check_grids(&plan);
  return plan;
}

}  // namespace fae::cuda
