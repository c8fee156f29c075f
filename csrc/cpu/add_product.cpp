// A product that is added up in slices, as the proofs of rank want it. A library rounds in an order of its own, and
// takes a call, a scratch and another pass over out for every slice; here a slice is what is packed at a time anyhow
// (Goto, van de Geijn, Anatomy of high-performance matrix multiplication, 2008): columns of b in the third-level cache
// and, N at a time, in the first, rows of a in the second. A task is a block of out, with all slices.
#include "add_product.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "clones.h"

#ifndef GCFAST_LEVEL
#define GCFAST_LEVEL instruction_level()  // a test runs all of them on one processor
#endif

namespace gcfast::cpu {
namespace {

constexpr int64_t kRowBytes = int64_t{1} << 19;         // packed, of a: half of a second-level cache
constexpr int64_t kColumnBytes = 3 * (int64_t{1} << 19);  // and of b
constexpr int64_t kTasks = 2;                             // a thread, at least

// Packed rows and columns, and where the product of the slice is added.
template <class T> struct Block {
  const T* a;
  const T* b;
  T* out;
  int64_t rows, columns, k, out_rows, out_columns;
  T alpha;
  int side;       // 1: what is on and below the diagonal counts, -1: on and above, 0: all
  int64_t above;  // the first row less the first column
};

// What an instruction set provides.
template <class T> struct Slice {
  void (*pack_rows)(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, T* out);
  void (*pack_columns)(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, T* out);
  void (*multiply)(const Block<T>&);
  int64_t rows, columns;  // of which packed rows and columns are multiples
};

namespace baseline {
#define GCFAST_VECTOR 16
#define GCFAST_ROWS 4
#define GCFAST_VECTORS 3
#include "add_product_tiles.h"
#undef GCFAST_VECTOR
#undef GCFAST_ROWS
#undef GCFAST_VECTORS
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GCFAST_NO_CLONES)
#define GCFAST_X86 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define GCFAST_VECTOR 32
#define GCFAST_ROWS 4
#define GCFAST_VECTORS 3
#include "add_product_tiles.h"
#undef GCFAST_VECTOR
#undef GCFAST_ROWS
#undef GCFAST_VECTORS
}  // namespace v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#define GCFAST_VECTOR 64
#define GCFAST_ROWS 8
#define GCFAST_VECTORS 3
#include "add_product_tiles.h"
#undef GCFAST_VECTOR
#undef GCFAST_ROWS
#undef GCFAST_VECTORS
}  // namespace v4
#pragma GCC pop_options
#endif

template <class T> const Slice<T>& slice() {
#if defined(GCFAST_X86)
  const int level = GCFAST_LEVEL;
  if (level == 4) return *v4::slice<T>();
  if (level == 3) return *v3::slice<T>();
#endif
  return *baseline::slice<T>();
}

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }
int64_t padded(int64_t size, int64_t step) { return blocks(size, step) * step; }

// How out is cut into tasks: blocks of rows x columns, as even as the steps allow.
struct Cut {
  int64_t rows, columns, row_blocks, column_blocks;
  template <class T> Cut(const AddProductArgs<T>& p, const Slice<T>& s, int64_t inner, int64_t tasks) {
    const auto pieces = [&](int64_t size, int64_t step, int64_t bytes) {
      return blocks(size, std::max(step, bytes / (inner * static_cast<int64_t>(sizeof(T))) / step * step));
    };
    int64_t i = pieces(p.r, s.rows, kRowBytes), j = pieces(p.c, s.columns, kColumnBytes);
    for (;;) {
      rows = padded(blocks(p.r, i), s.rows), columns = padded(blocks(p.c, j), s.columns);
      row_blocks = blocks(p.r, rows), column_blocks = blocks(p.c, columns);
      // Packing costs 1 / rows + 1 / columns of the products: the longer side is cut, as long as that is little.
      const bool down = rows > 8 * s.rows, across = columns > 4 * s.columns;
      if (row_blocks * column_blocks >= tasks || !(down || across)) return;
      ++(down && (rows > columns || !across) ? i : j);
    }
  }
};

template <class T> void run(AddProductArgs<T> p) {
  if (p.r == 0 || p.c == 0 || p.k == 0) return;
  int side = p.lower ? 1 : 0;
  if (p.out_columns != 1 && p.out_rows == 1) {  // out^T += alpha b^T a^T
    std::swap(p.a, p.b), std::swap(p.r, p.c), std::swap(p.out_rows, p.out_columns);
    std::swap(p.a_rows, p.b_columns), std::swap(p.a_columns, p.b_rows);
    side = -side;
  }
  const Slice<T>& s = slice<T>();
  const int64_t inner = std::min(p.inner, p.k);
  // A team costs as much as some hundred thousand products.
  const double products = static_cast<double>(p.r) * static_cast<double>(p.c) * static_cast<double>(p.k);
  const int team = static_cast<int>(std::max(1.0, std::min<double>(p.threads, products / (1 << 19))));
  const Cut cut(p, s, inner, team == 1 ? 1 : team * kTasks * (side == 0 ? 1 : 2));
  const int64_t tasks = cut.row_blocks * cut.column_blocks;
  const int threads = static_cast<int>(std::min<int64_t>(team, tasks));
  const int64_t packed = padded((cut.rows + cut.columns) * inner, 64 / sizeof(T));
  struct Free { void operator()(T* x) const { std::free(x); } };
  const std::unique_ptr<T, Free> scratch(
      static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(packed * threads) * sizeof(T))));
  if (!scratch) throw std::bad_alloc();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    int64_t i0 = task / cut.column_blocks * cut.rows, j0 = task % cut.column_blocks * cut.columns;
    int64_t i1 = std::min(p.r, i0 + cut.rows), j1 = std::min(p.c, j0 + cut.columns);
    if (side > 0) i0 = std::max(i0, j0), j1 = std::min(j1, i1);
    if (side < 0) j0 = std::max(i0, j0), i1 = std::min(i1, j1);
    if (i0 >= i1 || j0 >= j1) continue;
    T* a = scratch.get() + packed * omp_get_thread_num();
    T* b = a + cut.rows * inner;
    for (int64_t k0 = 0; k0 < p.k; k0 += inner) {
      const int64_t k = std::min(inner, p.k - k0);
      s.pack_columns(p.b + j0 * p.b_columns + k0 * p.b_rows, j1 - j0, p.b_columns, p.b_rows, k, b);
      s.pack_rows(p.a + i0 * p.a_rows + k0 * p.a_columns, i1 - i0, p.a_rows, p.a_columns, k, a);
      s.multiply(Block<T>{a, b, p.out + i0 * p.out_rows + j0 * p.out_columns, i1 - i0, j1 - j0, k, p.out_rows,
                          p.out_columns, p.alpha, side, i0 - j0});
    }
  }
}

}  // namespace

void add_product(const AddProductArgs<float>& a) { run(a); }
void add_product(const AddProductArgs<double>& a) { run(a); }

}  // namespace gcfast::cpu
