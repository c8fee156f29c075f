// Scaled products of packed factors for one instruction set; see packed_tiles.h.

#include "packed_tiles.h"

// The sums of a tile times their scales, row r's at scale + at[r], added to N columns of `sums`.
template <class T, int V, int P>
__attribute__((always_inline)) inline void micro(const T* a, const T* b, int64_t k, const T* scale, const int64_t* at,
                                                 T* sums) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int W = Lanes<T>::width, N = Lanes<T>::columns;
  Vec sum[GCFAST_ROWS][V];
  sum_tile<T, V, P, kGroup<T>, true>(a, b, k, sums, N, sum);
#pragma GCC unroll 8
  for (int r = 0; r < GCFAST_ROWS; ++r) {
    const T* s = scale + at[r];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      *reinterpret_cast<Vec*>(sums + r * N + v * W) += *reinterpret_cast<const Vec*>(s + v * W) * sum[r][v];
  }
}

// A row of scales, those of the columns' samples, for every sample of the rows: each for all the columns that it is of.
template <class T>
void spread(const Positions<T>& p, const T* scale, int64_t column, int64_t columns, int64_t fits, T* out) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t W = Lanes<T>::width;
  for (int64_t i = 0; i < p.samples; ++i, scale += p.scale_row, out += Lanes<T>::columns) {
    const T* from = scale + column / p.outputs * p.scale_column;
    if (p.outputs == 1 && p.scale_column == 1) {
      for (int64_t q = 0; q < columns; ++q) out[q] = from[q];
    } else if (p.outputs == 1) {
      for (int64_t q = 0; q < columns; ++q) out[q] = from[q * p.scale_column];
    } else {
      int64_t stop = p.outputs - column % p.outputs;
      for (int64_t q = 0; q < columns; q = stop, stop += p.outputs, from += p.scale_column) {
        const Vec v = Vec{} + *from;  // beyond the columns of this sample, too: those of the next overwrite it
        for (int64_t l = q; l < stop && l < columns; l += W) *reinterpret_cast<Vec*>(out + l) = v;
      }
    }
    for (int64_t q = columns; q < fits; ++q) out[q] = T(0);
  }
}

// Columns [j, j + columns) of a block, at most V vectors.
template <class T, int V>
__attribute__((noinline)) void columns_of(const Positions<T>& p, int64_t j, int64_t columns) {
  constexpr int R = GCFAST_ROWS, W = Lanes<T>::width, G = kGroup<T>;
  // What lies above the diagonal altogether is left out.
  const int64_t begin = p.lower && j > p.above ? (j - p.above) / R * R : 0;
  T* sums = p.sums + j * p.padded_rows;
  for (int64_t t = 0; t < p.t; ++t)
    for (int64_t s = 0; s < p.s; ++s) {
      const T *a = p.a + t * p.a_next, *b = p.b + s * p.b_next + j * p.k;
      spread(p, p.scale + t * p.scale_t + s * p.scale_s, p.column + j, columns, V * W, p.spread);
      for (int64_t i = begin; i < p.rows; i += R) {
        const T *x = a + i / G * G * p.k + i % G, *scale = p.spread - p.at[0];
        T* to = sums + i * Lanes<T>::columns;
        const int64_t below = p.lower ? i + R + p.above - j : columns;  // columns that reach below the diagonal
        if (V > 1 && below <= W)
          micro<T, 1, V>(x, b, p.k, scale, p.at + i, to);
        else if (V > 2 && below <= 2 * W)
          micro<T, V < 2 ? V : 2, V>(x, b, p.k, scale, p.at + i, to);
        else
          micro<T, V, V>(x, b, p.k, scale, p.at + i, to);
      }
    }
}

template <class T> void multiply(const Positions<T>& p) {
  constexpr int W = Lanes<T>::width, N = Lanes<T>::columns;
  for (int64_t j = 0; j < p.columns; j += N) {
    const int64_t here = p.columns - j < N ? p.columns - j : N;
    if (here > 2 * W)
      columns_of<T, 3>(p, j, here);
    else if (here > W)
      columns_of<T, 2>(p, j, here);
    else
      columns_of<T, 1>(p, j, here);
  }
}

// out += sums, on and below the diagonal if `lower`; along the rows, or along columns of unit stride.
template <class T> void add(const Positions<T>& p, T* out, int64_t out_rows, int64_t out_columns) {
  constexpr int64_t N = Lanes<T>::columns;
  for (int64_t j = 0; j < p.columns; j += N) {
    const int64_t here = p.columns - j < N ? p.columns - j : N, first = p.lower && j > p.above ? j - p.above : 0;
    const T* sums = p.sums + j * p.padded_rows;
    T* to = out + j * out_columns;
    if (out_rows == 1 && out_columns != 1) {
      for (int64_t l = 0; l < here; ++l) {
        const int64_t from = p.lower && j + l > p.above ? j + l - p.above : 0;
        for (int64_t i = from; i < p.rows; ++i) to[i + l * out_columns] += sums[i * N + l];
      }
      continue;
    }
    for (int64_t i = first; i < p.rows; ++i) {
      const int64_t stop = p.lower && i + p.above - j + 1 < here ? i + p.above - j + 1 : here;
      if (out_columns == 1)
        for (int64_t l = 0; l < stop; ++l) to[i * out_rows + l] += sums[i * N + l];
      else
        for (int64_t l = 0; l < stop; ++l) to[i * out_rows + l * out_columns] += sums[i * N + l];
    }
  }
}

template <class T> void pack_rows(const T* x, const int64_t* at, int64_t count, int64_t k, T* out) {
  pack_lines<T>(Listed<T>{x, at}, count, k, kGroup<T>, kGroup<T>, out);
}

template <class T> void pack_columns(const T* x, const int64_t* at, int64_t count, int64_t k, T* out) {
  pack_lines<T>(Listed<T>{x, at}, count, k, Lanes<T>::columns, Lanes<T>::width, out);
}

template <class T> const Tiles<T>* tiles() {
  static const Tiles<T> table{pack_rows<T>, pack_columns<T>, multiply<T>, add<T>, kGroup<T>, Lanes<T>::columns};
  return &table;
}
