#pragma once
#include <cstdint>

namespace gcfast::cuda {

// out[i, j] = (grad[i, j] *) act^(order)(x[i, j] + bias[j]); bias and grad may be null. Rows are strided, columns
// are not. out may be x or grad. `stream` is a cudaStream_t of `device`, on which all pointers live.
template <class T> struct ActivationArgs {
  const T *x, *bias, *grad;
  T* out;
  int64_t rows, cols, x_stride, grad_stride, out_stride;
  int act, order;
  double beta;
  int device;
  void* stream;
};

// Returns when the kernel is queued. Throws std::runtime_error naming the CUDA call that failed.
void activation(const ActivationArgs<float>& a);
void activation(const ActivationArgs<double>& a);

}  // namespace gcfast::cuda
