// Functions that the CPU's and the CUDA sources share: they are static, so that every SIMD level keeps its own copy.
#pragma once

#ifdef __CUDACC__
#define LUTRA_SHARED __host__ __device__ __forceinline__ static
#else
#define LUTRA_SHARED static inline
#endif
