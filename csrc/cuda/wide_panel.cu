// The float64 column panel out = act(z weight^T + bias), the activation in the epilogue of the product.
//
// Counted for 50,000 x 1,024 at d = 512 on an H100 (60 TFLOP/s of DMMA, 3.0 TB/s, 5.5 TB/s from L2), NOT measured:
//   product                52.4 GFLOP                                    0.87 ms
//   L2 to shared memory    3,128 tiles x 1.05 MB = 3.3 GB                0.60 ms, behind the product
//   device memory          205 MB of z, 410 MB of panel                  0.20 ms, behind the product
//   softplus               about 60 FP64 operations an element, 3.1e9    0.21 ms
// One block a multiprocessor, so softplus is not hidden: 0.87 + 0.21 = 1.08 ms, and the last wave 1 %. A library's
// product at that rate, then the activation in place (820 MB, 0.27 ms): 1.14 ms. So 1.05 times as fast is expected
// where the product runs at the ceiling, and a loss where it runs 5 % below the library's. In wide_gram at n = 50,000
// the panel's product is 2 % of all the work (2 nwd against n^2 w). What it does give is an order of summation that
// is known: see core/wide_panel.h. It rests on the matrix instruction treating its rows and columns alike, which the
// GPU's test checks by bits.
#include "wide_panel.h"

#include <limits>

#include "../core/activations.h"
#include "../core/wide_panel.h"
#include "check.h"

namespace gcfast::cuda {
namespace {

using namespace wide_panel;

constexpr int kStages = 4;
constexpr int kStage = (kRows + kCols) * kDepth;  // doubles of both operands
constexpr int kShared = kStages * kStage * static_cast<int>(sizeof(double));
static_assert(kStages * kStage >= kRows * kCols, "the tile of results takes the operands' place");
constexpr int kDown = kWarpRows / 16, kAcross = kWarpCols / 8;  // matrix instructions of a warp

struct Problem {
  const double *z, *weight, *bias;
  double* out;
  int64_t n, w, d, z_stride, weight_stride, out_stride;
  int64_t down, across;  // tiles
  bool wide_z, wide_weight, wide_out;  // 16-byte accesses are aligned
};

// Two doubles to shared memory, of which `valid` are there and the rest is 0.
__device__ __forceinline__ void copy_pair(double* to, const double* from, int valid, bool wide) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if (wide) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(8 * valid) : "memory");
    return;
  }
  const int first = valid > 0 ? 8 : 0, second = valid > 1 ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(from), "r"(first) : "memory");
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address + 8), "l"(valid > 1 ? from + 1 : from),
               "r"(second)
               : "memory");
}

// Rows [row, row + kRows) and columns [k, k + kDepth) of an operand.
__device__ __forceinline__ void copy_operand(double* to, const double* from, int64_t stride, int64_t row, int64_t rows,
                                             int64_t k, int64_t d, bool wide) {
  static_assert(kRows == kCols, "one copy for both operands");
  constexpr int units = kDepth / 2, at_once = kThreads / units;
  const int col = threadIdx.x % units * 2;
  const int left = inside(k + col, d, 2);
#pragma unroll
  for (int i = 0; i < kRows; i += at_once) {
    const int r = i + threadIdx.x / units;
    const int valid = row + r < rows ? left : 0;
    copy_pair(to + slot<kDepth>(r, col), valid > 0 ? from + (row + r) * stride + (k + col) : from, valid, wide);
  }
}

// c += a b^T for 16 x 8 x kStep. a: rows lane / 4 and lane / 4 + 8; b: row lane / 4; x and y are the two k.
__device__ __forceinline__ void multiply(double (&c)[4], const double2& a0, const double2& a1, const double2& b) {
#if __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a0.x), "d"(a1.x), "d"(a0.y), "d"(a1.y), "d"(b.x), "d"(b.y));
#else
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1]) : "d"(a0.x), "d"(b.x));
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[2]), "+d"(c[3]) : "d"(a1.x), "d"(b.x));
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1]) : "d"(a0.y), "d"(b.y));
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[2]), "+d"(c[3]) : "d"(a1.y), "d"(b.y));
#endif
}

__device__ __forceinline__ double2 pair(const double* p) { return *reinterpret_cast<const double2*>(p); }

