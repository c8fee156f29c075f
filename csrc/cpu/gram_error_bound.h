#pragma once
#include <cstdint>

namespace gcfast::cpu {

// Any strides, in elements; what is innermost in memory is found here.
template <class T> struct AbsMatrix {
  const T* data;
  int64_t n, m, row_stride, column_stride;
};

// rows = |A| right (n), columns = left |A| (m), in float64; a null left or right stands for ones.
template <class T> struct AbsProductsArgs {
  AbsMatrix<T> a;
  const double *left, *right;
  double *rows, *columns;
  int threads;
};

// out = |H| (|H|^T 1) (n), in float64.
template <class T> struct GramErrorBoundArgs {
  AbsMatrix<T> h;
  double* out;
  int threads;
};

void abs_products(const AbsProductsArgs<float>& a);
void abs_products(const AbsProductsArgs<double>& a);
void gram_error_bound(const GramErrorBoundArgs<float>& a);
void gram_error_bound(const GramErrorBoundArgs<double>& a);

}  // namespace gcfast::cpu
