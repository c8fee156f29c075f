// What lets one source serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define GCFAST_HD __host__ __device__ __forceinline__
#define GCFAST_UNROLL _Pragma("unroll")
#else
#define GCFAST_HD inline __attribute__((always_inline))
#define GCFAST_UNROLL _Pragma("GCC unroll 32")
#endif