template <Act A, bool Scaled>
__global__ void __launch_bounds__(kThreads, 1) wide_panel_kernel(const Problem p, const Scale<double> beta) {
  extern __shared__ __align__(128) double shared[];
  const Tile tile = tile_at(blockIdx.x, p.down, p.across);
  const int64_t row0 = tile.row * kRows, col0 = tile.col * kCols;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t depths = (p.d + kDepth - 1) / kDepth;

  const auto fetch = [&](int64_t t) {  // beyond the last depth an empty group, so that the groups' count holds
    if (t < depths) {
      double* to = shared + t % kStages * kStage;
      copy_operand(to, p.z, p.z_stride, row0, p.n, t * kDepth, p.d, p.wide_z);
      copy_operand(to + kRows * kDepth, p.weight, p.weight_stride, col0, p.w, t * kDepth, p.d, p.wide_weight);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  double c[kDown][kAcross][4] = {};
#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) fetch(t);
#pragma unroll 1
  for (int64_t t = 0; t < depths; ++t) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // depth t is there for all, and depth t - 1 has been read by all
    fetch(t + kStages - 1);
    const double* a = shared + t % kStages * kStage;
    const double* b = a + kRows * kDepth;
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      const int col = k + lane_pair(lane);
      double2 right[kAcross];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) right[j] = pair(b + slot<kDepth>(warp_col(warp) + 8 * j + lane_row(lane), col));
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int row = warp_row(warp) + 16 * i + lane_row(lane);
        const double2 upper = pair(a + slot<kDepth>(row, col)), lower = pair(a + slot<kDepth>(row + 8, col));
#pragma unroll
        for (int j = 0; j < kAcross; ++j) multiply(c[i][j], upper, lower, right[j]);
      }
    }
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();

  // By way of shared memory: the activation is then one loop with few registers, and stores are whole lines.
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row(warp) + 16 * i + 8 * half + lane_row(lane);
        const int col = warp_col(warp) + 8 * j + lane_pair(lane);
        *reinterpret_cast<double2*>(shared + slot<kCols>(row, col)) =
            make_double2(c[i][j][2 * half], c[i][j][2 * half + 1]);
      }
  __syncthreads();

  const int col = threadIdx.x % (kCols / 2) * 2;
  const int valid = inside(col0 + col, p.w, 2);
  if (valid == 0) return;
  // x + -0 is x
  const double bias0 = p.bias ? p.bias[col0 + col] : -0.0;
  const double bias1 = p.bias && valid == 2 ? p.bias[col0 + col + 1] : -0.0;
  const int rows = inside(row0, p.n, kRows);
#pragma unroll 1
  for (int row = threadIdx.x / (kCols / 2); row < rows; row += kThreads / (kCols / 2)) {
    const double2 x = pair(shared + slot<kCols>(row, col));
    const double2 y = make_double2(activate<A, 0, Scaled>(x.x + bias0, beta),
                                   activate<A, 0, Scaled>(x.y + bias1, beta));
    double* out = p.out + (row0 + row) * p.out_stride + (col0 + col);
    if (p.wide_out && valid == 2) {
      *reinterpret_cast<double2*>(out) = y;
    } else {
      out[0] = y.x;
      if (valid == 2) out[1] = y.y;
    }
  }
}

template <Act A, bool Scaled = false> const void* kernel_of() {
  return reinterpret_cast<const void*>(&wide_panel_kernel<A, Scaled>);
}

const void* kernel_for(int act, bool scaled) {
  switch (static_cast<Act>(act)) {
    case Act::softplus: return scaled ? kernel_of<Act::softplus, true>() : kernel_of<Act::softplus>();
    case Act::sigmoid: return kernel_of<Act::sigmoid>();
    case Act::tanh: return kernel_of<Act::tanh>();
    case Act::gelu: return kernel_of<Act::gelu>();
    case Act::gelu_tanh: return kernel_of<Act::gelu_tanh>();
    case Act::silu: return kernel_of<Act::silu>();
    case Act::relu: return kernel_of<Act::relu>();
  }
  throw std::runtime_error("no activation has number " + std::to_string(act));
}

bool aligned(const double* p, int64_t stride) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 2 == 0; }

}  // namespace

void wide_panel(const WidePanelArgs& a) {
  if (a.n <= 0 || a.w <= 0) return;
  const bool scaled = a.act == static_cast<int>(Act::softplus) && a.beta != 1.0;
  Scale<double> beta{a.beta, 0.0, 1.0 / a.beta};
  Problem p{a.z, a.weight, a.bias, a.out, a.n, a.w, a.d, a.z_stride, a.weight_stride, a.out_stride,
            (a.n + kRows - 1) / kRows, (a.w + kCols - 1) / kCols,
            aligned(a.z, a.z_stride), aligned(a.weight, a.weight_stride), aligned(a.out, a.out_stride)};
  if (p.down > std::numeric_limits<int>::max() / p.across) throw std::runtime_error("the panel has too many tiles");

  const DeviceGuard guard(a.device);
  const void* kernel = kernel_for(a.act, scaled);
  GCFAST_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  void* arguments[] = {&p, &beta};
  GCFAST_CUDA_CHECK(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(p.down * p.across)), dim3(kThreads), arguments,
                                     kShared, static_cast<cudaStream_t>(a.stream)));
}

}  // namespace gcfast::cuda
