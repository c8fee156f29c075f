#pragma once
#include <cstdint>

namespace gcfast::cpu {

// out += alpha a b for out (r, c), a (r, k), b (k, c) of any strides; alpha is 1 or -1. Sums over slices of `inner`
// are made in registers, each of them is added to out with one rounding. lower: r == c, and nothing above the diagonal
// of out is read or written. The order of every sum is fixed: no bit depends on the threads, or on which rows and
// columns a call has.
template <class T> struct AddProductArgs {
  T* out;
  const T* a;
  const T* b;
  int64_t r, c, k;
  int64_t out_rows, out_columns, a_rows, a_columns, b_rows, b_columns;  // strides
  int64_t inner;
  T alpha;
  bool lower;
  int threads;
};

void add_product(const AddProductArgs<float>& a);
void add_product(const AddProductArgs<double>& a);

}  // namespace gcfast::cpu
