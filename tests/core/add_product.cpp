// csrc/cpu/add_product.cpp on every instruction set, operands in heap blocks of exactly their size, so that a sanitizer
// sees an access beyond them: whole numbers against exact sums, real ones against themselves in other pieces.
#ifdef __CUDACC__  // of the CPU alone
int main() { return 0; }
#else
inline int forced_level = -1;
#define GCFAST_LEVEL (forced_level < 0 || forced_level > instruction_level() ? instruction_level() : forced_level)
#include "../../csrc/cpu/add_product.cpp"

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"

using namespace gcfast::cpu;

namespace {

uint32_t state = 1;
double uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<double>(state >> 8) / (1 << 23) - 1.0;
}

// 0: rows, 1: rows with a gap, 2: columns, 3: columns with a gap, 4: neither.
template <class T> struct Matrix {
  int64_t rows, columns, row, column;
  std::vector<T> data;
  Matrix(int64_t r, int64_t c, int layout, bool whole) : rows(r), columns(c) {
    const int64_t gap = layout % 2 ? 3 : 0;
    row = layout < 2 ? c + gap : layout < 4 ? 1 : 2 * c + 1;
    column = layout < 2 ? 1 : layout < 4 ? r + gap : 2;
    data.assign(r && c ? (r - 1) * row + (c - 1) * column + 1 : 0, static_cast<T>(NAN));
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < c; ++j) at(i, j) = static_cast<T>(whole ? std::floor(8 * uniform()) : uniform());
  }
  T& at(int64_t i, int64_t j) { return data[i * row + j * column]; }
};

template <class T>
AddProductArgs<T> args(Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, int64_t inner, T alpha, bool lower,
                       int threads) {
  return {out.data.data(), a.data.data(), b.data.data(), out.rows, out.columns, a.columns, out.row, out.column,
          a.row,           a.column,      b.row,         b.column, inner,       alpha,     lower,   threads};
}

template <class T> void exact(int64_t r, int64_t c, int64_t k, int layout, int64_t inner, bool lower, int threads) {
  Matrix<T> out(r, c, layout % 5, true), a(r, k, layout / 5 % 5, true), b(k, c, layout / 25, true);
  const T alpha = layout % 2 ? T(1) : T(-1), nan = static_cast<T>(NAN);
  std::vector<T> want(r * c);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < c; ++j) {
      if (lower && j > i) out.at(i, j) = nan;
      want[i * c + j] = out.at(i, j);
      for (int64_t e = 0; e < k; ++e) want[i * c + j] += alpha * a.at(i, e) * b.at(e, j);
    }
  add_product(args(out, a, b, inner, alpha, lower, threads));
  int64_t wrong = 0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < c; ++j) wrong += std::memcmp(&out.at(i, j), &want[i * c + j], sizeof(T)) != 0;
  CHECK(wrong == 0, "%ld of %ld x %ld x %ld, layout %d, lower %d", long(wrong), long(r), long(c), long(k), layout,
        lower);
}

// The last row and column alone, and all with other threads and operands that lie otherwise: the same bits.
template <class T> void pieces(int64_t n, int64_t k, int64_t inner) {
  Matrix<T> out(n, n, 0, false), a(n, k, 0, false), b(k, n, 0, false), all = out, other = out, turned(n, n, 2, false);
  Matrix<T> a2(n, k, 3, false), b2(k, n, 2, false);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) turned.at(i, j) = out.at(i, j);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t e = 0; e < k; ++e) a2.at(i, e) = a.at(i, e), b2.at(e, i) = b.at(e, i);
  add_product(args(all, a, b, inner, T(1), false, 1));
  add_product(args(other, a2, b, inner, T(1), false, 3));
  CHECK(std::memcmp(all.data.data(), other.data.data(), n * n * sizeof(T)) == 0, "n %ld threads", long(n));
  add_product(args(turned, a, b2, inner, T(1), false, 2));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) CHECK(turned.at(i, j) == all.at(i, j), "turned %ld %ld", long(i), long(j));
  AddProductArgs<T> one = args(out, a, b, inner, T(1), false, 1);
  one.out += n * n - 1, one.a += (n - 1) * k, one.b += n - 1, one.r = one.c = 1;
  add_product(one);
  CHECK(out.at(n - 1, n - 1) == all.at(n - 1, n - 1), "n %ld k %ld alone", long(n), long(k));
}

template <class T> void all() {
  int layout = 0;
  for (int64_t r : {1, 4, 7, 8, 9, 25, 50})
    for (int64_t c : {1, 8, 15, 17, 24, 25, 49, 70})
      for (int64_t k : {1, 3, 16, 17, 40}) {
        exact<T>(r, c, k, layout % 125, 1 + k * 2 / 3, false, 1 + layout % 3);
        ++layout;
      }
  for (layout = 0; layout < 125; ++layout) {
    exact<T>(33, 51, 19, layout, 16, false, 2);
    exact<T>(52, 52, 19, layout, 300, true, 2);
  }
  for (int64_t n : {1, 2, 23, 24, 25, 48, 49, 97, 230}) exact<T>(n, n, 64, int(n) % 125, 32, true, 3);
  exact<T>(3, 3, 0, 0, 5, false, 1), exact<T>(0, 3, 4, 0, 5, false, 1), exact<T>(3, 0, 4, 0, 5, false, 1);
  pieces<T>(26, 50, 16), pieces<T>(150, 97, 40);
}

}  // namespace

int main() {
  for (int l : {-1, 0, 3}) {
    forced_level = l;
    all<float>(), all<double>();
  }
  return report();
}
#endif
