// The least that a test program needs: a failed CHECK says where and counts; main returns report().
#pragma once
#include <cstdio>

inline int failures = 0, checks = 0;

#define CHECK(condition, ...)                                          \
  do {                                                                 \
    ++checks;                                                          \
    if (!(condition) && ++failures <= 20) {                            \
      std::printf("%s:%d: not true: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                        \
      std::printf("\n");                                               \
    }                                                                  \
  } while (0)

inline int report() {
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}
