// Gradients of numbers that a whole head shares, sinks and slopes of ALiBi: sums of one term per row.
#pragma once

#include "cuda/params.h"
#include "cuda/prim/warp.h"
#include "cuda/tile/element.h"

namespace fae::cuda {

// A block sums the rows of a query head, in an order that depends on nothing else. T: of q, k and v, which
// this kernel does not read.
template <class T>
class HeadGrad {
  static constexpr int kWarps = 8;

 public:
  using Params = BackwardParams;
  static constexpr int kTileQ = 0;
  static constexpr int kTileKV = 0;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSharedBytes = kWarps * int(sizeof(double));
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    const int head = int(block_index());
    sum(params, params.stats.dsink, params.call.dsinks, head);
    sum(params, params.stats.dalibi, params.call.dalibi, head);
  }

 private:
  // grad[b][head], or grad[head] where it has no batches.
  static FAE_DEVICE void sum(const Params& params, const float* rows, const PerHead& grad, int head) {
    if (!rows) return;
    const Problem& p = params.call.problem;
    const int group = int(p.group());
    const bool batched = grad.stride[0] != 0;
    double own = 0;
    for (int b = 0; b < p.batch; ++b) {
      const Sequence sequence = p.sequence(b);
      const int count = int(sequence.seq_q);
      const int64_t first = params.stats.place(b, head / group, sequence.first_query * group) + head % group;
      for (int i = thread_index(); i < count; i += kThreads) {
        own += double(load_global(rows + first + int64_t(i) * group));
      }
      if (!batched && b + 1 < p.batch) continue;
      const double total = sum_of_block(own);
      own = 0;
      if (thread_index() == 0) {
        store_as(grad.data, grad.dtype, b * grad.stride[0] + head * grad.stride[1], total);
      }
    }
  }

  // For thread 0.
  static FAE_DEVICE double sum_of_block(double x) {
    const Smem<double> sums = shared_memory().template as<double>();
    FAE_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    block_barrier();  // nobody reads what was there before
    if (lane_index() == 0) store_shared(sums + warp_index(), x);
    block_barrier();
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += load_shared(sums + warp);
    return total;
  }
};

}  // namespace fae::cuda
