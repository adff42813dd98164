// Runs problems through the CUDA kernels on the host emulator.
#pragma once

#include "attention_case.h"
#include "cuda/api.h"

namespace fae::testing {

struct EmulatedRun {
  cuda::Device device;
  cuda::Options options;
  uint64_t seed = 0;
  bool count = false;
};

// Runs a call on the tensors of c or on parts of them. `lse` has `lse_bytes`, and may be none.
void launch_forward(Case& c, const ForwardCall& call, size_t lse_bytes, const EmulatedRun& run);
void launch_backward(Case& c, const BackwardCall& call, const EmulatedRun& run);

// Every tensor is registered with the emulator: outputs as unset memory, all else read-only.
// Every element of an output must have been written at the end.
ForwardResult run_forward(Case& c, const EmulatedRun& run);
// Runs forward first.
BackwardResult run_backward(Case& c, const EmulatedRun& run);

}  // namespace fae::testing
