// The rank of one matrix by one Team (core/inertia.h) in its own memory: what csrc/cuda/batched_rank.cu runs, in a
// header so that threads of a host can stand in for those of a GPU (tests/core/inertia.cpp).
#pragma once
#include <cstdint>
#include <cstring>

#include "inertia.h"

namespace gcfast {

// `batch` matrices B, n x m with n <= m, in any strides, and where their verdicts go. rank is -1 where it is not
// decided, -2 where the matrix is not finite.
template <class T> struct RankTask {
  const T* a;
  int64_t batch, m, batch_stride, row_stride, column_stride;
  const double *atol, *rtol;
  int64_t *rank, *lower, *upper;
  double *sigma_min_lower, *sigma_max_upper;
  int n;
};

// A Team's elimination, in tiles of one row for each thread, and the rows and columns of a thread's tile of the Gram.
template <bool Doubled> struct TeamNumbers;
template <> struct TeamNumbers<false> {
  using Num = double;
  using Memory = Elimination<double, 4, 1>;
  static constexpr int kTile = 4;
};
template <> struct TeamNumbers<true> {
  using Num = DoubleDouble<double>;
  using Memory = Elimination<Num, 4, 1>;
  static constexpr int kTile = 2;
};

// Bytes of a Team's memory with panels of `columns` columns: numbers, panel, and for double-double the rows' scales.
template <bool Doubled> GCFAST_HD int64_t team_bytes(int n, int columns) {
  using Memory = typename TeamNumbers<Doubled>::Memory;
  const int64_t padded = Memory::padded_size(n), bytes = sizeof(typename TeamNumbers<Doubled>::Num);
  return (Memory::numbers(n) * bytes + (Memory::stride(n) * columns + (Doubled ? 2 * padded : 0)) * 8 + 15) / 16 * 16;
}

// Columns [k0, k0 + columns) of B as panel[k * stride + i], times `scale` and row_scale[i] unless that is null; zero
// past the ends. Neighbouring threads go along the smaller stride, and each has kFlight loads under way.
template <class Team, class T>
GCFAST_HD void load_panel(const Team& team, const RankTask<T>& t, const T* matrix, int padded, int64_t k0, int columns,
                          double scale, const double* row_scale, double* panel, int stride) {
  constexpr int kFlight = 8;
  const int n = t.n;
  const bool by_rows = t.row_stride < t.column_stride;
  const int extent = by_rows ? padded : columns, others = by_rows ? columns : padded;
  const int64_t inner_stride = by_rows ? t.row_stride : t.column_stride;
  const int64_t outer_stride = by_rows ? t.column_stride : t.row_stride;
  const int left = static_cast<int>(t.m - k0 < columns ? t.m - k0 : columns);
  const int inner_end = by_rows ? n : left, outer_end = by_rows ? left : n;
  int fast = 1;
  while (fast < extent && fast < team.size()) fast *= 2;
  if (fast > team.size()) fast = team.size();
  const int slow = team.size() / fast, inner0 = team.rank() % fast, outer0 = team.rank() / fast;
  if (outer0 >= slow) return;
  const T* const base = matrix + k0 * t.column_stride;
  for (int inner = inner0; inner < extent; inner += fast) {
    const T* const line = base + inner * inner_stride;
    for (int first = outer0; first < others; first += slow * kFlight) {
      T v[kFlight];
      GCFAST_UNROLL
      for (int f = 0; f < kFlight; ++f) {
        const int outer = first + f * slow;
        v[f] = inner < inner_end && outer < outer_end ? line[outer * outer_stride] : T(0);
      }
      GCFAST_UNROLL
      for (int f = 0; f < kFlight; ++f) {
        const int outer = first + f * slow;
        if (outer >= others) continue;
        const int i = by_rows ? inner : outer, k = by_rows ? outer : inner;
        double x = static_cast<double>(v[f]) * scale;
        if (row_scale != nullptr) x *= row_scale[i];
        panel[k * stride + i] = x;
      }
    }
  }
}

// An entry of the Gram as a thread sums it: begun from what is there, and put back.
template <bool Doubled> struct GramEntry;
template <> struct GramEntry<false> {
  double x = 0;
  GCFAST_HD void add(double a, double b) { x += a * b; }
  GCFAST_HD void begin(const double& g) { x = g; }
  GCFAST_HD void end(double& g, bool, double) const { g = x; }
};
template <> struct GramEntry<true> {
  ProductSum<double> x;
  GCFAST_HD void add(double a, double b) { x.add(a, b); }
  GCFAST_HD void begin(const DoubleDouble<double>&) {}
  GCFAST_HD void end(DoubleDouble<double>& g, bool first, double scale) const {
    const DoubleDouble<double> v = x.value(), scaled{v.hi * scale, v.lo * scale};
    g = first ? scaled : sum(g, scaled);
  }
};

// G += the panel's part, or = for the first one; in double-double its rows are scaled, and unit[i] unit[j] undoes that.
// The rows are in padded / kTile classes modulo that number, and a thread has the entries of a pair of classes:
// neighbours read neighbouring words, and the pairs cover G once.
template <bool Doubled, class Team>
GCFAST_HD void add_panel(const Team& team, const typename TeamNumbers<Doubled>::Memory& e, const double* panel,
                         int stride, int columns, bool first, const double* unit) {
  constexpr int R = TeamNumbers<Doubled>::kTile;
  const int classes = e.padded / R;
  int p = 0, q = team.rank();  // the pair, p >= q
  while (q > p) q -= ++p;
  while (p < classes) {
    GramEntry<Doubled> x[R][R];
    GCFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      GCFAST_UNROLL
      for (int c = 0; c < R; ++c)
        if (!first) x[r][c].begin(e.gram(p + r * classes, q + c * classes));
    }
    const double* column = panel;
    for (int k = 0; k < columns; ++k, column += stride) {
      double a[R], b[R];
      GCFAST_UNROLL
      for (int r = 0; r < R; ++r) a[r] = column[p + r * classes], b[r] = column[q + r * classes];
      GCFAST_UNROLL
      for (int r = 0; r < R; ++r) {
        GCFAST_UNROLL
        for (int c = 0; c < R; ++c) x[r][c].add(a[r], b[c]);
      }
    }
    GCFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      GCFAST_UNROLL
      for (int c = 0; c < R; ++c) {
        const int i = p + r * classes, j = q + c * classes;
        if (p > q || r >= c) x[r][c].end(e.gram(i, j), first, Doubled ? unit[i] * unit[j] : 1.0);
      }
    }
    q += team.size();
    while (q > p) q -= ++p;
  }
}

