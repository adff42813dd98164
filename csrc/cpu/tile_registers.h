// Whether AMX may be used here.
#pragma once

namespace fae::cpu {

// The processor has tile registers that multiply bf16, and Linux lets this process use them: it is asked for
// that, as tile registers make the state of threads larger. False on other processors.
bool may_use_tile_registers();

}  // namespace fae::cpu
