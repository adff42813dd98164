// What a kernel is launched with.
#pragma once

#include "core/cache_update.h"

namespace fae::cuda {

// The order of a linear grid's blocks: (unit, tile) pairs, a unit being a K/V head of the
// batch and perhaps a slice of the head dim. Within a section of units, whose K and V fit
// the L2 cache together, blocks go tile by tile; under a causal mask the dearest tiles first.
struct BlockOrder {
  int64_t tiles = 0;
  int64_t units = 0;
  int64_t section = 1;  // units
  bool descending = true;

  struct Place { int64_t unit, tile; };
  FAE_HD Place place(int64_t block) const {
    const int64_t blocks_of_section = tiles * section;
    const int64_t first = block / blocks_of_section * section;
    const int64_t rest = block % blocks_of_section;
    const int64_t size = units - first < section ? units - first : section;
    const int64_t tile = rest / size;
    return {first + rest % size, descending ? tiles - 1 - tile : tile};
  }
  FAE_HD int64_t blocks() const { return tiles * units; }
};

// Whether a problem takes the kernels that know more than softmax(scale * dot).
FAE_HD inline bool is_modified(const Problem& p) {
  return !p.score.is_plain() || p.score.sinks.present() || p.dropout.present();
}

// Constants of a score in fp32. Plain scores stay dot products until the exponent.
struct ScoreScale {
  float natural = 1;         // score = natural * value
  float exponent = 1;        // exp(score) = 2^(exponent * value)
  float modified_scale = 1;  // factor of a dot product that is not plain
};

// Which tensors' rows may be moved 16 bytes at a time: contiguous, aligned and whole. Others go
// element by element.
struct VectorRows {
  bool q = false, k = false, v = false, out = false, dout = false, dq = false, dk = false, dv = false;
};

// Results of a forward pass whose keys are cut into ranges, before they are merged: of each range and packed
// row a maximum, a sum, and the unnormalised output.
struct Partials {
  int count = 1;            // of ranges; 1: results are whole
  float* max = nullptr;     // (count, rows), of scores as kernels hold them, see ScoreScale
  float* sum = nullptr;     // (count, rows)
  float* out = nullptr;     // (count, rows, columns)
  int64_t rows_padded = 0;  // of a K/V head of the batch
  int64_t rows = 0;         // of all
  int64_t columns = 0;

  FAE_HD int64_t at(int range, int64_t unit, int packed_row) const {
    return range * rows + unit * rows_padded + packed_row;
  }
};

struct ForwardParams {
  ForwardCall call;
  BlockOrder order;
  ScoreScale scale;
  VectorRows vector;
  Partials partials;
  bool fast_fp32 = false;  // one TF32 product instead of three
};

// What rows in RowStats are padded to, per sequence and K/V head: every tile of packed rows.
constexpr int kRowPadding = 128;

// Per packed row: what the backward pass needs to know.
struct RowStats {
  float* lse = nullptr;      // natural; +inf for rows without keys and for padding, so that P is 0
  float* lse_low = nullptr;  // what rounding lse left over, to be added to it
  float* delta = nullptr;    // rowsum(dO * O) - dlse
  float* dsink = nullptr;    // terms of the sinks' gradient, or none
  float* dalibi = nullptr;   // terms of the slopes' gradient, or none
  int64_t batch_stride = 0;  // rows; of packed sequences what each may add to the rows before it
  int64_t head_stride = 0;

  // Of a sequence's first row. `rows_before`: packed rows of a head that lie before it, in packed sequences;
  // they begin at multiples of kRowPadding, so far apart that the padded rows of one end before the next.
  FAE_HD int64_t place(int64_t batch, int64_t head_kv, int64_t rows_before) const {
    return batch * batch_stride + head_kv * head_stride + rows_before / kRowPadding * kRowPadding;
  }
};

struct BackwardParams {
  BackwardCall call;
  BlockOrder order;
  ScoreScale scale;
  VectorRows vector;
  RowStats stats;
  float* dq_sum = nullptr;  // (rows as in stats, dim_padded): sums of dS K, or none
  int64_t dim_padded = 0;
  bool fast_fp32 = false;
};

struct CacheParams {
  static constexpr int kWarps = 4;     // of a block; a row of a head each at a time
  static constexpr int64_t kRun = 16;  // new rows of a sequence that a block puts into the cache, all heads

  Problem problem;
  CacheUpdate update;
  bool queries = false;  // turn queries; else put keys and values into the cache
  int64_t blocks = 1;

  FAE_HD int64_t runs() const { return (problem.cache.added + kRun - 1) / kRun; }  // of a sequence
};

// A result with rows that no packed sequence has.
struct Unowned {
  View4 view;  // of one batch; LSEs are a column
  int64_t heads = 0, columns = 0;
  int element_bytes = 0;
  bool to_minus_infinity = false;  // floats or doubles; else to 0
  SequenceRows rows;
};

struct ClearUnownedParams {
  static constexpr int kMost = 3;
  Unowned results[kMost];
  int count = 0;
  int64_t batch = 0;
  int64_t blocks = 1;
};

}  // namespace fae::cuda
