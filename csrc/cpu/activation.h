#pragma once
#include <cstdint>

namespace gcfast::cpu {

// out[i, j] = (grad[i, j] *) act^(order)(x[i, j] + bias[j]); bias and grad may be null. Rows are strided, columns
// are not. out may be x or grad.
template <class T> struct ActivationArgs {
  const T *x, *bias, *grad;
  T* out;
  int64_t rows, cols, x_stride, grad_stride, out_stride;
  int act, order;
  double beta;
  int threads;
};

void activation(const ActivationArgs<float>& a);
void activation(const ActivationArgs<double>& a);

}  // namespace gcfast::cpu
