// The activation panel. Bytes bound it (8 or 16 an element in float32, 16 or 24 in float64), so the work is cut
// into units of 16 bytes, a thread has kUnits of them in flight, and the grid is one wave that walks the panel.
//
// A unit is W consecutive elements at (row, j). Where rows follow one another without a gap a unit may cross the
// end of a row (only the bias notices), so any width is served by 16-byte accesses; otherwise a row ends in a
// partial unit. (row, j) advances by a fixed step that the host has divided: no division in the loop.
#include "activation.h"

#include <algorithm>
#include <atomic>

#include "../core/activations.h"
#include "check.h"

namespace gcfast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kUnits = 2;
constexpr int kDevices = 64;  // whose occupancy is remembered

template <class T> constexpr int kWidth = 16 / sizeof(T);
template <class T> constexpr int kResident = sizeof(T) == 4 ? 8 : 4;  // blocks a multiprocessor: at most 64 or 128 registers
template <class T> struct alignas(16) Unit { T v[kWidth<T>]; };

template <class T> struct Panel {
  const T *x, *bias, *grad;
  T* out;
  int64_t cols, x_stride, grad_stride, out_stride;
  int64_t units;      // in all
  int64_t line;       // where j wraps: cols if joined, else cols rounded up to whole units
  int64_t total;      // rows * cols
  int64_t row_step, j_step;  // from a thread's unit to its next one
  bool joined;               // rows follow one another without a gap, in every operand
  bool wide, wide_bias;      // 16-byte accesses are aligned
};

template <class T> __device__ __forceinline__ Unit<T> filled(T value) {
  Unit<T> u;
#pragma unroll
  for (int e = 0; e < kWidth<T>; ++e) u.v[e] = value;
  return u;
}

template <class T> __device__ __forceinline__ Unit<T> load(const T* p, int n, bool wide) {
  Unit<T> u = filled(T(0));
  if (wide && n == kWidth<T>) return *reinterpret_cast<const Unit<T>*>(p);
#pragma unroll
  for (int e = 0; e < kWidth<T>; ++e)
    if (e < n) u.v[e] = p[e];
  return u;
}

template <class T> __device__ __forceinline__ void store(T* p, const Unit<T>& u, int n, bool wide) {
  if (wide && n == kWidth<T>) {
    *reinterpret_cast<Unit<T>*>(p) = u;
    return;
  }
#pragma unroll
  for (int e = 0; e < kWidth<T>; ++e)
    if (e < n) p[e] = u.v[e];
}

template <class T> __device__ __forceinline__ Unit<T> load_bias(const Panel<T>& a, int64_t j, int n) {
  Unit<T> u = filled(-T(0));  // x + -0 is x, also for x = -0
  if (!a.bias) return u;
  if (a.wide_bias) return load(a.bias + j, n, true);
#pragma unroll
  for (int e = 0; e < kWidth<T>; ++e) {
    if (e < n) u.v[e] = a.bias[j];
    if (++j == a.cols) j = 0;
  }
  return u;
}

