// Puts the new keys and values of a call behind those in a cache, turned by their positions.
#pragma once

#include "core/cache_update.h"
#include "cpu/parallel.h"

namespace fae::cpu {

// problem: of the call, with its cache. k: (batch, heads_kv, problem.cache.added, dim), v likewise. Where two
// sequences share a place, the later one's stays.
void append(const Problem& problem, const View4& k, const View4& v, const Rotary& rotary,
            const Executor& executor);

// Writes q, turned, to `out`, (batch, heads_q, seq_q, dim) as it is; query i of a sequence stands at what is
// filled of its cache, left padding included, and with `moving` i further.
void rotate_queries(const Problem& problem, const View4& out, const Rotary& rotary, bool moving,
                    const Executor& executor);

}  // namespace fae::cpu
