#pragma once
#include <cstdint>

namespace gcfast::cuda {

// out[i, j] = act(sum_k z[i, k] weight[j, k] + bias[j]), n x w, in float64; bias may be null. n, w, d >= 1. Rows are
// strided, columns are not. out overlaps no input. `stream` is a cudaStream_t of `device`, on which all pointers live.
// An element's value depends on its row of z, its row of weight and its bias only, not on n, w or its place.
struct WidePanelArgs {
  const double *z, *weight, *bias;
  double* out;
  int64_t n, w, d, z_stride, weight_stride, out_stride;
  int act;
  double beta;
  int device;
  void* stream;
};

// Returns when the kernel is queued. Throws std::runtime_error naming the CUDA call that failed.
void wide_panel(const WidePanelArgs& a);

}  // namespace gcfast::cuda
