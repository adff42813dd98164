// What a call on a cache of keys and values does before it attends.
#pragma once

#include "core/problem.h"

namespace fae {

// Rotary position embedding (Su et al., RoFormer, 2021, arXiv:2104.09864): the first 2 `pairs` elements of a
// row at position n are turned, two by two, by the angles whose cosines and sines are row n of the tables.
struct Rotary {
  const void* cos = nullptr;  // (positions, pairs)
  const void* sin = nullptr;
  DType cos_dtype = DType::kFloat32, sin_dtype = DType::kFloat32;
  int64_t cos_stride[2] = {0, 0}, sin_stride[2] = {0, 0};
  int64_t positions = 0, pairs = 0;
  bool interleaved = false;  // pairs are (0, 1), (2, 3), ...; else (0, pairs), (1, pairs + 1), ...

  FAE_HD bool present() const { return cos != nullptr; }
  // Of the tables, within them whatever position lengths lead to.
  FAE_HD int64_t row(int64_t position) const { return position < positions ? position : positions - 1; }
};

struct CacheUpdate {
  View4 k, v;     // (batch, heads_kv, problem.cache.added, dim), put behind what is there; or none
  Rotary rotary;  // turns k, and queries
  View4 turned;   // like q: where queries go turned
  bool queries_move = false;  // each is turned by its own position; else all by that of the first
};

// A call of the operator on caches. The problem's q is as it was given: queries that are turned are those of
// `update.turned`.
struct CachedCall {
  ForwardCall forward;
  CacheUpdate update;
};

}  // namespace fae
