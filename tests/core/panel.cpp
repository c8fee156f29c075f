// csrc/core/panel.h: a fake grid walks panels of every alignment, stride and shape; each operand lies in a heap
// block of exactly its size, so that a sanitizer sees an access beyond it, and a misaligned 16-byte one.
#include "../../csrc/core/panel.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "check.h"

using namespace gcfast;

namespace {

struct SquarePlus {
  double added;
  template <class T> GCFAST_HD T operator()(T v) const { return v * v + T(added); }
};
struct Identity {
  template <class T> GCFAST_HD T operator()(T v) const { return v; }
};

// `size` elements from `shift` past a 16-byte boundary on (operator new aligns to 16 here).
template <class T> struct Block {
  std::vector<T> store;
  T* data;
  Block(int64_t size, int shift) : store(shift + size), data(store.data() + shift) {
    for (int64_t i = 0; i < size; ++i) data[i] = T((i * 7919 + 13 * shift) % 1009) / T(64) - T(7);
  }
};

int64_t extent(int64_t rows, int64_t cols, int64_t stride) { return (rows - 1) * stride + cols; }

struct Case {
  int64_t rows, cols, x_gap, grad_gap, out_gap;
  int x_shift, bias_shift, grad_shift, out_shift;
  bool bias, grad;
  int in_place;  // 1: out is x, 2: out is grad
  uint32_t threads;
};

template <class T> void walk(const Case& c) {
  const int64_t xs = c.cols + c.x_gap, gs = c.cols + c.grad_gap;
  const int64_t os = c.in_place == 1 ? xs : c.in_place == 2 ? gs : c.cols + c.out_gap;
  Block<T> x(extent(c.rows, c.cols, xs), c.x_shift), bias(c.cols, c.bias_shift);
  Block<T> grad(extent(c.rows, c.cols, gs), c.grad_shift), fresh(extent(c.rows, c.cols, os), c.out_shift);
  Block<T>& target = c.in_place == 1 ? x : c.in_place == 2 ? grad : fresh;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  if (c.in_place == 0)
    for (T& v : fresh.store) v = nan;
  const SquarePlus f{1};

  std::vector<T> want = target.store;
  T* wanted = want.data() + (target.data - target.store.data());
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.cols; ++j) {
      const T v = f(x.data[i * xs + j] + (c.bias ? bias.data[j] : T(0)));
      wanted[i * os + j] = c.grad ? v * grad.data[i * gs + j] : v;
    }

  Panel<T> panel = panel_of<T>(x.data, c.bias ? bias.data : nullptr, c.grad ? grad.data : nullptr, target.data, c.rows,
                               c.cols, xs, gs, os);
  // Rows in whole units, none to spare; accesses of 16 bytes wherever every operand allows them.
  const int64_t W = kWidth<T>, spare = panel.line - panel.cols;
  CHECK(panel.joined ? spare == 0 : panel.line % W == 0 && spare >= 0 && spare < W, "%lld spare", (long long)spare);
  const auto whole = [&](const T* p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % W == 0;
  };
  const auto wide = [&](const T* p, int64_t stride) { return whole(p, panel.joined ? 0 : stride); };
  CHECK(panel.wide == (wide(x.data, xs) && (!c.grad || wide(grad.data, gs)) && wide(target.data, os)), "wide");
  CHECK(panel.wide_bias == (c.bias && whole(bias.data, panel.line)), "wide bias");
  spread_over(panel, c.threads);
  for (uint32_t thread = 0; thread < c.threads; ++thread) walk_panel(panel, thread, c.threads, f);

  int64_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i)
    if (!(want[i] == target.store[i]) && !(std::isnan(want[i]) && std::isnan(target.store[i]))) ++wrong;
  CHECK(wrong == 0,
        "%lld wrong: %lld x %lld, gaps %lld %lld %lld, shifts %d %d %d %d, bias %d, grad %d, in place %d, %u threads, "
        "%zu bytes",
        (long long)wrong, (long long)c.rows, (long long)c.cols, (long long)c.x_gap, (long long)c.grad_gap,
        (long long)c.out_gap, c.x_shift, c.bias_shift, c.grad_shift, c.out_shift, c.bias, c.grad, c.in_place, c.threads,
        sizeof(T));
}

template <class T> void all() {
  uint64_t state = 88172645463325252ull;
  const auto below = [&](uint64_t n) {  // xorshift
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<int64_t>((state >> 20) % n);
  };
  for (int64_t rows : {1, 2, 5, 33})
    for (int64_t cols : {1, 2, 3, 4, 5, 8, 31, 33, 64, 252, 507})
      for (int i = 0; i < 40; ++i) {
        Case c{};
        c.rows = rows, c.cols = cols, c.threads = static_cast<uint32_t>(1 + below(i % 2 ? 7 : 300));
        c.bias = below(2), c.grad = below(2), c.in_place = static_cast<int>(below(c.grad ? 3 : 2));
        if (i % 4) c.x_gap = below(6), c.grad_gap = below(6), c.out_gap = below(6);
        if (i % 3) {
          c.x_shift = static_cast<int>(below(4)), c.grad_shift = static_cast<int>(below(4));
          c.out_shift = static_cast<int>(below(4)), c.bias_shift = static_cast<int>(below(4));
        }
        walk<T>(c);
      }
  // Lines too long for 32 bits: nothing is read where the panel ends, whatever the thread.
  T one[1] = {T(3)}, out[1] = {T(0)};
  Panel<T> panel = panel_of<T>(one, nullptr, nullptr, out, 1, 1, 1, 0, 1);
  panel.cols = panel.line = int64_t(1) << 33;
  panel.total = panel.units = 1;
  spread_over(panel, 64);
  for (uint32_t thread = 0; thread < 64; ++thread) walk_panel(panel, thread, 64, Identity{});
  CHECK(out[0] == T(3), "%g", double(out[0]));
  // x + bias keeps the sign of zero where there is no bias.
  one[0] = -T(0);
  panel = panel_of<T>(one, nullptr, nullptr, out, 1, 1, 1, 0, 1);
  spread_over(panel, 1);
  walk_panel(panel, 0, 1, Identity{});
  CHECK(out[0] == 0 && std::signbit(out[0]), "%g", double(out[0]));
}

#if defined(__CUDACC__)
template <class T> __global__ void on_device(Panel<T> panel) {
  walk_panel(panel, threadIdx.x, blockDim.x, SquarePlus{1});
}
template __global__ void on_device<float>(Panel<float>);
template __global__ void on_device<double>(Panel<double>);
#endif

}  // namespace

int main() {
  all<float>();
  all<double>();
  return report();
}
