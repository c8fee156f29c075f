// Products with |A|: one reading of A gives both |A| right and left |A|. |H| (|H|^T 1) needs the column sums before the
// rows: one reading where columns are contiguous, else two, the second from the end, where the caches still hold H.
// (Column panels small enough for the caches were tried: their short rows cost more than the second reading.) Nothing
// but additions and products of non-negative numbers, all in double: NaN and infinity go through, and any order of
// summation has a small relative error. The order depends on the shape only, not on the threads. Floor: the bytes of A.
#include "gram_error_bound.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "../core/arithmetic.h"
#include "clones.h"

namespace gcfast::cpu {
namespace {

constexpr int kRows = 4;             // at once: weights and column sums are loaded once for all of them
constexpr int64_t kColumns = 2048;   // weights and column sums of a block stay in the first cache
constexpr int64_t kChunks = 32;      // chunks of rows, each with column sums of its own
constexpr int64_t kSerial = 1 << 15; // elements below which threads cost more than they bring

typedef double Vec __attribute__((vector_size(64), aligned(8), may_alias));
typedef int64_t Bits __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kLanes = 8;

__attribute__((always_inline)) inline void load_abs(const double* p, Vec& v) {
  v = (Vec)((Bits)(*reinterpret_cast<const Vec*>(p)) & INT64_MAX);
}
__attribute__((always_inline)) inline void load_abs(const float* p, Vec& v) {
  v = (Vec)((Bits)__builtin_convertvector(*reinterpret_cast<const Half*>(p), Vec) & INT64_MAX);
}
__attribute__((always_inline)) inline double magnitude(double x) { return __builtin_fabs(x); }

// What a chunk of rows is read for. `gram` takes each row's sum as its weight: the form of |H| (|H|^T 1) where the
// columns of H are the rows in memory.
enum class Mode { both, rows, columns, gram };

// R rows at p: dots[r] += |p_r| right, sums += left |p|.
template <class T, int R, bool Dots, bool Sums>
__attribute__((always_inline)) inline void micro(const T* p, int64_t ld, int64_t columns, const double* left,
                                                 const double* right, double* dots, double* sums) {
  Vec dot[R];
  for (int r = 0; r < R; ++r) dot[r] = Vec{};
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    Vec w{}, s{}, v;
    if (Dots) w = *reinterpret_cast<const Vec*>(right + j);
    if (Sums) s = *reinterpret_cast<const Vec*>(sums + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      load_abs(p + r * ld + j, v);
      if (Dots) dot[r] += v * w;
      if (Sums) s += v * left[r];
    }
    if (Sums) *reinterpret_cast<Vec*>(sums + j) = s;
  }
  for (; j < columns; ++j)
    for (int r = 0; r < R; ++r) {
      const double v = magnitude(p[r * ld + j]);
      if (Dots) dot[r][0] += v * right[j];
      if (Sums) sums[j] += v * left[r];
    }
  if (Dots)
    for (int r = 0; r < R; ++r)
      for (int l = 0; l < kLanes; ++l) dots[r] += dot[r][l];
}

// R whole rows, by blocks of columns; those that are not contiguous are packed first.
template <class T, int R, bool Dots, bool Sums>
__attribute__((always_inline)) inline void some_rows(const AbsMatrix<T>& a, int64_t i, const double* left,
                                                     const double* right, double* dots, double* sums) {
  T packed[R * kColumns];
  for (int64_t j = 0; j < a.m; j += kColumns) {
    const int64_t columns = std::min(kColumns, a.m - j);
    const T* p = a.data + i * a.row_stride + j * a.column_stride;
    int64_t ld = a.row_stride;
    if (a.column_stride != 1) {
      for (int r = 0; r < R; ++r)
        for (int64_t k = 0; k < columns; ++k) packed[r * columns + k] = p[r * ld + k * a.column_stride];
      p = packed, ld = columns;
    }
    micro<T, R, Dots, Sums>(p, ld, columns, left, right + j, dots, sums + j);
  }
}

template <class T, int R>
__attribute__((always_inline)) inline void row_group(const AbsMatrix<T>& a, Mode mode, int64_t i, const double* left,
                                                     const double* right, double* rows, double* sums) {
  double dots[R] = {};
  switch (mode) {
    case Mode::both: some_rows<T, R, true, true>(a, i, left + i, right, dots, sums); break;
    case Mode::columns: some_rows<T, R, false, true>(a, i, left + i, right, dots, sums); return;
    case Mode::rows: some_rows<T, R, true, false>(a, i, left, right, dots, sums); break;
    case Mode::gram:
      some_rows<T, R, true, false>(a, i, left, right, dots, sums);
      some_rows<T, R, false, true>(a, i, dots, right, nullptr, sums);
      return;
  }
  for (int r = 0; r < R; ++r) rows[i + r] += dots[r];
}

template <class T>
__attribute__((always_inline)) inline void chunk(const AbsMatrix<T>& a, Mode mode, int64_t i0, int64_t i1,
                                                 const double* left, const double* right, double* rows, double* sums) {
  int64_t i = i0;
  for (; i + kRows <= i1; i += kRows) row_group<T, kRows>(a, mode, i, left, right, rows, sums);
  for (; i < i1; ++i) row_group<T, 1>(a, mode, i, left, right, rows, sums);
}

GCFAST_CLONES void chunk_of(const AbsMatrix<float>& a, Mode mode, int64_t i0, int64_t i1, const double* left,
                            const double* right, double* rows, double* sums) {
  chunk(a, mode, i0, i1, left, right, rows, sums);
}
GCFAST_CLONES void chunk_of(const AbsMatrix<double>& a, Mode mode, int64_t i0, int64_t i1, const double* left,
                            const double* right, double* rows, double* sums) {
  chunk(a, mode, i0, i1, left, right, rows, sums);
}

// out[j] = sum over c of parts[c, j], in order.
void add_up(const double* parts, int64_t count, int64_t length, double* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count * length >= kSerial)
  for (int64_t first = 0; first < length; first += kColumns) {
    const PlainArithmetic plain;
    for (int64_t j = first; j < std::min(length, first + kColumns); ++j) {
      double s = 0;
      for (int64_t c = 0; c < count; ++c) s += parts[c * length + j];
      out[j] = s;
    }
  }
}

