// Run-time choice of the instruction set. The attribute goes on plain serial functions called inside a parallel
// region; the loops in them are vectorised once per listed architecture.
#pragma once
#include "../core/macros.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(GCFAST_NO_CLONES)
#define GCFAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define GCFAST_CLONES
#endif

namespace gcfast::cpu {

// 4, 3 or 0: which of x86-64-v4, x86-64-v3 and the default the functions above run as here.
inline int instruction_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GCFAST_NO_CLONES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return 4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 3;
#endif
  return 0;
}

}  // namespace gcfast::cpu
