#pragma once
#include <cstdint>

namespace gcfast::cpu {

// Per row of logits (rows, c): loss, residual p - q and sum p log p. Exactly one of labels and probs is not null;
// q = (1 - smoothing) y + smoothing / c. Columns are contiguous, rows strided; residual has row stride c.
// A label outside [0, c) is not read through: its row becomes NaN in all three outputs.
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

// Per row of logits and v (rows, c): (diag(p) - p p^T) v with p = softmax(logits), into out of row stride c.
template <class T> struct CurvatureArgs {
  const T *logits, *v;
  T* out;
  int64_t rows, c, logits_stride, v_stride;
  int threads;
};

void softmax_curvature(const CurvatureArgs<float>& a);
void softmax_curvature(const CurvatureArgs<double>& a);

}  // namespace gcfast::cpu