template <class T, Act A, int K, bool Scaled>
__global__ void __launch_bounds__(kThreads, kResident<T>) activation_kernel(const Panel<T> a, const Scale<T> beta) {
  constexpr int W = kWidth<T>;
  const uint32_t threads = gridDim.x * kThreads, first = blockIdx.x * kThreads + threadIdx.x;
  // One wave of threads is far below 2^32 elements, so this division needs no 64 bits.
  int64_t row = a.line > UINT32_MAX ? 0 : first * W / static_cast<uint32_t>(a.line);
  int64_t j = first * W - row * a.line;

  for (int64_t unit = first; unit < a.units; unit += static_cast<int64_t>(kUnits) * threads) {
    Unit<T> x[kUnits], g[kUnits], b[kUnits];
    int64_t out[kUnits];
    int n[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {  // all loads before the first use
      const int64_t left = a.joined ? a.total - (row * a.cols + j) : a.cols - j;
      n[k] = unit + static_cast<int64_t>(k) * threads < a.units ? static_cast<int>(left < W ? left : W) : 0;
      x[k] = load(a.x + (row * a.x_stride + j), n[k], a.wide);
      g[k] = a.grad ? load(a.grad + (row * a.grad_stride + j), n[k], a.wide) : filled(T(1));
      b[k] = load_bias(a, j, n[k]);
      out[k] = row * a.out_stride + j;
      row += a.row_step;
      j += a.j_step;
      if (j >= a.line) {
        j -= a.line;
        ++row;
      }
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
#pragma unroll
      for (int e = 0; e < W; ++e)
        x[k].v[e] = activate<A, K, Scaled>(x[k].v[e] + b[k].v[e], beta) * g[k].v[e];
      store(a.out + out[k], x[k], n[k], a.wide);
    }
  }
}

template <class T, Act A, bool Scaled> const void* kernel_of(int order) {
  const void* orders[] = {reinterpret_cast<const void*>(&activation_kernel<T, A, 0, Scaled>),
                          reinterpret_cast<const void*>(&activation_kernel<T, A, 1, Scaled>),
                          reinterpret_cast<const void*>(&activation_kernel<T, A, 2, Scaled>)};
  return orders[order];
}

template <class T> const void* kernel_for(int act, int order, bool scaled) {
  switch (static_cast<Act>(act)) {
    case Act::softplus:
      return scaled ? kernel_of<T, Act::softplus, true>(order) : kernel_of<T, Act::softplus, false>(order);
    case Act::sigmoid: return kernel_of<T, Act::sigmoid, false>(order);
    case Act::tanh: return kernel_of<T, Act::tanh, false>(order);
    case Act::gelu: return kernel_of<T, Act::gelu, false>(order);
    case Act::gelu_tanh: return kernel_of<T, Act::gelu_tanh, false>(order);
    case Act::silu: return kernel_of<T, Act::silu, false>(order);
    case Act::relu: return kernel_of<T, Act::relu, false>(order);
  }
  throw std::runtime_error("no activation with number " + std::to_string(act));
}

// Blocks of a kernel that the device holds at once: a grid of that size is one full wave.
int full_grid(const void* kernel, int device, std::atomic<int>* remembered) {
  if (device < kDevices && remembered[device] > 0) return remembered[device];
  int processors = 0, resident = 0;
  GCFAST_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  GCFAST_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
  const int blocks = processors * std::max(resident, 1);
  if (device < kDevices) remembered[device] = blocks;
  return blocks;
}

template <class T> bool aligned(const T* p, int64_t stride, bool joined) {
  return p == nullptr || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && (joined || stride % kWidth<T> == 0));
}

template <class T> void run(const ActivationArgs<T>& a) {
  if (a.rows <= 0 || a.cols <= 0) return;
  constexpr int64_t W = kWidth<T>;
  const bool scaled = a.act == static_cast<int>(Act::softplus) && a.beta != 1.0;
  const T hi = static_cast<T>(a.beta);
  Scale<T> beta{hi, static_cast<T>(a.beta - static_cast<double>(hi)), static_cast<T>(1.0 / a.beta)};

  Panel<T> p{a.x, a.bias, a.grad, a.out, a.cols, a.x_stride, a.grad_stride, a.out_stride};
  p.total = a.rows * a.cols;
  p.joined = a.rows == 1 || (a.x_stride == a.cols && a.out_stride == a.cols && (!a.grad || a.grad_stride == a.cols));
  if (p.joined && !a.bias) p.cols = p.total;  // one long row
  p.line = p.joined ? p.cols : (a.cols + W - 1) / W * W;
  p.units = p.joined ? (p.total + W - 1) / W : a.rows * (p.line / W);
  p.wide = aligned<T>(a.x, a.x_stride, p.joined) && aligned<T>(a.grad, a.grad_stride, p.joined) &&
           aligned<T>(a.out, a.out_stride, p.joined);
  p.wide_bias = a.bias && aligned<T>(a.bias, 0, true) && p.line % W == 0;

  const DeviceGuard guard(a.device);
  const void* kernel = kernel_for<T>(a.act, a.order, scaled);
  static std::atomic<int> remembered[8][3][kDevices];
  const int full = full_grid(kernel, a.device, remembered[scaled ? 7 : a.act][a.order]);
  const int64_t blocks = std::min<int64_t>(full, (p.units + kThreads - 1) / kThreads);
  p.row_step = blocks * kThreads * W / p.line;
  p.j_step = blocks * kThreads * W % p.line;
  void* arguments[] = {&p, &beta};
  GCFAST_CUDA_CHECK(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0,
                                     static_cast<cudaStream_t>(a.stream)));
}

}  // namespace

void activation(const ActivationArgs<float>& a) { run(a); }
void activation(const ActivationArgs<double>& a) { run(a); }

}  // namespace gcfast::cuda
