// Puts the new keys and values of a call behind those in a cache, turned by their positions.
#pragma once

#include "core/problem.h"
#include "cpu/parallel.h"

namespace fae::cpu {

// Rotary position embedding (Su et al., RoFormer, 2021, arXiv:2104.09864): the first 2 `pairs` elements of a
// row at position n are turned, two by two, by the angles whose cosines and sines are row n of the tables.
struct Rotary {
  const void* cos = nullptr;  // (positions, pairs)
  const void* sin = nullptr;
  DType cos_dtype = DType::kFloat32, sin_dtype = DType::kFloat32;
  int64_t cos_stride[2] = {0, 0}, sin_stride[2] = {0, 0};
  int64_t pairs = 0;
  bool interleaved = false;  // pairs are (0, 1), (2, 3), ...; else (0, pairs), (1, pairs + 1), ...

  bool present() const { return cos != nullptr; }
};

// problem: of the call, with its cache. k: (batch, heads_kv, problem.cache.added, dim), v likewise. Where two
// sequences share a place, the later one's stays.
void append(const Problem& problem, const View4& k, const View4& v, const Rotary& rotary,
            const Executor& executor);

// Writes q, turned, to `out`, (batch, heads_q, seq_q, dim) as it is; query i of a sequence stands at what is
// filled of its cache, left padding included, and with `moving` i further.
void rotate_queries(const Problem& problem, const View4& out, const Rotary& rotary, bool moving,
                    const Executor& executor);

}  // namespace fae::cpu
