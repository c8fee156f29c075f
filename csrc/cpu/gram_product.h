#pragma once
#include <cstdint>

namespace gcfast::cpu {

// out = x K for symmetric K (n, n) of row stride ld and x, out (c, n) contiguous: c right-hand sides, each a row.
// Only the lower triangle of K is read, outside the square blocks on its diagonal.
template <class T> struct GramProductArgs {
  const T* gram;
  const T* x;
  T* out;
  int64_t n, c, ld;
  int threads;
};

void gram_product(const GramProductArgs<float>& a);
void gram_product(const GramProductArgs<double>& a);

}  // namespace gcfast::cpu
