// Results of rows that lie behind the last of packed sequences: no other kernel comes there.
#pragma once

#include "cuda/params.h"
#include "cuda/prim/global.h"

namespace fae::cuda {

class ClearTail {
 public:
  using Params = ClearTailParams;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    for (int n = 0; n < params.count; ++n) clear(params, params.tails[n]);
  }

 private:
  static FAE_DEVICE void clear(const Params& params, const Tail& tail) {
    const int64_t end = tail.starts.at(params.batch);
    const int64_t first = end < 0 ? 0 : end;
    const int64_t row_elements = tail.heads * tail.columns;
    const int64_t count = (tail.total - first) * row_elements;  // none or less: nothing to do
    for (int64_t i = block_index() * kThreads + thread_index(); i < count; i += params.blocks * kThreads) {
      const int64_t row = first + i / row_elements, rest = i % row_elements;
      const int64_t at =
          tail.view.offset(0, rest / tail.columns, row) + rest % tail.columns * tail.view.stride[3];
      set(tail, at);
    }
  }

  static FAE_DEVICE void set(const Tail& tail, int64_t at) {
    void* const data = tail.view.data;
    switch (tail.element_bytes) {
      case 2: store_global(static_cast<uint16_t*>(data) + at, uint16_t(0)); break;
      case 4:
        store_global(static_cast<float*>(data) + at, tail.to_minus_infinity ? -__builtin_inff() : 0.0f);
        break;
      default: store_global(static_cast<double*>(data) + at, tail.to_minus_infinity ? -__builtin_inf() : 0.0);
    }
  }
};

}  // namespace fae::cuda
