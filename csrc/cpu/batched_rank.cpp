// Rank of many matrices: eight of them side by side, one in each lane of a vector, so that every step of
// core/inertia.h is a vector operation whatever their size. First in double, with core/deflation.h where the tolerance
// is beyond a Gram in double; what that leaves open, and matrices whose squares would over- or underflow, again in
// double-double. Panels of columns are transposed into lanes; a panel and its tiles stay in the first cache, the Gram
// (n^2 vectors) in the second.
#pragma GCC diagnostic ignored "-Wpsabi"  // everything that takes vectors is inlined

#include "batched_rank.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../core/arithmetic.h"
#include "batched_rank_passes.h"

#if defined(__clang__)
#define GCFAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GCFAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

namespace gcfast::cpu {
namespace {

template <class T>
__attribute__((always_inline)) inline void load8(const T* p, Doubles& v) {
  for (int k = 0; k < kLanes; ++k) v[k] = static_cast<double>(p[k]);
}

__attribute__((always_inline)) inline void transpose8(Doubles* v) {
  Doubles t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = GCFAST_SHUFFLE(v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    t[i + 1] = GCFAST_SHUFFLE(v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + j] = GCFAST_SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      v[i + j + 2] = GCFAST_SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; ++j) {
    t[j] = GCFAST_SHUFFLE(v[j], v[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    t[j + 4] = GCFAST_SHUFFLE(v[j], v[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

// out[i * outer_step + k * inner_step] for i < outer, k < inner: the elements at base + i * outer_stride + k, in lanes.
template <class T>
__attribute__((always_inline)) inline void pack_rows(const Group<T>& g, int64_t offset, int outer, int64_t outer_stride,
                                                     int inner, Doubles* out, int outer_step, int inner_step) {
  for (int i = 0; i < outer; ++i) {
    const int64_t at = offset + i * outer_stride;
    int k = 0;
    for (; k + 8 <= inner; k += 8) {
      Doubles v[8];
      for (int l = 0; l < kLanes; ++l) load8(g.base[l] + at + k, v[l]);
      transpose8(v);
      for (int q = 0; q < 8; ++q) out[i * outer_step + (k + q) * inner_step] = v[q] * g.scale;
    }
    for (; k < inner; ++k) {
      Doubles v;
      for (int l = 0; l < kLanes; ++l) v[l] = static_cast<double>(g.base[l][at + k]);
      out[i * outer_step + k * inner_step] = v * g.scale;
    }
  }
}

template <class T>
__attribute__((always_inline)) inline void pack(const Group<T>& g, int n, int padded, int64_t k0, int columns,
                                                Doubles* panel) {
  const int64_t at = k0 * g.column_stride;
  if (g.row_stride == 1) {
    pack_rows(g, at, columns, g.column_stride, n, panel, padded, 1);
  } else if (g.column_stride == 1) {
    pack_rows(g, at, n, g.row_stride, columns, panel, 1, padded);
  } else {
    for (int k = 0; k < columns; ++k)
      for (int i = 0; i < n; ++i) {
        Doubles v;
        for (int l = 0; l < kLanes; ++l)
          v[l] = static_cast<double>(g.base[l][at + k * g.column_stride + i * g.row_stride]);
        panel[k * padded + i] = v * g.scale;
      }
  }
  for (int k = 0; k < columns; ++k)
    for (int i = n; i < padded; ++i) panel[k * padded + i] = Doubles{};
}

GCFAST_CLONES void pack_f32(const Group<float>& g, int n, int padded, int64_t k0, int columns, Doubles* panel) {
  pack(g, n, padded, k0, columns, panel);
}
GCFAST_CLONES void pack_f64(const Group<double>& g, int n, int padded, int64_t k0, int columns, Doubles* panel) {
  pack(g, n, padded, k0, columns, panel);
}

GCFAST_CLONES void add_panel(const Single& e, const Doubles* panel, int columns, bool first) {
  for (int j0 = 0; j0 < e.padded; j0 += kTile)
    for (int i0 = j0; i0 < e.padded; i0 += kTile) add_tile(e, panel, columns, first, i0, j0);
}
GCFAST_CLONES void examine(const Single& e, int64_t m, const RankOptions* options, RankBounds* bounds,
                           RankVerdict* verdict) {
  const Doubles trace = e.trace(Alone());
  Doubles error;
  for (int l = 0; l < kLanes; ++l) error[l] = gram_error_double(m, trace[l]);
  e.examine(Alone(), m, error, options, bounds, verdict);
}

// Vectors of memory that a group needs.
int64_t vectors_of(int n, bool doubled) {
  const int64_t padded = doubled ? Double::padded_size(n) : Single::padded_size(n);
  const int width = panel_columns(static_cast<int>(padded), doubled);
  const int64_t panel = padded * (width + 1);
  return panel + (doubled ? 2 * Double::numbers(n) : Single::numbers(n) + deflation_vectors(padded, width));
}

template <class T>
void in_double(const Group<T>& g, int n, int64_t m, Doubles* memory, const RankOptions* options, RankVerdict* verdict) {
  const Single e(n, memory);
  Doubles* panel = memory + Single::numbers(n);
  const int width = panel_columns(e.padded, false);
  for (int64_t k0 = 0; k0 < m; k0 += width) {
    const int columns = static_cast<int>(std::min<int64_t>(width, m - k0));
    pack_panel(g, n, e.padded, k0, columns, panel);
    add_panel(e, panel, columns, k0 == 0);
  }
  RankBounds bounds[kLanes];
  examine(e, m, options, bounds, verdict);
  deflate(g, e, m, panel, width, bounds, verdict);
}

template <class T> struct Task {
  BatchedRankArgs<T> a;  // n <= m
  std::vector<int> exponent;  // of the scale of each matrix; empty while all are 0
  std::vector<RankVerdict> verdict;

  const T* matrix(int64_t b) const { return a.a + b * a.batch_stride; }

  // The exponent e for which 2^e times the largest magnitude lies in [1/2, 1); 0 for a zero matrix, and rank -2 or 0.
  void find_scale(int64_t b) {
    double largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < a.n; ++i)
      for (int64_t k = 0; k < a.m; ++k) {
        const double x = std::fabs(static_cast<double>(matrix(b)[i * a.row_stride + k * a.column_stride]));
        finite = finite && x <= std::numeric_limits<double>::max();
        largest = std::max(largest, x);
      }
    int e = 0;
    if (!finite) {
      verdict[b].rank = -2;
    } else if (largest == 0) {
      verdict[b] = {0, 0, 0, 0, 0};
    } else {
      std::frexp(largest, &e);
    }
    exponent[b] = std::clamp(-e, -1000, 1000);
  }

  void group(const int64_t* list, int64_t count, bool doubled, Doubles* memory) {
    Group<T> g;
    RankOptions options[kLanes];
    RankVerdict v[kLanes];
    g.row_stride = a.row_stride, g.column_stride = a.column_stride;
    for (int l = 0; l < kLanes; ++l) {
      const int64_t b = list[std::min<int64_t>(l, count - 1)];
      const int e = exponent.empty() ? 0 : exponent[b];
      g.base[l] = matrix(b);
      g.scale[l] = std::ldexp(1.0, e);
      options[l] = {std::ldexp(a.atol[b], e), a.rtol[b]};
      v[l] = verdict[b];
      // in the units of the scaled matrix, and rounded outwards where that is inexact
      v[l].sigma_min_lower = 0;
      v[l].sigma_max_upper = HUGE_VAL;
    }
    const int n = static_cast<int>(a.n);
    doubled ? in_double_double(g, n, a.m, memory, options, v) : in_double(g, n, a.m, memory, options, v);
    for (int l = 0; l < count; ++l) {
      const int64_t b = list[l];
      const int e = exponent.empty() ? 0 : exponent[b];
      const double low = std::ldexp(v[l].sigma_min_lower, -e), high = std::ldexp(v[l].sigma_max_upper, -e);
      v[l].sigma_min_lower = low < std::numeric_limits<double>::min() ? 0 : low;
      v[l].sigma_max_upper = std::max(high, std::numeric_limits<double>::min());
      verdict[b] = v[l];
    }
  }

  void pass(const std::vector<int64_t>& list, bool doubled) {
    const int64_t count = list.size(), groups = (count + kLanes - 1) / kLanes;
    const int64_t vectors = vectors_of(static_cast<int>(a.n), doubled);
    const int threads = static_cast<int>(std::min<int64_t>(a.threads, groups));
    const double work = static_cast<double>(groups) * a.n * a.n * a.m;
#pragma omp parallel num_threads(threads) if (threads > 1 && work > 1e4)
    {
      std::unique_ptr<double[]> store(new double[(vectors + 1) * kLanes]);
      const auto start = (reinterpret_cast<uintptr_t>(store.get()) + 63) / 64 * 64;
      const PlainArithmetic plain;
#pragma omp for schedule(dynamic, 4)
      for (int64_t k = 0; k < groups; ++k)
        group(list.data() + k * kLanes, std::min<int64_t>(kLanes, count - k * kLanes), doubled,
              reinterpret_cast<Doubles*>(start));
    }
  }

  int64_t run() {
    verdict.resize(a.batch);
    for (RankVerdict& v : verdict) v.upper = static_cast<double>(a.n);
    std::vector<int64_t> list(a.batch);
    for (int64_t b = 0; b < a.batch; ++b) list[b] = b;
    pass(list, false);
    list.clear();
    for (int64_t b = 0; b < a.batch; ++b) {
      if (verdict[b].rank >= 0) continue;
      if (!(verdict[b].sigma_max_upper < HUGE_VAL)) {  // out of range
        exponent.resize(a.batch, 0);
        find_scale(b);
        if (verdict[b].rank != -1) continue;
      }
      list.push_back(b);
    }
    if (!list.empty()) pass(list, true);
    int64_t left = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
      const RankVerdict& v = verdict[b];
      left += v.rank < 0;
      a.rank[b] = static_cast<int64_t>(v.rank);
      a.lower[b] = static_cast<int64_t>(v.lower);
      a.upper[b] = static_cast<int64_t>(v.upper);
      a.sigma_min_lower[b] = v.sigma_min_lower;
      a.sigma_max_upper[b] = v.sigma_max_upper;
    }
    return left;
  }
};

template <class T> int64_t run(BatchedRankArgs<T> a) {
  if (std::min(a.n, a.m) > kLargest) throw std::invalid_argument("batched_rank: the shorter side exceeds the limit");
  if (a.n > a.m) {
    std::swap(a.n, a.m);
    std::swap(a.row_stride, a.column_stride);
  }
  const PlainArithmetic plain;
  return Task<T>{a, {}, {}}.run();
}

}  // namespace

// A function with clones that has no internal linkage would be exported, whatever -fvisibility says.
void pack_panel(const Group<float>& g, int n, int padded, int64_t k0, int columns, Doubles* panel) {
  pack_f32(g, n, padded, k0, columns, panel);
}
void pack_panel(const Group<double>& g, int n, int padded, int64_t k0, int columns, Doubles* panel) {
  pack_f64(g, n, padded, k0, columns, panel);
}

int64_t batched_rank(const BatchedRankArgs<float>& a) { return run(a); }
int64_t batched_rank(const BatchedRankArgs<double>& a) { return run(a); }

}  // namespace gcfast::cpu
