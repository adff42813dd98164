#pragma once

#include "cuda/api.h"

namespace fae::cuda {

// Of a device by its number; asked for once per device. Throws std::runtime_error.
const Device& device_properties(int index);

}  // namespace fae::cuda
