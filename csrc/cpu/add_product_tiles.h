// One slice of a product for one instruction set; see packed_tiles.h.

#include "packed_tiles.h"

// The sums of a tile: out, or with `add` alpha times they are added to out.
template <class T, int V, bool add>
__attribute__((always_inline)) inline void micro(const T* a, const T* b, int64_t k, T* out, int64_t ldo, T alpha) {
  using Vec = typename Lanes<T>::Vec;
  Vec sum[GCFAST_ROWS][V];
  sum_tile<T, V, V, kGroup<T>, add>(a, b, k, out, ldo, sum);
#pragma GCC unroll 8
  for (int r = 0; r < GCFAST_ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec* o = reinterpret_cast<Vec*>(out + r * ldo + v * Lanes<T>::width);
      if constexpr (add)
        *o += alpha * sum[r][v];
      else
        *o = sum[r][v];
    }
}

// A tile that out has only `rows` x `columns` of, or of which the diagonal leaves a part, or that does not lie in rows.
// Element (r, l) is kept if (first + r - l) side >= 0.
template <class T, int V>
__attribute__((noinline)) void partial(const Block<T>& t, const T* a, const T* b, int64_t rows, int64_t columns,
                                       int64_t first, T* out) {
  constexpr int N = V * Lanes<T>::width;
  alignas(64) T part[GCFAST_ROWS * N];
  micro<T, V, false>(a, b, t.k, part, N, t.alpha);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t from = 0, to = columns;
    if (t.side > 0 && first + r + 1 < to) to = first + r + 1;
    if (t.side < 0 && first + r > from) from = first + r;
    T* o = out + r * t.out_rows;
    if (t.out_columns == 1)
      for (int64_t l = from; l < to; ++l) o[l] += t.alpha * part[r * N + l];
    else
      for (int64_t l = from; l < to; ++l) o[l * t.out_columns] += t.alpha * part[r * N + l];
  }
}

// Columns [j, j + columns) of a block, at most V vectors, packed at b.
template <class T, int V>
__attribute__((noinline)) void columns_of(const Block<T>& t, const T* b, int64_t j, int64_t columns) {
  constexpr int R = GCFAST_ROWS, N = V * Lanes<T>::width, G = kGroup<T>;
  for (int64_t i = 0; i < t.rows; i += R) {
    const int64_t rows = t.rows - i < R ? t.rows - i : R, first = i + t.above - j;  // of the tile's corner
    bool whole = rows == R && columns == N && t.out_columns == 1;
    if (t.side > 0) {
      if (first + rows <= 0) continue;
      whole = whole && first - columns + 1 >= 0;
    } else if (t.side < 0) {
      if (first - columns >= 0) break;
      whole = whole && first + rows - 1 <= 0;
    }
    const T* a = t.a + i / G * G * t.k + i % G;
    T* out = t.out + i * t.out_rows + j * t.out_columns;
    if (whole)
      micro<T, V, true>(a, b, t.k, out, t.out_rows, t.alpha);
    else
      partial<T, V>(t, a, b, rows, columns, first, out);
  }
}

template <class T> void multiply(const Block<T>& t) {
  constexpr int W = Lanes<T>::width, N = Lanes<T>::columns;
  for (int64_t j = 0; j < t.columns; j += N) {
    const int64_t here = t.columns - j < N ? t.columns - j : N;
    const T* b = t.b + j * t.k;
    if (here > 2 * W)
      columns_of<T, 3>(t, b, j, here);
    else if (here > W)
      columns_of<T, 2>(t, b, j, here);
    else
      columns_of<T, 1>(t, b, j, here);
  }
}

template <class T> void pack_rows(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, T* out) {
  pack<T>(x, count, lane, stride, k, kGroup<T>, kGroup<T>, out);
}

template <class T> void pack_columns(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, T* out) {
  pack<T>(x, count, lane, stride, k, Lanes<T>::columns, Lanes<T>::width, out);
}

template <class T> const Slice<T>* slice() {
  static const Slice<T> table{pack_rows<T>, pack_columns<T>, multiply<T>, kGroup<T>, Lanes<T>::columns};
  return &table;
}
