#pragma once
#include <cstdint>

#include "../core/activations.h"

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

// out[i] = act^(order)(x[i]) for n elements, serially; out may be x. What it gives for an element does not depend on
// where it stands, as long as n is a multiple of 64.
template <class T> using ActivationBlock = void (*)(const T* x, T* out, int64_t n, Scale<T> beta);
template <class T> ActivationBlock<T> activation_block(int act, int order, double beta);

}  // namespace gcfast::cpu
