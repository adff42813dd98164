// Results of rows that no packed sequence has: no other kernel comes there.
#pragma once

#include "cuda/params.h"
#include "cuda/prim/global.h"

namespace fae::cuda {

class ClearUnowned {
 public:
  using Params = ClearUnownedParams;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 1;

  static FAE_DEVICE void run(const Params& params) {
    for (int n = 0; n < params.count; ++n) clear(params, params.results[n]);
  }

 private:
  static FAE_DEVICE void clear(const Params& params, const Unowned& result) {
    const int64_t parts = params.batch + 2;
    for (int64_t first = 0; first < parts; first += kThreads) {
      // Where starts and bounds are as they should be, all parts but the last are empty: a thread each looks.
      const int64_t own = first + thread_index();
      if (!block_any(own < parts && !is_empty(result.rows.unowned(own, params.batch)))) continue;
      const int64_t end = first + kThreads < parts ? first + kThreads : parts;
      for (int64_t n = first; n < end; ++n) fill(params, result, result.rows.unowned(n, params.batch));
    }
  }

  static FAE_DEVICE bool is_empty(const SequenceRows::Range& rows) { return rows.begin >= rows.end; }

  static FAE_DEVICE void fill(const Params& params, const Unowned& result, const SequenceRows::Range& rows) {
    const int64_t row_elements = result.heads * result.columns;
    const int64_t count = (rows.end - rows.begin) * row_elements;
    for (int64_t i = block_index() * kThreads + thread_index(); i < count; i += params.blocks * kThreads) {
      const int64_t row = rows.begin + i / row_elements, rest = i % row_elements;
      const int64_t at =
          result.view.offset(0, rest / result.columns, row) + rest % result.columns * result.view.stride[3];
      set(result, at);
    }
  }

  static FAE_DEVICE void set(const Unowned& result, int64_t at) {
    void* const data = result.view.data;
    switch (result.element_bytes) {
      case 2: store_global(static_cast<uint16_t*>(data) + at, uint16_t(0)); break;
      case 4:
        store_global(static_cast<float*>(data) + at, result.to_minus_infinity ? -__builtin_inff() : 0.0f);
        break;
      default:
        store_global(static_cast<double*>(data) + at, result.to_minus_infinity ? -__builtin_inf() : 0.0);
    }
  }
};

}  // namespace fae::cuda
