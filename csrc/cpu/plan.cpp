// Chooses tile sizes and the split of the work; host arithmetic only.
#include <algorithm>
#include <numeric>

#include "cpu/dispatch.h"

namespace fae::cpu {
namespace {

// What a core keeps close while it works on one block of keys: packed keys and values,
// and the rows that go over them; together about the second-level cache of current servers
// (1 to 2 MiB). Measured flat around these values, and falling below half of them.
constexpr int64_t kKeyBytes = 512 << 10;
constexpr int64_t kBackwardKeyBytes = 704 << 10;  // with their gradients, but next to shorter rows
constexpr int64_t kRowBytes = 800 << 10;
// Advice may go past that, for trying out, without taking a machine's memory.
constexpr int64_t kMostAdvisedBytes = 4 << 20;
constexpr int64_t kMostAdvised = 4096;
// Below this much work per thread, waking another thread costs more than it saves.
constexpr double kFlopsPerThread = 4e5;
constexpr double kDirectFlopsPerThread = 1e5;  // of few rows, which wait for memory

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// The largest multiple of `step` with at most `bytes` at `each`, within [step, most].
int64_t fitting(int64_t bytes, int64_t each, int64_t step, int64_t most) {
  return std::clamp(bytes / each / step * step, step, std::max(step, most));
}

// An advised number of rows or keys, at `each` bytes, as whole steps and within reason.
int64_t advised(int64_t advice, int64_t each, int64_t step) {
  return round_up(std::min(advice, fitting(kMostAdvisedBytes, each, step, kMostAdvised)), step);
}

// Few rows are multiplied with keys as they lie in memory (kernel/direct.h), in blocks that are long enough
// for keys and values to be fetched early, and by ranges of keys where there are few heads: their number
// comes from the problem alone, as a row's rounding depends on it.
constexpr int64_t kDirectBytes = 32 << 10;
constexpr int64_t kFewestSplitKeys = 1024;
constexpr int64_t kEnoughSplits = 16;
constexpr int64_t kMostHeadsTogether = 32;

bool wants_direct(const Problem& p, const Advice& advice) {
  return p.packed_rows() <= kDirectRows && p.k.stride[3] == 1 && p.v.stride[3] == 1 &&
         !advice.batch_invariant && advice.block_q == 0 && advice.block_kv == 0;
}

int64_t direct_block(const Problem& p) {
  return std::min(fitting(kDirectBytes, std::max(p.dim, p.dim_v) * size_of(p.dtype), 64, 256),
                  round_up(std::max<int64_t>(p.seq_kv, 1), 64));
}

void plan_direct(const Problem& p, const KernelInfo& info, const Advice& advice, Plan* plan) {
  const int64_t units = p.batch * p.heads_kv;
  // Heads that lie side by side go through their keys together, by one task a range.
  const bool together = p.k.stride[1] < p.k.stride[2];
  plan->block_q = p.packed_rows();
  plan->block_kv = direct_block(p);
  plan->splits = advice.splits > 0
                     ? std::min(advice.splits, ceil_div(std::max<int64_t>(p.seq_kv, 1), plan->block_kv))
                     : std::clamp<int64_t>(p.seq_kv / kFewestSplitKeys, 1,
                                           ceil_div(kEnoughSplits, together ? p.batch : units));
  plan->split_keys = round_up(ceil_div(p.seq_kv, plan->splits), plan->block_kv);
  // Of no influence on any result, so threads may count: three tasks each.
  if (together) {
    const int64_t fewest = 3 * plan->threads, others = p.batch * plan->splits;
    plan->heads_together = std::clamp<int64_t>(p.heads_kv / std::max<int64_t>(1, ceil_div(fewest, others)), 1,
                                               kMostHeadsTogether);
  }
  plan->tasks = p.batch * ceil_div(p.heads_kv, plan->heads_together) * plan->splits;
  if (plan->splits > 1) {
    plan->shared_bytes =
        size_t(units * plan->splits * KeySplit<float>::elements(p, *plan)) * size_t(info.accumulator_bytes);
  }
}

// (query, key) pairs that band and lengths leave visible, over all batches and heads.
double visible_pairs(const Problem& p) {
  double pairs = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = p.sequence(b);
    double rows = 0;
    if (sequence.band.unbounded()) {
      rows = double(sequence.seq_q) * double(sequence.kv_length);
    } else {
      for (int64_t i = 0; i < sequence.seq_q; ++i) {
        const KeyRange seen = visible_keys(sequence.band, sequence.kv_length, i, i + 1);
        rows += double(seen.end - seen.begin);
      }
    }
    pairs += rows;
    if (!p.masking.kv_lengths.present() && !p.ragged()) {
      return rows * double(p.batch) * double(p.heads_q);
    }
  }
  return pairs * double(p.heads_q);
}

double tensor_bytes(const Problem& p) {
  const bool packed = p.packing.present();
  const double queries = packed ? double(p.packing.total_q) : double(p.batch) * double(p.seq_q);
  const double keys = packed ? double(p.packing.total_kv) : double(p.batch) * double(p.seq_kv);
  return double(size_of(p.dtype)) * (queries * double(p.heads_q) + keys * double(p.heads_kv)) *
         double(p.dim + p.dim_v);
}

int useful_threads(double flops, int threads, bool direct) {
  const double each = direct ? kDirectFlopsPerThread : kFlopsPerThread;
  return int(std::clamp(flops / each, 1.0, double(std::max(threads, 1))));
}

// Tiles of `rows` for each of `units`: several tasks per thread, so that causal masks balance, unless they
// become so short that packing the keys shows. Few tasks are as many as threads can share evenly.
int64_t row_tiles(int64_t rows, int64_t units, int64_t threads, const KernelInfo& info) {
  if (threads == 1) return 1;
  const int64_t enough = 6 * threads;
  const int64_t tiles = std::min(ceil_div(enough, units), ceil_div(rows, 16 * info.register_rows));
  const int64_t even = round_up(tiles, threads / std::gcd(units, threads));
  return units * tiles < enough && even <= ceil_div(rows, 4 * info.register_rows) ? even : tiles;
}

Plan begin_plan(const Problem& p, Isa isa, const KernelInfo& info) {
  Plan plan;
  plan.isa = isa;
  plan.kernel = info.name;
  plan.register_rows = info.register_rows;
  plan.register_cols = info.register_cols;
  plan.bytes = tensor_bytes(p);
  return plan;
}

Plan with_workspace(Plan plan, const Problem& p, const DTypeKernels& kernels) {
  plan.threads = int(std::min<int64_t>(plan.threads, plan.tasks));
  ForwardCall call;
  call.problem = p;
  plan.worker_bytes = kernels.forward.workspace(call, plan);
  return plan;
}

}  // namespace

