#include "activation.h"

#include <algorithm>
#include <vector>

#include "clones.h"

namespace gcfast::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // elements that stay in the first-level cache between the passes of a block

#define GCFAST_BLOCK(T, NAME, ORDER, SCALED, SUFFIX)                                                        \
  GCFAST_CLONES void NAME##_##ORDER##_##SUFFIX(const T* x, T* out, int64_t n, Scale<T> beta) {              \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i)                                                     \
        out[i] = activate<Act::NAME, ORDER, SCALED>(x[i], beta);                                            \
  }
#define GCFAST_ORDERS(T, NAME, SCALED, SUFFIX) \
  GCFAST_BLOCK(T, NAME, 0, SCALED, SUFFIX)     \
  GCFAST_BLOCK(T, NAME, 1, SCALED, SUFFIX)     \
  GCFAST_BLOCK(T, NAME, 2, SCALED, SUFFIX)
#define GCFAST_ALL(T, SUFFIX)                          \
  GCFAST_ORDERS(T, softplus, false, SUFFIX)            \
  GCFAST_ORDERS(T, softplus, true, SUFFIX##_scaled)    \
  GCFAST_ORDERS(T, sigmoid, false, SUFFIX)             \
  GCFAST_ORDERS(T, tanh, false, SUFFIX)                \
  GCFAST_ORDERS(T, gelu, false, SUFFIX)                \
  GCFAST_ORDERS(T, gelu_tanh, false, SUFFIX)           \
  GCFAST_ORDERS(T, silu, false, SUFFIX)                \
  GCFAST_ORDERS(T, relu, false, SUFFIX)                \
  GCFAST_CLONES void add_##SUFFIX(const T* x, const T* b, T* out, int64_t n) { \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) out[i] = x[i] + b[i];  \
  }                                                                            \
  GCFAST_CLONES void mul_##SUFFIX(const T* x, const T* g, T* out, int64_t n) { \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) out[i] = x[i] * g[i];  \
  }
GCFAST_ALL(float, f32)
GCFAST_ALL(double, f64)

#define GCFAST_ROW(NAME, SUFFIX) {NAME##_0_##SUFFIX, NAME##_1_##SUFFIX, NAME##_2_##SUFFIX}
#define GCFAST_TABLE(SUFFIX)                                                                              \
  {GCFAST_ROW(softplus, SUFFIX), GCFAST_ROW(sigmoid, SUFFIX), GCFAST_ROW(tanh, SUFFIX),                   \
   GCFAST_ROW(gelu, SUFFIX),     GCFAST_ROW(gelu_tanh, SUFFIX), GCFAST_ROW(silu, SUFFIX),                 \
   GCFAST_ROW(relu, SUFFIX),     GCFAST_ROW(softplus, SUFFIX##_scaled)}

template <class T> struct Table;
template <> struct Table<float> {
  static ActivationBlock<float> get(int row, int order) {
    static const ActivationBlock<float> table[8][3] = GCFAST_TABLE(f32);
    return table[row][order];
  }
  static void add(const float* x, const float* b, float* o, int64_t n) { add_f32(x, b, o, n); }
  static void mul(const float* x, const float* g, float* o, int64_t n) { mul_f32(x, g, o, n); }
};
template <> struct Table<double> {
  static ActivationBlock<double> get(int row, int order) {
    static const ActivationBlock<double> table[8][3] = GCFAST_TABLE(f64);
    return table[row][order];
  }
  static void add(const double* x, const double* b, double* o, int64_t n) { add_f64(x, b, o, n); }
  static void mul(const double* x, const double* g, double* o, int64_t n) { mul_f64(x, g, o, n); }
};

// One block: the sum with the bias and the product with the gradient go through cache-resident scratch.
template <class T>
void run_block(ActivationBlock<T> f, const T* x, const T* bias, const T* grad, T* out, int64_t n, Scale<T> beta) {
  alignas(64) T scratch[kBlock];
  const T* in = x;
  if (bias) {
    Table<T>::add(x, bias, scratch, n);
    in = scratch;
  }
  if (!grad) return f(in, out, n, beta);
  f(in, scratch, n, beta);
  Table<T>::mul(scratch, grad, out, n);
}

template <class T> void run(const ActivationArgs<T>& a) {
  if (a.rows <= 0 || a.cols <= 0) return;
  const ActivationBlock<T> f = activation_block<T>(a.act, a.order, a.beta);
  const T hi = static_cast<T>(a.beta);
  const Scale<T> beta{hi, static_cast<T>(a.beta - static_cast<double>(hi)), static_cast<T>(1.0 / a.beta)};

  // Contiguous rows need no row structure: without a bias they are one long row; with one, short rows are joined
  // into a block under a repeated bias, so that a narrow matrix does not pay a call per row.
  int64_t rows = a.rows, cols = a.cols;
  const bool flat = rows == 1 || (a.x_stride == cols && a.out_stride == cols && (!a.grad || a.grad_stride == cols));
  std::vector<T> repeated;
  int64_t step = kBlock;
  const T* bias = a.bias;
  bool bias_repeats = false;
  if (flat && bias && cols <= kBlock / 4 && rows > 1) {
    step = kBlock / cols * cols;
    repeated.resize(step);
    for (int64_t i = 0; i < step; ++i) repeated[i] = bias[i % cols];
    bias = repeated.data();
    bias_repeats = true;
  }
  if (flat && (!bias || bias_repeats)) {
    cols *= rows;
    rows = 1;
  }
  const int64_t per_row = (cols + step - 1) / step, tasks = rows * per_row;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(a.threads, tasks / 8)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t i = task / per_row, j = (task % per_row) * step, n = std::min(step, cols - j);
    run_block(f, a.x + i * a.x_stride + j, bias ? (bias_repeats ? bias : bias + j) : nullptr,
              a.grad ? a.grad + i * a.grad_stride + j : nullptr, a.out + i * a.out_stride + j, n, beta);
  }
}

}  // namespace

template <class T> ActivationBlock<T> activation_block(int act, int order, double beta) {
  const bool scaled = act == static_cast<int>(Act::softplus) && beta != 1.0;
  return Table<T>::get(scaled ? 7 : act, order);
}
template ActivationBlock<float> activation_block<float>(int, int, double);
template ActivationBlock<double> activation_block<double>(int, int, double);

void activation(const ActivationArgs<float>& a) { run(a); }
void activation(const ActivationArgs<double>& a) { run(a); }

}  // namespace gcfast::cpu
