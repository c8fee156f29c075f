#pragma once
#include <cstdint>

namespace gcfast::cpu {

// For each of `batch` matrices (n x m, any strides, in elements): the number of singular values above max(atol, rtol
// sigma_max), bounds of it and of the extreme singular values, all in float64. rank is -1 where it is not decided, -2
// where the matrix is not finite. n, m, batch >= 1; the shorter of n and m is at most 256, or
// std::invalid_argument is thrown.
template <class T> struct BatchedRankArgs {
  const T* a;
  int64_t batch, n, m, batch_stride, row_stride, column_stride;
  const double *atol, *rtol;  // one a matrix
  int64_t *rank, *lower, *upper;
  double *sigma_min_lower, *sigma_max_upper;
  int threads;
};

// Returns how many ranks are negative.
int64_t batched_rank(const BatchedRankArgs<float>& a);
int64_t batched_rank(const BatchedRankArgs<double>& a);

}  // namespace gcfast::cpu