Plan plan_forward(const Problem& p, Isa isa, int threads, const Advice& advice) {
  const DTypeKernels& kernels = kernels_for(isa, p.dtype);
  const KernelInfo& info = kernels.info;
  Plan plan = begin_plan(p, isa, info);
  plan.flops = 2.0 * visible_pairs(p) * double(p.dim + p.dim_v);
  plan.direct = wants_direct(p, advice);
  plan.threads = useful_threads(plan.flops, threads, plan.direct);

  const int64_t key_bytes = (p.dim + p.dim_v) * info.element_bytes;
  const int64_t row_bytes = p.dim * info.element_bytes + p.dim_v * info.accumulator_bytes;
  // Depends on the head dims and the advice alone, as a row's rounding depends on it.
  plan.block_kv = advice.block_kv > 0 ? advised(advice.block_kv, key_bytes, info.register_cols)
                                      : fitting(kKeyBytes, key_bytes, info.register_cols, 12 * 64);
  plan.block_kv = std::min(plan.block_kv, round_up(std::max<int64_t>(p.seq_kv, 1), info.register_cols));
  const int64_t units = p.batch * p.heads_kv;
  const int64_t rows = p.packed_rows();
  if (!p.has_output()) {
    plan.block_q = info.register_rows;
    return plan;
  }
  if (plan.direct) {
    plan_direct(p, info, advice, &plan);
    return with_workspace(plan, p, kernels);
  }
  const int64_t most = fitting(kRowBytes, row_bytes, info.register_rows, 2048);
  const int64_t tiles = std::max(ceil_div(rows, most), row_tiles(rows, units, plan.threads, info));
  plan.block_q = round_up(ceil_div(rows, tiles), info.register_rows);
  if (advice.block_q > 0) {
    plan.block_q =
        std::min(advised(advice.block_q, row_bytes, info.register_rows), round_up(rows, info.register_rows));
  }
  plan.tasks = units * ceil_div(rows, plan.block_q);
  return with_workspace(plan, p, kernels);
}

