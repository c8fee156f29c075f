// One slice of a product for one instruction set; see vectors.h. GCFAST_ROWS and GCFAST_VECTORS are the tile that the
// micro-kernel holds in registers.

#include "vectors.h"

template <class T> constexpr int kGroup = GCFAST_ROWS > Lanes<T>::width ? GCFAST_ROWS : Lanes<T>::width;

// sum_i a[i G + r] b[i N + j] for R rows and V vectors of columns: out, or with `add` alpha times it is added to out.
template <class T, int V, bool add>
__attribute__((always_inline)) inline void micro(const T* a, const T* b, int64_t k, T* out, int64_t ldo, T alpha) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int R = GCFAST_ROWS, W = Lanes<T>::width, N = V * W, G = kGroup<T>;
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  // What is added to is fetched meanwhile, a row in 8 steps: all rows at once would hold up the operands.
  const T* ahead = out;
  for (int64_t i = 0; i < k;) {
    const int64_t stop = add && k - i > 8 ? i + 8 : k;
    if constexpr (add)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(ahead + v * W, 1);
    ahead += i < 8 * (R - 1) ? ldo : 0;
    for (; i < stop; ++i) {
      Vec x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = *reinterpret_cast<const Vec*>(b + i * N + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const T s = a[i * G + r];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += s * x[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec* o = reinterpret_cast<Vec*>(out + r * ldo + v * W);
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

// k numbers of each of `count` rows or columns, `lane` apart, in groups of `group`: out[i G + l] for number i of row l,
// G = group, or in the last one as many times `step` as there are; zero beyond `count`.
template <class T>
void pack(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, int64_t group, int64_t step, T* out) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t W = Lanes<T>::width, kLine = 64 / sizeof(T), kAtOnce = 8;
  int64_t done = 0;
  if (lane == 1 && group % W == 0) {
    done = count / group * group;
    // A few numbers of all rows at a time: they are read as they lie.
    for (int64_t i = 0; i < k; i += kAtOnce)
      for (int64_t l = 0; l < done; l += group)
        for (int64_t e = i; e < k && e < i + kAtOnce; ++e) {
          const T* from = x + e * stride + l;
          T* to = out + l * k + e * group;
          for (int64_t v = 0; v < group; v += W)
            *reinterpret_cast<Vec*>(to + v) = *reinterpret_cast<const Vec*>(from + v);
        }
  }
  for (int64_t l = done; l < count; l += group) {
    const int64_t here = count - l < group ? count - l : group, to = (here + step - 1) / step * step;
    const T* from = x + l * lane;
    T* target = out + l * k;
    if (stride == 1) {
      const int64_t next = count - l - here < group ? count - l - here : group;
      for (int64_t r = 0; r < next; ++r)
        for (int64_t i = 0; i < k; i += kLine) __builtin_prefetch(from + (group + r) * lane + i);
      transpose<T>(from, lane, here, k, target, to, to);
    } else {
      for (int64_t i = 0; i < k; ++i)
        for (int64_t v = 0; v < to; ++v) target[i * to + v] = v < here ? from[i * stride + v * lane] : T(0);
    }
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
