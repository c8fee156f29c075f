// Gradients of samples and the products of their lanes for one instruction set; see packed_tiles.h.

#include "packed_tiles.h"

// Rows of J that lie side by side: whole tiles of columns, and whole tiles of rows.
template <class T> constexpr int kLanes = Lanes<T>::columns * (Lanes<T>::columns % GCFAST_ROWS ? 2 : 1);

template <class T, int V, bool add>
__attribute__((always_inline)) inline void gradient(const T* g, const T* a, int64_t k, T* out, int64_t ldo) {
  using Vec = typename Lanes<T>::Vec;
  Vec sum[GCFAST_ROWS][V];
  sum_tile<T, V, V, kGroup<T>, add>(g, a, k, out, ldo, sum);
#pragma GCC unroll 8
  for (int r = 0; r < GCFAST_ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec* o = reinterpret_cast<Vec*>(out + r * ldo + v * Lanes<T>::width);
      if constexpr (add)
        *o += sum[r][v];
      else
        *o = sum[r][v];
    }
}

// A tile that reaches beyond the block: what lies there belongs to others.
template <class T, int V>
__attribute__((noinline)) void partial(const T* g, const T* a, int64_t k, T* out, int64_t ldo, int64_t rows,
                                       int64_t columns, bool add) {
  constexpr int N = V * Lanes<T>::width;
  alignas(64) T part[GCFAST_ROWS * N];
  gradient<T, V, false>(g, a, k, part, N);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = 0; l < columns; ++l) out[r * ldo + l] = add ? out[r * ldo + l] + part[r * N + l] : part[r * N + l];
}

// Columns [j, j + columns) of a sample's gradients, at most V vectors.
template <class T, int V>
__attribute__((noinline)) void gradients_of(const Gradients<T>& p, int64_t j, int64_t columns) {
  constexpr int R = GCFAST_ROWS, N = V * Lanes<T>::width, G = kGroup<T>;
  const int64_t next = (p.rows + G - 1) / G * G * p.k;
  const T* a = p.a + j * p.k;
  for (int64_t c = 0; c < p.outputs; ++c)
    for (int64_t i = 0; i < p.rows; i += R) {
      const T* g = p.g + c * next + i / G * G * p.k + i % G;
      T* out = p.out + c * p.ld + i * p.columns + j;
      if (columns < N || i + R > p.rows)
        partial<T, V>(g, a, p.k, out, p.columns, p.rows - i < R ? p.rows - i : R, columns, p.add);
      else if (p.add)
        gradient<T, V, true>(g, a, p.k, out, p.columns);
      else
        gradient<T, V, false>(g, a, p.k, out, p.columns);
    }
}

template <class T> void gradients(const Gradients<T>& p) {
  constexpr int W = Lanes<T>::width, N = Lanes<T>::columns;
  for (int64_t j = 0; j < p.columns; j += N) {
    const int64_t here = p.columns - j < N ? p.columns - j : N;
    if (here > 2 * W)
      gradients_of<T, 3>(p, j, here);
    else if (here > W)
      gradients_of<T, 2>(p, j, here);
    else
      gradients_of<T, 1>(p, j, here);
  }
}

// `count` rows of k numbers, `first` of J the first of them, into their lanes; zero in those up to a whole group.
template <class T> void into_lanes(const T* x, int64_t ld, int64_t first, int64_t count, int64_t k, T* lanes) {
  constexpr int64_t G = kGroup<T>, L = kLanes<T>;
  for (int64_t l = 0; l < count; l += G) {
    const int64_t row = first + l;
    transpose<T>(x + l * ld, ld, count - l < G ? count - l : G, k, lanes + row / L * L * k + row % L, G, L);
  }
}

template <class T, int V>
__attribute__((always_inline)) inline void product(const T* a, const T* b, int64_t k, T* sums) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int W = Lanes<T>::width, N = Lanes<T>::columns;
  Vec sum[GCFAST_ROWS][V];
  sum_tile<T, V, kLanes<T> / W, kLanes<T>, true>(a, b, k, sums, N, sum);
#pragma GCC unroll 8
  for (int r = 0; r < GCFAST_ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vec*>(sums + r * N + v * W) += sum[r][v];
}

// Sums of N columns from column j on, of which V vectors count.
template <class T, int V> __attribute__((noinline)) void products_of(const Products<T>& p, int64_t j) {
  constexpr int R = GCFAST_ROWS, W = Lanes<T>::width, N = Lanes<T>::columns, L = kLanes<T>;
  T* sums = p.sums + j * p.padded_rows;
  for (int64_t k0 = 0; k0 < p.k; k0 += p.inner) {
    const int64_t k = p.k - k0 < p.inner ? p.k - k0 : p.inner;
    const T* b = p.b + j / L * L * p.k + k0 * L + j % L;
    for (int64_t i = p.lower ? j / R * R : 0; i < p.rows; i += R) {
      const T* a = p.a + i / L * L * p.k + k0 * L + i % L;
      const int64_t below = p.lower ? i + R - j : N;  // columns that reach below the diagonal
      if (V > 1 && below <= W)
        product<T, 1>(a, b, k, sums + i * N);
      else if (V > 2 && below <= 2 * W)
        product<T, V < 2 ? V : 2>(a, b, k, sums + i * N);
      else
        product<T, V>(a, b, k, sums + i * N);
    }
  }
}

template <class T> void products(const Products<T>& p, int64_t j) {
  constexpr int W = Lanes<T>::width;
  if (p.columns - j > 2 * W)
    products_of<T, 3>(p, j);
  else if (p.columns - j > W)
    products_of<T, 2>(p, j);
  else
    products_of<T, 1>(p, j);
}

template <class T> void pack_rows(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, T* out) {
  pack<T>(x, count, lane, stride, k, kGroup<T>, kGroup<T>, out);
}

template <class T> void pack_columns(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, T* out) {
  pack<T>(x, count, lane, stride, k, Lanes<T>::columns, Lanes<T>::width, out);
}

template <class T> const Tiles<T>* tiles() {
  static const Tiles<T> table{pack_rows<T>, pack_columns<T>, gradients<T>,      into_lanes<T>,
                              products<T>,  kGroup<T>,       Lanes<T>::columns, kLanes<T>};
  return &table;
}
