// From an ISA and a dtype to kernels.
#pragma once

#include "cpu/kernel_table.h"

namespace fae::cpu {

// Requires isa to be among available_isas() and dtype to be floating.
const DTypeKernels& kernels_for(Isa isa, DType dtype);

}  // namespace fae::cpu