GCFAST_HD double power_of_two(int exponent) {  // -1022 to 1023
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
// The exponent of a power of two above the square root of a finite x >= 0.
GCFAST_HD int exponent_above_root(double x) {
  const double raised = x * (1 + 0x1p-20);  // above the sum, whatever way 2^33 columns were rounded
  uint64_t bits;
  memcpy(&bits, &raised, sizeof bits);
  return (static_cast<int>(bits >> 52) - 1023 + 2) >> 1;
}

// Sets exponent so that 2^exponent times the largest magnitude lies in [1/2, 1), and decides a matrix that is zero or
// not finite.
template <class Team, class T>
GCFAST_HD void find_scale(const Team& team, const RankTask<T>& t, const T* matrix, int& exponent,
                          RankVerdict& verdict) {
  const bool by_rows = t.row_stride < t.column_stride;
  const int64_t extent = by_rows ? t.n : t.m, others = by_rows ? t.m : t.n;
  const int64_t inner_stride = by_rows ? t.row_stride : t.column_stride;
  const int64_t outer_stride = by_rows ? t.column_stride : t.row_stride;
  double largest = 0, bad = 0;
  for (int64_t outer = 0; outer < others; ++outer)
    for (int64_t inner = team.rank(); inner < extent; inner += team.size()) {
      const double x = fabs(static_cast<double>(matrix[outer * outer_stride + inner * inner_stride]));
      if (!(x < HUGE_VAL)) bad = 1;
      largest = fmax(largest, x);
    }
  largest = team.largest(largest);
  int e = 0;
  if (team.largest(bad) > 0) {
    verdict.rank = -2;
  } else if (!(largest > 0)) {
    verdict.rank = verdict.lower = verdict.upper = verdict.sigma_max_upper = 0;
  } else {
    frexp(largest, &e);
  }
  exponent = static_cast<int>(fmax(-1000.0, fmin(1000.0, -1.0 * e)));
}

template <bool Doubled, class Team, class T>
GCFAST_HD void examine_matrix(const Team& team, const RankTask<T>& t, const T* matrix, int exponent, double atol,
                              double rtol, int columns, void* memory, RankVerdict& verdict) {
  using Numbers = TeamNumbers<Doubled>;
  using Memory = typename Numbers::Memory;
  const Memory e(t.n, static_cast<typename Numbers::Num*>(memory));
  const int stride = Memory::stride(t.n);
  const double scale = power_of_two(exponent);
  double* const panel = reinterpret_cast<double*>(static_cast<typename Numbers::Num*>(memory) + Memory::numbers(t.n));
  double *const unit = panel + static_cast<int64_t>(stride) * columns, *const inverse_unit = unit + e.padded;
  double spread = 0;
  if (Doubled) {  // row norms first
    for (int i = team.rank(); i < e.padded; i += team.size()) unit[i] = 0;
    for (int64_t k0 = 0; k0 < t.m; k0 += columns) {
      team.sync();
      load_panel(team, t, matrix, e.padded, k0, columns, scale, nullptr, panel, stride);
      team.sync();
      for (int i = team.rank(); i < e.padded; i += team.size()) {
        double s = unit[i];
        for (int k = 0; k < columns; ++k) s += panel[k * stride + i] * panel[k * stride + i];
        unit[i] = s;
      }
    }
    for (int i = team.rank(); i < e.padded; i += team.size()) {
      const int k = exponent_above_root(unit[i]);
      unit[i] = power_of_two(k);
      inverse_unit[i] = power_of_two(-k);
      spread += unit[i] * unit[i];
    }
    spread = team.sum(spread);
  }
  for (int64_t k0 = 0; k0 < t.m; k0 += columns) {
    team.sync();
    load_panel(team, t, matrix, e.padded, k0, columns, scale, Doubled ? inverse_unit : nullptr, panel, stride);
    team.sync();
    add_panel<Doubled>(team, e, panel, stride, columns, k0 == 0, unit);
  }
  team.sync();
  const double error = Doubled ? gram_error_doubled(t.m, (t.m + columns - 1) / columns, spread)
                               : gram_error_double(t.m, e.trace(team));
  const RankOptions options{exponent == 0 ? atol : ldexp(atol, exponent), rtol};
  RankBounds bounds;
  e.examine(team, t.m, error, &options, &bounds, &verdict);
}

template <class T> GCFAST_HD void store(const RankTask<T>& t, int64_t b, const RankVerdict& v) {
  t.rank[b] = static_cast<int64_t>(v.rank);
  t.lower[b] = static_cast<int64_t>(v.lower);
  t.upper[b] = static_cast<int64_t>(v.upper);
  t.sigma_min_lower[b] = v.sigma_min_lower;
  t.sigma_max_upper[b] = v.sigma_max_upper;
}

// The verdict of matrix b by double, written by one thread; returns whether it is final.
template <class Team, class T>
GCFAST_HD bool rank_in_double(const Team& team, const RankTask<T>& t, int64_t b, int columns, void* memory) {
  RankVerdict v;
  v.upper = t.n;
  examine_matrix<false>(team, t, t.a + b * t.batch_stride, 0, t.atol[b], t.rtol[b], columns, memory, v);
  if (v.sigma_min_lower < 0x1p-1022) v.sigma_min_lower = 0;
  if (v.sigma_max_upper < 0x1p-1022) v.sigma_max_upper = 0x1p-1022;
  if (team.rank() == 0) store(t, b, v);
  return v.rank >= 0;
}

// What double has left open: by double-double, scaled if it was out of double's range. Without memory for that only
// matrices that are zero or not finite are decided.
template <class Team, class T>
GCFAST_HD void rank_in_double_double(const Team& team, const RankTask<T>& t, int64_t b, int columns, void* memory) {
  const T* const matrix = t.a + b * t.batch_stride;
  RankVerdict v;
  v.lower = static_cast<double>(t.lower[b]);
  v.upper = static_cast<double>(t.upper[b]);
  const double least = t.sigma_min_lower[b], largest = t.sigma_max_upper[b];
  int exponent = 0;
  if (!(largest < HUGE_VAL)) find_scale(team, t, matrix, exponent, v);
  if (v.rank == -1 && memory == nullptr) {
    v.sigma_min_lower = least, v.sigma_max_upper = largest;
  } else if (v.rank == -1) {
    examine_matrix<true>(team, t, matrix, exponent, t.atol[b], t.rtol[b], columns, memory, v);
    // in the units of the matrix; rounded outwards where that is inexact
    const double low = ldexp(v.sigma_min_lower, -exponent), high = ldexp(v.sigma_max_upper, -exponent);
    v.sigma_min_lower = fmax(least, low < 0x1p-1022 ? 0.0 : low);
    v.sigma_max_upper = fmin(largest, fmax(high, 0x1p-1022));
  }
  team.sync();  // t.lower and others have been read
  if (team.rank() == 0) store(t, b, v);
}

}  // namespace gcfast
