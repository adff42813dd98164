// Emulated tile registers need no permission: takes the place of csrc/cpu/tile_registers.cpp.
#include "cpu/tile_registers.h"

namespace fae::cpu {

bool may_use_tile_registers() { return true; }

}  // namespace fae::cpu
