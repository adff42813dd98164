#pragma once

#include <cstddef>

#include "cuda/launch/variant.h"
#include "cuda/params.h"

namespace fae::cuda {

// Fills device memory with zero bytes, in the order of the stream.
void zero_memory(void* data, size_t bytes, Stream stream);

// Sets results of rows that belong to no sequence.
void clear_unowned(const ClearUnownedParams& params, Stream stream);

// Puts new keys into a cache, or turns queries.
void update_cache(const CacheParams& params, Stream stream);

}  // namespace fae::cuda
