// What lets one source serve the host compiler and nvcc.
#pragma once

// Every bound counts roundings as they are written: sums in their order, quotients divided, NaN seen. (nvcc has no such
// macros: its flags are in cuda/nvcc_flags.txt, and setup.py looks through those that come from elsewhere.)
#if defined(__FAST_MATH__)
#error "gcfast: -ffast-math (or -Ofast) breaks the error bounds that its proofs rest on: build without it"
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "gcfast: -ffinite-math-only lets a NaN pass a comparison that a proof rests on: build without it"
#elif defined(__ASSOCIATIVE_MATH__)
#error "gcfast: -fassociative-math (or -funsafe-math-optimizations) breaks error-free sums: build without it"
#elif defined(__RECIPROCAL_MATH__)
#error "gcfast: -freciprocal-math (or -funsafe-math-optimizations) rounds quotients twice: build without it"
#elif defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error "gcfast: float or double is computed in a longer format (-mfpmath=387?) and rounded twice: build without that"
#endif

#if defined(__CUDACC__)
#define GCFAST_HD __host__ __device__ __forceinline__
#define GCFAST_UNROLL _Pragma("unroll")
#else
#define GCFAST_HD inline __attribute__((always_inline))
#define GCFAST_UNROLL _Pragma("GCC unroll 32")
#endif
