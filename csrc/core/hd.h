// Functions that are one and the same on the host and in a CUDA kernel.
#pragma once

#if defined(__CUDACC__)
#define FAE_HD __host__ __device__
#else
#define FAE_HD
#endif
