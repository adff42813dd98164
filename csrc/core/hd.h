// Functions that are one and the same on the host and in a CUDA kernel.
#pragma once

#if defined(__CUDACC__)
#define FAE_HD __host__ __device__
#else
// Files for newer instruction sets use these functions, too: inlined, they leave no copy behind
// that the linker could give to others.
#define FAE_HD __attribute__((always_inline))
#endif
