// A product that is added up in slices, as the proofs of rank want it. A library rounds in an order of its own, and
// takes a call, a scratch and another pass over out for every slice; here a slice is what is packed at a time anyhow
// (Goto, van de Geijn, Anatomy of high-performance matrix multiplication, 2008): columns of b in the third-level cache
// and, N at a time, in the first, rows of a in the second. A task is a block of out, with all slices.
#include "add_product.h"

#include <omp.h>

#include <algorithm>

#include "../core/arithmetic.h"
#include "clones.h"
#include "cut.h"

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

#define GCFAST_TILES "add_product_tiles.h"
#include "each_instruction_set.h"
#undef GCFAST_TILES

template <class T> const Slice<T>& slice() {
#if defined(GCFAST_X86)
  const int level = GCFAST_LEVEL;
  if (level == 4) return *v4::slice<T>();
  if (level == 3) return *v3::slice<T>();
#endif
  return *baseline::slice<T>();
}

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
  const int64_t bytes = inner * static_cast<int64_t>(sizeof(T));
  const Cut cut({p.r, s.rows, kRowBytes / bytes, 8}, {p.c, s.columns, kColumnBytes / bytes, 4},
                team == 1 ? 1 : team * kTasks * (side == 0 ? 1 : 2));
  const int64_t tasks = cut.row_blocks * cut.column_blocks;
  const int threads = static_cast<int>(std::min<int64_t>(team, tasks));
  const int64_t packed = padded((cut.rows + cut.columns) * inner, 64 / sizeof(T));
  const Scratch<T> scratch(packed * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const PlainArithmetic plain;
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
