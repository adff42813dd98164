// From an ISA and a dtype to kernels.
#pragma once

#include "cpu/kernel_table.h"

namespace fae::cpu {

// Requires dtype to be floating; to run them, isa must be among available_isas().
const DTypeKernels& kernels_for(Isa isa, DType dtype);

}  // namespace fae::cpu
