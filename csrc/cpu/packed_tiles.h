// What products of packed operands share, for one instruction set: the sums of a tile, and packing. Included by the
// tiles of an op where vectors.h would be. GCFAST_ROWS and GCFAST_VECTORS are the tile that is held in registers.

#include "vectors.h"

template <class T> constexpr int kGroup = GCFAST_ROWS > Lanes<T>::width ? GCFAST_ROWS : Lanes<T>::width;

// sum_i a[i G + r] b[i N + j] for R rows, of G that are packed, and V vectors of columns, of P that are. What they are
// added to is fetched meanwhile, a row of `ahead` in 8 steps: all rows at once would hold up the operands.
template <class T, int V, int P, int G, bool fetch>
__attribute__((always_inline)) inline void sum_tile(const T* a, const T* b, int64_t k, const T* ahead, int64_t lda,
                                                    typename Lanes<T>::Vec (&sum)[GCFAST_ROWS][V]) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int R = GCFAST_ROWS, W = Lanes<T>::width, N = P * W;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (int64_t i = 0; i < k;) {
    const int64_t stop = fetch && k - i > 8 ? i + 8 : k;
    if constexpr (fetch)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(ahead + v * W, 1);
    ahead += i < 8 * (R - 1) ? lda : 0;
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
}

// k numbers of each of `count` rows of unit stride, in groups of `group`: out[i G + l] for number i of row l, G = group,
// or in the last one as many times `step` as there are; zero beyond `count`.
template <class T, class Rows>
void pack_lines(const Rows& row, int64_t count, int64_t k, int64_t group, int64_t step, T* out) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t l = 0; l < count; l += group) {
    const int64_t here = count - l < group ? count - l : group, to = (here + step - 1) / step * step;
    const int64_t next = count - l - here < group ? count - l - here : group;
    for (int64_t r = 0; r < next; ++r)
      for (int64_t i = 0; i < k; i += kLine) __builtin_prefetch(row(l + group + r) + i);
    transpose<T>(row, l, here, k, out + l * k, to, to);
  }
}

// The same for rows or columns `lane` apart whose numbers are `stride` apart.
template <class T>
void pack(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, int64_t group, int64_t step, T* out) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t W = Lanes<T>::width, kAtOnce = 8, kAhead = 16;
  int64_t done = 0;
  if (lane == 1 && group % W == 0) {
    done = count / group * group;
    if (count % group % step == 0) done = count;
    // A few numbers of all rows at a time: they are read as they lie, and what is far apart is fetched ahead.
    for (int64_t i = 0; i < k; i += kAtOnce)
      for (int64_t l = 0; l < done; l += group) {
        const int64_t here = done - l < group ? done - l : group;
        for (int64_t e = i; e < k && e < i + kAtOnce; ++e) {
          const T* from = x + e * stride + l;
          __builtin_prefetch(from + kAhead * stride);
          T* to = out + l * k + e * here;
          for (int64_t v = 0; v < here; v += W)
            *reinterpret_cast<Vec*>(to + v) = *reinterpret_cast<const Vec*>(from + v);
        }
      }
  }
  if (stride == 1) return pack_lines<T>(Evenly<T>{x + done * lane, lane}, count - done, k, group, step, out + done * k);
  for (int64_t l = done; l < count; l += group) {
    const int64_t here = count - l < group ? count - l : group, to = (here + step - 1) / step * step;
    T* target = out + l * k;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t v = 0; v < to; ++v) target[i * to + v] = v < here ? x[i * stride + (l + v) * lane] : T(0);
  }
}