// One reading of `a`: rows are added to, columns set. `parts` is memory, kept from call to call.
template <class T>
void pass(const AbsMatrix<T>& a, Mode mode, const double* left, const double* right, double* rows, double* columns,
          std::vector<double>& parts, int threads) {
  const int64_t height = std::max<int64_t>(16, (a.n + kChunks - 1) / kChunks + 3) / 4 * 4;
  const int64_t chunks = (a.n + height - 1) / height;
  const bool wide = a.n * a.m >= kSerial;
  if (mode != Mode::rows) parts.resize(std::max<size_t>(parts.size(), chunks * a.m));
#pragma omp parallel for schedule(static) num_threads(threads) if (wide)
  for (int64_t k = 0; k < chunks; ++k) {
    const PlainArithmetic plain;
    const int64_t c = mode == Mode::rows ? chunks - 1 - k : k;
    double* sums = parts.data() + c * a.m;
    if (mode != Mode::rows) std::fill_n(sums, a.m, 0.0);
    chunk_of(a, mode, c * height, std::min(a.n, (c + 1) * height), left, right, rows, sums);
  }
  if (mode == Mode::rows) return;
  add_up(parts.data(), chunks, a.m, columns, threads);
}

// Whether memory runs along the columns of `a`, or `a` is a single one.
template <class T> bool columns_first(const AbsMatrix<T>& a) {
  return a.m == 1 || (a.n != 1 && a.row_stride < a.column_stride);
}

template <class T> AbsMatrix<T> transposed(const AbsMatrix<T>& a) {
  return {a.data, a.m, a.n, a.column_stride, a.row_stride};
}

template <class T> void products(AbsProductsArgs<T> p) {
  if (columns_first(p.a)) {
    p.a = transposed(p.a);
    std::swap(p.left, p.right);
    std::swap(p.rows, p.columns);
  }
  const std::vector<double> ones(std::max(p.a.n, p.a.m), 1.0);
  std::vector<double> parts;
  std::fill_n(p.rows, p.a.n, 0.0);
  pass(p.a, Mode::both, p.left ? p.left : ones.data(), p.right ? p.right : ones.data(), p.rows, p.columns, parts,
       p.threads);
}

template <class T> void bound(const GramErrorBoundArgs<T>& p) {
  const AbsMatrix<T>& h = p.h;
  const std::vector<double> ones(std::max(h.n, h.m), 1.0);
  std::vector<double> parts;
  if (columns_first(h)) {  // a column is a row in memory: its sum weighs it while it is still in the cache
    pass(transposed(h), Mode::gram, nullptr, ones.data(), nullptr, p.out, parts, p.threads);
    return;
  }
  std::vector<double> sums(h.m);
  std::fill_n(p.out, h.n, 0.0);
  pass(h, Mode::columns, ones.data(), nullptr, nullptr, sums.data(), parts, p.threads);
  pass(h, Mode::rows, nullptr, sums.data(), p.out, nullptr, parts, p.threads);
}

}  // namespace

void abs_products(const AbsProductsArgs<float>& a) { products(a); }
void abs_products(const AbsProductsArgs<double>& a) { products(a); }
void gram_error_bound(const GramErrorBoundArgs<float>& a) { bound(a); }
void gram_error_bound(const GramErrorBoundArgs<double>& a) { bound(a); }

}  // namespace gcfast::cpu
