#pragma once
#include <cstdint>

namespace gcfast::cuda {

// For each of `batch` matrices (n x m, any strides, in elements): the number of singular values above
// max(atol, rtol sigma_max), bounds of it and of the extreme singular values, all in float64. rank is -1 where it is
// not decided, -2 where the matrix is not finite. n, m, batch >= 1, and the shorter side at most
// batched_rank_limit(device). `scratch` has batch + 1 numbers. `stream` is a cudaStream_t of `device`, on which all
// pointers live.
template <class T> struct BatchedRankArgs {
  const T* a;
  int64_t batch, n, m, batch_stride, row_stride, column_stride;
  const double *atol, *rtol;  // one a matrix
  int64_t *rank, *lower, *upper;
  double *sigma_min_lower, *sigma_max_upper;
  int64_t* scratch;
  int device;
  void* stream;
};

// Return when the kernels are queued. Throw std::runtime_error naming the CUDA call that failed.
void batched_rank(const BatchedRankArgs<float>& a);
void batched_rank(const BatchedRankArgs<double>& a);
// The longest shorter side of a matrix that the shared memory of a block takes.
int batched_rank_limit(int device);

}  // namespace gcfast::cuda
