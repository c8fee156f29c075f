// The tiles of the wide layer for one instruction set: wide.cpp includes this file once for each, inside a namespace
// and a `#pragma GCC target`, with GCFAST_VECTOR (bytes of a vector), GCFAST_ROWS and GCFAST_VECTORS (the tile that a
// micro-kernel holds in registers) defined. Nothing from the standard library is called here: a function template
// that is not inlined would be one for all instruction sets.
//
// Phi exists as tiles of kStrip rows x kColumns<T> columns, row after row, between the product that makes it (weights
// packed, lanes along columns) and the product that consumes it. Sums start at zero in every tile and are added to
// what is there: their error grows with the tile and the number of tiles, not with their product.

#include "vectors.h"

// out[r, j] (+)= sum_k a[r rs + k ks] b[k ldb + j] (+ bias[j]) for R rows and V vectors of columns.
template <class T, int R, int V>
__attribute__((always_inline)) inline void micro(const T* a, int64_t rs, int64_t ks, const T* b, int64_t ldb, int64_t k,
                                                 T* out, int64_t ldo, const T* bias, bool add) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int W = Lanes<T>::width;
  Vec sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    Vec x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = *reinterpret_cast<const Vec*>(b + i * ldb + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const T s = a[r * rs + i * ks];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += s * x[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec* o = reinterpret_cast<Vec*>(out + r * ldo + v * W);
      Vec s = sum[r][v];
      if (add) s += *o;
      if (bias) s += *reinterpret_cast<const Vec*>(bias + v * W);
      *o = s;
    }
}

template <class T, int V, int R>
__attribute__((noinline)) void rows_of(int64_t rows, const T* a, int64_t rs, int64_t ks, const T* b, int64_t ldb, int64_t k,
                                       T* out, int64_t ldo, const T* bias, bool add) {
  int64_t i = 0;
  for (; i + R <= rows; i += R) micro<T, R, V>(a + i * rs, rs, ks, b, ldb, k, out + i * ldo, ldo, bias, add);
  a += i * rs, out += i * ldo, rows -= i;
#define GCFAST_REST(N) \
  case N:              \
    if constexpr (R > N) micro<T, N, V>(a, rs, ks, b, ldb, k, out, ldo, bias, add); \
    break;
  switch (rows) {
    GCFAST_REST(1) GCFAST_REST(2) GCFAST_REST(3) GCFAST_REST(4) GCFAST_REST(5) GCFAST_REST(6)
    GCFAST_REST(7) GCFAST_REST(8) GCFAST_REST(9) GCFAST_REST(10) GCFAST_REST(11)
  }
#undef GCFAST_REST
}

// The same for any rows and for columns that are a multiple of a vector; b and out have these columns.
template <class T>
void product(int64_t rows, int64_t columns, const T* a, int64_t rs, int64_t ks, const T* b, int64_t ldb, int64_t k, T* out,
             int64_t ldo, bool add) {
  constexpr int W = Lanes<T>::width;
  int64_t j = 0;
  for (; j + Lanes<T>::columns <= columns; j += Lanes<T>::columns)
    rows_of<T, GCFAST_VECTORS, GCFAST_ROWS>(rows, a, rs, ks, b + j, ldb, k, out + j, ldo, nullptr, add);
  for (; j + 2 * W <= columns; j += 2 * W)
    rows_of<T, 2, GCFAST_ROWS>(rows, a, rs, ks, b + j, ldb, k, out + j, ldo, nullptr, add);
  // One vector: twice the rows, for as many sums that do not wait for each other.
  for (; j < columns; j += W)
    rows_of<T, 1, 2 * GCFAST_ROWS>(rows, a, rs, ks, b + j, ldb, k, out + j, ldo, nullptr, add);
}

// Columns [j0, j0 + kBlock) of the layer for tile(): for each micro-kernel's columns, d rows of them.
template <class T> void pack(const WideLayer<T>& a, int64_t j0, T* packed, T* bias) {
  constexpr int N = Lanes<T>::columns;
  for (int64_t j = 0; j < kColumns<T>; j += N) {
    const int64_t there = a.m - j0 - j < 0 ? 0 : a.m - j0 - j;
    transpose(a.weight + (there ? (j0 + j) * a.weight_stride : 0), a.weight_stride, there < N ? there : N, a.d,
              packed + j * a.d, N, N);
  }
  for (int64_t j = 0; j < kColumns<T>; ++j) bias[j] = j0 + j < a.m ? a.bias[j0 + j] : T(0);
}

// Pre-activations of `rows` rows of z in one block of columns.
template <class T> void tile(const WideLayer<T>& a, int64_t i0, int64_t rows, const T* packed, const T* bias, T* out) {
  constexpr int N = Lanes<T>::columns;
  for (int64_t k = 0; k < a.d; k += kInner) {
    const int64_t inner = a.d - k < kInner ? a.d - k : kInner;
    for (int64_t j = 0; j < kColumns<T>; j += N)
      rows_of<T, GCFAST_VECTORS, GCFAST_ROWS>(rows, a.z + i0 * a.z_stride + k, a.z_stride, 1, packed + j * a.d + k * N, N,
                                              inner, out + j, kColumns<T>, k + inner == a.d ? bias + j : nullptr, k > 0);
  }
}

template <class T> const Tiles<T>* tiles() {
  static const Tiles<T> table{pack<T>, tile<T>, product<T>, transpose<T>, Lanes<T>::width};
  return &table;
}
