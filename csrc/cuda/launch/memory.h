#pragma once

#include <cstddef>

#include "cuda/launch/variant.h"

namespace fae::cuda {

// Fills device memory with zero bytes, in the order of the stream.
void zero_memory(void* data, size_t bytes, Stream stream);

}  // namespace fae::cuda
