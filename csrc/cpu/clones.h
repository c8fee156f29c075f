// Run-time choice of the instruction set. The attribute goes on plain serial functions called inside a parallel
// region; the loops in them are vectorised once per listed architecture.
#pragma once
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(GCFAST_NO_CLONES)
#define GCFAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define GCFAST_CLONES
#endif
