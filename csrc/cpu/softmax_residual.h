#pragma once
#include <cstdint>

namespace gcfast::cpu {

// Per row of logits (rows, c): loss, residual p - q and sum p log p. Exactly one of labels and probs is not null;
// q = (1 - smoothing) y + smoothing / c. Columns are contiguous, rows strided; residual has row stride c.
template <class T> struct SoftmaxArgs {
  const T* logits;
  const int64_t* labels;
  const T* probs;
  T *loss, *residual, *neg_entropy;
  int64_t rows, c, logits_stride, probs_stride;
  double smoothing;
  int threads;
};

void softmax_residual(const SoftmaxArgs<float>& a);
void softmax_residual(const SoftmaxArgs<double>& a);

}  // namespace gcfast::cpu
