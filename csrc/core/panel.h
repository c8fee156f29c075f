// How threads walk an elementwise panel out[i, j] = grad[i, j] * f(x[i, j] + bias[j]) in units of 16 bytes.
//
// A unit is W consecutive elements at (row, j). Where rows follow one another without a gap a unit may cross the
// end of a row (only the bias notices), so any width is served by 16-byte accesses; otherwise a row ends in a
// partial unit. (row, j) advances by a fixed step that the host has divided: no division in the loop.
#pragma once
#include <cstdint>

#include "macros.h"

namespace gcfast {

constexpr int kUnits = 2;  // of 16 bytes that a thread has in flight

template <class T> constexpr int kWidth = 16 / sizeof(T);
template <class T> struct alignas(16) Unit { T v[kWidth<T>]; };

template <class T> struct Panel {
  const T *x, *bias, *grad;  // bias and grad may be null
  T* out;                    // may be x or grad
  int64_t cols, x_stride, grad_stride, out_stride;
  int64_t total;             // rows * cols
  int64_t line;              // where j wraps: cols if joined, else cols rounded up to whole units
  int64_t units;             // in all
  int64_t row_step, j_step;  // from a thread's unit to its next one; set by spread_over
  bool joined;               // rows follow one another without a gap, in every operand
  bool wide, wide_bias;      // 16-byte accesses are aligned
};

template <class T> inline bool unit_aligned(const T* p, int64_t stride, bool joined) {
  return p == nullptr || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && (joined || stride % kWidth<T> == 0));
}

// Strides in elements; rows, cols >= 1.
template <class T>
inline Panel<T> panel_of(const T* x, const T* bias, const T* grad, T* out, int64_t rows, int64_t cols, int64_t x_stride,
                         int64_t grad_stride, int64_t out_stride) {
  constexpr int64_t W = kWidth<T>;
  Panel<T> p{};
  p.x = x, p.bias = bias, p.grad = grad, p.out = out;
  p.cols = cols, p.x_stride = x_stride, p.grad_stride = grad_stride, p.out_stride = out_stride;
  p.total = rows * cols;
  p.joined = rows == 1 || (x_stride == cols && out_stride == cols && (!grad || grad_stride == cols));
  if (p.joined && !bias) p.cols = p.total;  // one long row
  p.line = p.joined ? p.cols : (cols + W - 1) / W * W;
  p.units = p.joined ? (p.total + W - 1) / W : rows * (p.line / W);
  p.wide = unit_aligned(x, x_stride, p.joined) && unit_aligned(grad, grad_stride, p.joined) &&
           unit_aligned<T>(out, out_stride, p.joined);
  p.wide_bias = bias && unit_aligned(bias, 0, true) && p.line % W == 0;
  return p;
}

template <class T> inline void spread_over(Panel<T>& p, int64_t threads) {
  p.row_step = threads * kWidth<T> / p.line;
  p.j_step = threads * kWidth<T> % p.line;
}

template <class T> GCFAST_HD Unit<T> filled(T value) {
  Unit<T> u;
  GCFAST_UNROLL
  for (int e = 0; e < kWidth<T>; ++e) u.v[e] = value;
  return u;
}

template <class T> GCFAST_HD Unit<T> load_unit(const T* p, int n, bool wide) {
  Unit<T> u = filled(T(0));
  if (wide && n == kWidth<T>) return *reinterpret_cast<const Unit<T>*>(p);
  GCFAST_UNROLL
  for (int e = 0; e < kWidth<T>; ++e)
    if (e < n) u.v[e] = p[e];
  return u;
}

template <class T> GCFAST_HD void store_unit(T* p, const Unit<T>& u, int n, bool wide) {
  if (wide && n == kWidth<T>) {
    *reinterpret_cast<Unit<T>*>(p) = u;
    return;
  }
  GCFAST_UNROLL
  for (int e = 0; e < kWidth<T>; ++e)
    if (e < n) p[e] = u.v[e];
}

template <class T> GCFAST_HD Unit<T> load_bias(const Panel<T>& a, int64_t j, int n) {
  Unit<T> u = filled(-T(0));  // x + -0 is x, also for x = -0
  if (!a.bias) return u;
  if (a.wide_bias) return load_unit(a.bias + j, n, true);
  GCFAST_UNROLL
  for (int e = 0; e < kWidth<T>; ++e) {
    if (e < n) u.v[e] = a.bias[j];
    if (++j == a.cols) j = 0;
  }
  return u;
}

// The share of thread `first` of `threads`, whose number was given to spread_over. threads * W < 2^32.
template <class T, class F> GCFAST_HD void walk_panel(const Panel<T>& a, uint32_t first, uint32_t threads, F f) {
  constexpr int W = kWidth<T>;
  int64_t row = a.line > UINT32_MAX ? 0 : first * W / static_cast<uint32_t>(a.line);
  int64_t j = first * W - row * a.line;
  for (int64_t unit = first; unit < a.units; unit += static_cast<int64_t>(kUnits) * threads) {
    Unit<T> x[kUnits], g[kUnits], b[kUnits];
    int64_t out[kUnits];
    int n[kUnits];
    GCFAST_UNROLL
    for (int k = 0; k < kUnits; ++k) {  // all loads before the first use
      const int64_t left = a.joined ? a.total - (row * a.cols + j) : a.cols - j;
      n[k] = unit + static_cast<int64_t>(k) * threads < a.units ? static_cast<int>(left < W ? left : W) : 0;
      x[k] = load_unit(a.x + (row * a.x_stride + j), n[k], a.wide);
      g[k] = a.grad ? load_unit(a.grad + (row * a.grad_stride + j), n[k], a.wide) : filled(T(1));
      b[k] = load_bias(a, j, n[k]);
      out[k] = row * a.out_stride + j;
      row += a.row_step;
      j += a.j_step;
      if (j >= a.line) {
        j -= a.line;
        ++row;
      }
    }
    GCFAST_UNROLL
    for (int k = 0; k < kUnits; ++k) {
      GCFAST_UNROLL
      for (int e = 0; e < W; ++e) x[k].v[e] = f(x[k].v[e] + b[k].v[e]) * g[k].v[e];
      store_unit(a.out + out[k], x[k], n[k], a.wide);
    }
  }
}

}  // namespace gcfast
