// The activation panel. Bytes bound it (8 or 12 an element in float32, 16 or 24 in float64): two 16-byte units in
// flight a thread (core/panel.h), and a grid of one wave that walks the panel.
#include "activation.h"

#include <algorithm>
#include <atomic>

#include "../core/activations.h"
#include "../core/panel.h"
#include "check.h"

namespace gcfast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kDevices = 64;  // whose occupancy is remembered
// Blocks a multiprocessor, so at most 64 or 128 registers: nothing spills. On sm_100, where the compiler keeps the
// coefficients of softplus in double in registers, it takes 168.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T> constexpr int kResident = sizeof(T) == 4 ? 8 : 3;
#else
template <class T> constexpr int kResident = sizeof(T) == 4 ? 8 : 4;
#endif

template <class T, Act A, int K, bool Scaled>
__global__ void __launch_bounds__(kThreads, kResident<T>) activation_kernel(const Panel<T> panel, const Scale<T> beta) {
  walk_panel(panel, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads,
             [&](T x) { return activate<A, K, Scaled>(x, beta); });
}

template <class T, Act A, bool Scaled = false> const void* kernel_of(int order) {
  const void* orders[] = {reinterpret_cast<const void*>(&activation_kernel<T, A, 0, Scaled>),
                          reinterpret_cast<const void*>(&activation_kernel<T, A, 1, Scaled>),
                          reinterpret_cast<const void*>(&activation_kernel<T, A, 2, Scaled>)};
  return orders[order];
}

template <class T> const void* kernel_for(int act, int order, bool scaled) {
  switch (static_cast<Act>(act)) {
    case Act::softplus: return scaled ? kernel_of<T, Act::softplus, true>(order) : kernel_of<T, Act::softplus>(order);
    case Act::sigmoid: return kernel_of<T, Act::sigmoid>(order);
    case Act::tanh: return kernel_of<T, Act::tanh>(order);
    case Act::gelu: return kernel_of<T, Act::gelu>(order);
    case Act::gelu_tanh: return kernel_of<T, Act::gelu_tanh>(order);
    case Act::silu: return kernel_of<T, Act::silu>(order);
    case Act::relu: return kernel_of<T, Act::relu>(order);
  }
  throw std::runtime_error("no activation has number " + std::to_string(act));
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

template <class T> void run(const ActivationArgs<T>& a) {
  if (a.rows <= 0 || a.cols <= 0) return;
  const bool scaled = a.act == static_cast<int>(Act::softplus) && a.beta != 1.0;
  const T hi = static_cast<T>(a.beta);
  Scale<T> beta{hi, static_cast<T>(a.beta - static_cast<double>(hi)), static_cast<T>(1.0 / a.beta)};
  Panel<T> panel = panel_of(a.x, a.bias, a.grad, a.out, a.rows, a.cols, a.x_stride, a.grad_stride, a.out_stride);

  const DeviceGuard guard(a.device);
  const void* kernel = kernel_for<T>(a.act, a.order, scaled);
  static std::atomic<int> remembered[8][3][kDevices];
  const int full = full_grid(kernel, a.device, remembered[scaled ? 7 : a.act][a.order]);
  const int64_t blocks = std::min<int64_t>(full, (panel.units + kThreads - 1) / kThreads);
  spread_over(panel, blocks * kThreads);
  void* arguments[] = {&panel, &beta};
  GCFAST_CUDA_CHECK(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0,
                                     static_cast<cudaStream_t>(a.stream)));
}

}  // namespace

void activation(const ActivationArgs<float>& a) { run(a); }
void activation(const ActivationArgs<double>& a) { run(a); }

}  // namespace gcfast::cuda
