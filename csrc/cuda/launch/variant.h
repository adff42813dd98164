// The compiled kernels: one row per variant, added by the file that instantiates it.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace fae::cuda {

// A CUDA stream; null for the emulator.
using Stream = void*;

enum class Pass : uint8_t {
  kForward,
  kMergePartials,  // of a forward pass over ranges of keys
  kRowStats,       // delta and log-sum-exp per row, before the others of the backward pass
  kKeyGrad,        // dK and dV, and with atomics dQ
  kQueryGrad,      // dQ without atomics
  kRoundQueryGrad,
  kBiasGrad,
  kHeadGrad,  // of sinks and slopes
};
const char* name_of(Pass pass);

struct Variant {
  const char* name;
  Pass pass;
  DType dtype;
  int dim;        // columns of a tile: the largest head dim, or what a split one is cut into
  bool split;     // head dims of any length
  bool modified;  // any score, not only plain ones
  int tile_q;     // packed query rows and keys of a tile
  int tile_kv;
  int threads;
  int shared_bytes;
  void (*launch)(const void* params, int64_t blocks, Stream stream);
};

// All variants of this build, in no particular order.
const std::vector<Variant>& variants();

// A variant joins the table when its file is loaded.
struct AddVariant { explicit AddVariant(const Variant& variant); };

}  // namespace fae::cuda
