#pragma once
#include <cstdint>

namespace gcfast::cpu {

// Factors of unit stride along o: element (i, c, t, o) of an (n, c, t, .) one at x[i sample + c output + t position + o].
template <class T> struct JacobianFactor {
  const T* x;
  int64_t n, c, t;
  int64_t sample, output, position;  // strides
};

// out[(i, c), (j, e)] += sum over l, t, s of scale[l, (i, t), (j, s)] sum_o g[i, c, t, o] h[j, e, s, o], o in layer l:
// from ends[l - 1] (0 for the first) to ends[l]. lower: nothing above the diagonal of out is read or written, and the
// factors have the same sizes. Sums begin at zero and are added to out with one rounding; their order is fixed: no bit
// depends on the threads, or on which samples a call has.
template <class T> struct JacobianGramArgs {
  T* out;
  JacobianFactor<T> g, h;
  const T* scale;
  const int64_t* ends;
  int64_t layers;
  int64_t out_rows, out_columns, scale_layers, scale_rows, scale_columns;  // strides
  bool lower;
  int threads;
};

void jacobian_gram(const JacobianGramArgs<float>& a);
void jacobian_gram(const JacobianGramArgs<double>& a);

}  // namespace gcfast::cpu
