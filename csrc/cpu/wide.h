#pragma once
#include <cstdint>

namespace gcfast::cpu {

// Phi = act(z weight^T + bias): z (n, d), weight (m, d), rows strided, unit column strides; bias (m). bf16: the
// product with weight rounds its operands to bfloat16 where the processor multiplies them faster (T = float only).
template <class T> struct WideLayer {
  const T *z, *weight, *bias;
  int64_t n, d, m, z_stride, weight_stride;
  int act;
  double beta;
  bool bf16;
  int threads;
};

// out (n, c) = Phi head^T + head_bias, head (c, m); head_bias may be null; out has contiguous rows.
template <class T> struct WideForward {
  WideLayer<T> layer;
  const T *head, *head_bias;
  T* out;
  int64_t c, head_stride;
};
// out (c, m) = r^T Phi, r (n, c).
template <class T> struct WideHeadGrad {
  WideLayer<T> layer;
  const T* r;
  T* out;
  int64_t c, r_stride;
};
// With D = act'(z weight^T + bias) o (g head): dz (n, d) = D weight, dweight (m, d) = D^T z, dbias (m) = D^T 1,
// dhead (c, m) = g^T Phi; each may be null. All of them contiguous.
template <class T> struct WideBackward {
  WideLayer<T> layer;
  const T *g, *head;
  T *dz, *dweight, *dbias, *dhead;
  int64_t c, g_stride, head_stride;
};
// out (n, c) = Phi (Phi^T r).
template <class T> struct WideGramProduct {
  WideLayer<T> layer;
  const T* r;
  T* out;
  int64_t c, r_stride;
};
// out (n, m) = Phi, rows strided. An element depends on its row of z, its row of weight and its bias alone.
template <class T> struct WidePanel {
  WideLayer<T> layer;
  T* out;
  int64_t out_stride;
};

#define GCFAST_WIDE_OPS(T)                \
  void wide_forward(const WideForward<T>&); \
  void wide_head_grad(const WideHeadGrad<T>&); \
  void wide_backward(const WideBackward<T>&); \
  void wide_gram_product(const WideGramProduct<T>&); \
  void wide_panel(const WidePanel<T>&);
GCFAST_WIDE_OPS(float)
GCFAST_WIDE_OPS(double)
#undef GCFAST_WIDE_OPS

// How float products are made where bf16 is allowed: "amx", "avx512_bf16" or "" (in float32).
const char* wide_bf16();

}  // namespace gcfast::cpu
