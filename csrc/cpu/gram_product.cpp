// Symmetric times skinny. A library's product reads all of K and fills few of its lanes when c is small; here every
// element of the lower triangle is read once and used twice, K_ij x_j for row i and K_ij x_i for row j. The lanes run
// along j, so that c may be anything. Floor: n^2/2 elements at copy bandwidth, or 2 c FMA lanes an element.
#include "gram_product.h"

#include <algorithm>
#include <vector>

#include "clones.h"

namespace gcfast::cpu {
namespace {

constexpr int64_t kRows = 32;     // a block row: a task, and the squares on the diagonal
constexpr int64_t kColumns = 256; // a tile of K is 32 KB (float), its x and out 5 KB each for five sides
constexpr int kSides = 20;        // right-hand sides that one reading of a tile serves
constexpr int kAtOnce = 5;        // of them in registers: 4 rows x 5 sides are 20 of 32

template <class T> struct Lanes {
  typedef T Vec __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  static constexpr int64_t width = 64 / sizeof(T);
};

template <class T> __attribute__((always_inline)) inline T dot(const T* a, const T* b, int64_t n) {
  T s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t j = 0; j < n; ++j) s += a[j] * b[j];
  return s;
}

// R rows of K at k (stride ld), columns [0, columns), C sides at x and out (stride n), xi = x at these rows:
// sums[r][c] += K[r, j] x[c, j] in lanes, out[c, j] += K[r, j] xi[c, r]. `columns` is a whole number of lanes, as
// block rows and tiles begin at multiples of kRows.
template <class T, int R, int C>
__attribute__((always_inline)) inline void micro(const T* k, int64_t ld, const T* x, T* out, int64_t n, int64_t columns,
                                                 const T* xi, typename Lanes<T>::Vec* sums, int stride, const T* next) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t W = Lanes<T>::width;
  static_assert(kRows % W == 0 && kColumns % W == 0, "a lane would reach beyond a tile");
  Vec sum[R][C];
  T side[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = sums[r * stride + c], side[r][c] = xi[c * n + r];
  for (int64_t j = 0; j < columns; j += W) {
    Vec row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      row[r] = *reinterpret_cast<const Vec*>(k + r * ld + j);
      if (next) __builtin_prefetch(next + r * ld + j);  // a tile's rows are too short for the hardware to foresee
    }
#pragma GCC unroll 5
    for (int c = 0; c < C; ++c) {
      const Vec v = *reinterpret_cast<const Vec*>(x + c * n + j);
      Vec* target = reinterpret_cast<Vec*>(out + c * n + j);
      Vec o = *target;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sum[r][c] += row[r] * v;
        o += row[r] * side[r][c];
      }
      *target = o;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r * stride + c] = sum[r][c];
}

template <class T, int C>
__attribute__((always_inline)) inline void tile(const GramProductArgs<T>& a, const T* x, T* out, int64_t i0, int64_t i1,
                                                int64_t j0, int64_t columns, typename Lanes<T>::Vec* sums, int stride,
                                                bool first) {
  int64_t i = i0;
  for (; i + 4 <= i1; i += 4) {
    const T* k = a.gram + i * a.ld + j0;
    // the next four rows, or the first four of the next tile
    const T* next = !first ? nullptr : i + 8 <= i1 ? k + 4 * a.ld : a.gram + i0 * a.ld + j0 + columns;
    micro<T, 4, C>(k, a.ld, x + j0, out + j0, a.n, columns, x + i, sums + (i - i0) * stride, stride, next);
  }
  for (; i < i1; ++i)
    micro<T, 1, C>(a.gram + i * a.ld + j0, a.ld, x + j0, out + j0, a.n, columns, x + i, sums + (i - i0) * stride, stride,
                   nullptr);
}

// Rows [i0, i0 + kRows) of K for `sides` <= kSides right-hand sides.
template <class T>
__attribute__((always_inline)) inline void block_row(const GramProductArgs<T>& a, const T* x, T* out, int64_t i0, int sides) {
  using Vec = typename Lanes<T>::Vec;
  const int64_t n = a.n, i1 = std::min(n, i0 + kRows);
  alignas(64) Vec sums[kRows * kSides];
  for (int64_t s = 0; s < kRows * sides; ++s) sums[s] = Vec{};
  for (int64_t j0 = 0; j0 < i0; j0 += kColumns) {
    const int64_t columns = std::min(i0 - j0, kColumns);
    for (int c = 0; c < sides; c += kAtOnce) {
      const T* xc = x + c * n;
      T* oc = out + c * n;
      switch (std::min(kAtOnce, sides - c)) {
        case 5: tile<T, 5>(a, xc, oc, i0, i1, j0, columns, sums + c, sides, c == 0); break;
        case 4: tile<T, 4>(a, xc, oc, i0, i1, j0, columns, sums + c, sides, c == 0); break;
        case 3: tile<T, 3>(a, xc, oc, i0, i1, j0, columns, sums + c, sides, c == 0); break;
        case 2: tile<T, 2>(a, xc, oc, i0, i1, j0, columns, sums + c, sides, c == 0); break;
        default: tile<T, 1>(a, xc, oc, i0, i1, j0, columns, sums + c, sides, c == 0);
      }
    }
  }
  for (int64_t i = i0; i < i1; ++i)
    for (int c = 0; c < sides; ++c) {
      T s = dot(a.gram + i * a.ld + i0, x + c * n + i0, i1 - i0);  // the square on the diagonal
      for (int64_t w = 0; w < Lanes<T>::width; ++w) s += sums[(i - i0) * sides + c][w];
      out[c * n + i] += s;
    }
}

template <class T>
__attribute__((always_inline)) inline void all_sides(const GramProductArgs<T>& a, T* out, int64_t i0) {
  for (int64_t c = 0; c < a.c; c += kSides)
    block_row<T>(a, a.x + c * a.n, out + c * a.n, i0, static_cast<int>(std::min<int64_t>(kSides, a.c - c)));
}

GCFAST_CLONES void rows_f32(const GramProductArgs<float>& a, float* out, int64_t i0) { all_sides(a, out, i0); }
GCFAST_CLONES void rows_f64(const GramProductArgs<double>& a, double* out, int64_t i0) { all_sides(a, out, i0); }

template <class T, class F> void run(const GramProductArgs<T>& a, F rows) {
  const int64_t size = a.n * a.c, blocks = (a.n + kRows - 1) / kRows;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(a.threads, blocks / 2)));
  std::vector<T> sums(static_cast<size_t>(size) * threads, T(0));
  // Block row b costs b + 1: thread t takes b = t and its mirror image, in turns. A static choice, so that the order
  // of the sums, and with it the result, depends on the number of threads only.
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; ++t)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t turn = b / threads, place = b % threads;
      if ((turn % 2 ? threads - 1 - place : place) == t) rows(a, sums.data() + size * t, b * kRows);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < size; ++i) {
    T s = 0;
    for (int t = 0; t < threads; ++t) s += sums[static_cast<size_t>(size) * t + i];
    a.out[i] = s;
  }
}

}  // namespace

void gram_product(const GramProductArgs<float>& a) { run(a, rows_f32); }
void gram_product(const GramProductArgs<double>& a) { run(a, rows_f64); }

}  // namespace gcfast::cpu
