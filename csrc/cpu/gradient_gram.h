#pragma once
#include <cstdint>

namespace gcfast::cpu {

// What gradients in a weight are made of, J[(i, c), (r, s)] = sum_t g[i, c, t, r] a[i, t, s]: g (n, c, t, rows of the
// weight) and a (n, t, its columns), of any strides.
template <class T> struct GradientFactors {
  const T* g;
  const T* a;
  int64_t n, c, t;
  int64_t g_sample, g_output, g_position, g_row;  // strides
  int64_t a_sample, a_position, a_column;
};

// out[(i, c), (j, e)] += sum over r, s of J[(i, c), (r, s)] J'[(j, e), (r, s)], J of x and J' of y. lower: y is x, and
// nothing above the diagonal of out is read or written. Sums begin at zero and are added to out with one rounding;
// their order is fixed by the sizes: no bit depends on the threads.
template <class T> struct GradientGramArgs {
  T* out;
  GradientFactors<T> x, y;
  int64_t r, s;                    // of the weight
  int64_t out_rows, out_columns;  // strides
  bool lower;
  int threads;
};

void gradient_gram(const GradientGramArgs<float>& a);
void gradient_gram(const GradientGramArgs<double>& a);

}  // namespace gcfast::cpu