Plan plan_backward(const Problem& p, Isa isa, int threads, const Advice& advice) {
  // Numbers that the order of summation depends on come from the problem alone.
  constexpr int64_t kEnoughTasks = 32;
  const DTypeKernels& kernels = kernels_for(isa, p.dtype);
  const KernelInfo& info = kernels.info;
  Plan plan = begin_plan(p, isa, info);
  plan.flops = 5.0 * visible_pairs(p) * double(p.dim + p.dim_v);
  plan.bytes *= 2;
  plan.direct = wants_direct(p, advice);
  plan.threads = useful_threads(plan.flops, threads, plan.direct);

  const int64_t key_bytes =
      (2 * p.dim + p.dim_v) * info.element_bytes + (p.dim + p.dim_v) * info.accumulator_bytes;
  // Whole register tiles both as rows (dK, dV) and as columns (scores).
  const int64_t step = 3 * 64;
  plan.block_kv = advice.block_kv > 0 ? advised(advice.block_kv, key_bytes, info.register_cols)
                                      : fitting(kBackwardKeyBytes, key_bytes,
                                                key_bytes > 4096 ? info.register_cols : step, 2 * step);
  plan.block_kv = std::min(plan.block_kv, round_up(std::max<int64_t>(p.seq_kv, 1), info.register_cols));
  if (plan.direct) plan.block_kv = direct_block(p);
  // Each row comes packed twice, and with its probabilities and gradients against the block.
  const int64_t row_bytes =
      std::max(2 * (p.dim + p.dim_v) * info.element_bytes, 2 * plan.block_kv * info.accumulator_bytes);
  plan.block_q = advice.block_q > 0 ? advised(advice.block_q, row_bytes, info.register_rows) : 16 * 6;
  const int64_t rows = p.packed_rows();
  plan.block_q = std::min(plan.block_q, round_up(std::max<int64_t>(rows, 1), info.register_rows));
  const int64_t units = p.batch * p.heads_kv;
  const int64_t counted = advice.batch_invariant ? p.heads_kv : units;
  if (units > 0 && counted < kEnoughTasks && p.seq_kv > 0) {
    // Each chunk packs all keys and adds to all of their gradients: short ones only where heads are few.
    const int64_t fewest_rows = counted < 4 ? 192 : 384;
    // So few heads that threads would have nothing to do gain more from chunks than packing costs.
    const int64_t least = std::min(ceil_div(4, counted), rows / (counted == 1 ? 48 : 96));
    plan.chunks =
        std::clamp<int64_t>(std::max(least, rows / fewest_rows), 1, ceil_div(kEnoughTasks, counted));
  }
  plan.tasks = units * plan.chunks;
  BackwardCall call;
  call.problem = p;
  plan.worker_bytes =
      std::max({kernels.backward.workspace(call, plan), kernels.bias_grad.workspace(call, plan),
                kernels.log_sum.workspace(call, plan)});
  if (plan.chunks > 1) {
    plan.shared_bytes = size_t(units) * kernels.backward.dq_bytes(p) +
                        size_t(2 * units) * kernels.backward.dkv_bytes(p, plan);
  }
  return plan;
}

}  // namespace fae::cpu
