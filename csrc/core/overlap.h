// Which strided tensors share memory, with others or with themselves.
#pragma once

#include "core/describe.h"

namespace fae {

// Whether two different indices of t can name the same element.
bool overlaps_itself(const TensorDesc& t);

// Whether a and b may share an element. Exact for tensors apart from each other and for
// slots of one packed buffer (q, k, v and out side by side); in other interleavings a
// pair that only interlocks counts as sharing. Never misses a shared element.
bool share_memory(const TensorDesc& a, const TensorDesc& b);

}  // namespace fae
