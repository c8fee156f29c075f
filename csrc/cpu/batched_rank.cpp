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

#include "deflation.h"
#include "lanes.h"

namespace gcfast::cpu {
namespace {

GCFAST_CLONES void examine(const Single& e, int64_t m, const RankOptions* options, RankBounds* bounds,
                           RankVerdict* verdict) {
  const Doubles trace = e.trace(Alone());
  Doubles error;
  for (int l = 0; l < kLanes; ++l) error[l] = gram_error_double(m, trace[l]);
  e.examine(Alone(), m, error, options, bounds, verdict);
}
GCFAST_CLONES void measure(const Single& e, Doubles& trace, Doubles& quotient) {
  trace = e.trace(Alone());
  quotient = e.rayleigh(Alone(), 1.0 / trace);
}
GCFAST_CLONES void examine(const Double& e, int64_t m, const Doubles& error, const RankOptions* options,
                           RankVerdict* verdict) {
  RankBounds bounds[kLanes];
  e.examine(Alone(), m, error, options, bounds, verdict);
}

// Columns a panel: of double it stays in the first cache with the rows of a tile, of double-double it is long enough
// for the sums to be worth their ends.
int panel_columns(int padded, bool doubled) {
  return doubled ? ProductSum<Doubles>::kTerms : std::clamp((32 << 10) / (64 * padded), 8, 64);
}

// Vectors of memory that a group needs.
int64_t vectors_of(int n, bool doubled) {
  const int64_t padded = doubled ? Double::padded_size(n) : Single::padded_size(n);
  const int width = panel_columns(static_cast<int>(padded), doubled);
  const int64_t panel = padded * (width + 1);
  return panel + (doubled ? 2 * Double::numbers(n) : Single::numbers(n) + deflation_vectors(padded, width));
}

// Bounds ranks from above where the tolerance is beyond double's Gram.
template <class T>
void deflate(const Group<T>& g, const Single& e, int64_t m, Doubles* panel, int width, RankBounds* bounds,
             RankVerdict* verdict) {
  int low[kLanes], count[kLanes];
  double tolerance[kLanes] = {};
  bool tiles[kLargest / kTile], whole[kLargest / kTile], any = false;
  for (int l = 0; l < kLanes; ++l) any = any || verdict[l].rank < 0;
  if (!any) return;
  any = false;
  Doubles traces, quotient;
  measure(e, traces, quotient);
  Doubles shift = traces;
  const Doubles least = traces * 0x1p-206;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = -1;
    if (verdict[l].rank >= 0 || !(verdict[l].sigma_max_upper < HUGE_VAL) || !(verdict[l].lower > 0)) continue;
    bounds[l].rayleigh(quotient[l]);
    if (bounds[l].resolves()) continue;
    tolerance[l] = bounds[l].least_tolerance();
    shift[l] = bounds[l].shift_above();
    low[l] = static_cast<int>(verdict[l].lower);
    any = true;
  }
  if (!any) return;
  Deflation d;
  d.t = panel + static_cast<int64_t>(width) * e.padded;
  d.leading = d.t + static_cast<int64_t>(e.padded) * e.padded;
  d.unit = d.leading + static_cast<int64_t>(e.padded) * e.padded;
  d.changed = d.unit + e.padded;
  d.b_leading = d.changed + e.padded;
  d.tiles = tiles;
  d.whole = whole;
  find_combinations(e, shift, least, low, d);
  for (int64_t k0 = 0; k0 < m; k0 += width) {
    const int columns = static_cast<int>(std::min<int64_t>(width, m - k0));
    pack_panel(g, e.n, e.padded, k0, columns, panel);
    add_deflated(e, panel, columns, d);
  }
  count_deflated(e, m, tolerance, d, count);
  for (int l = 0; l < kLanes; ++l)
    if (low[l] >= 0 && count[l] == low[l]) verdict[l].rank = verdict[l].upper = low[l];
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

template <class T>
void in_double_double(const Group<T>& g, int n, int64_t m, Doubles* memory, const RankOptions* options,
                      RankVerdict* verdict) {
  const Double e(n, reinterpret_cast<Doubled*>(memory));
  Doubles *unit = memory + 2 * Double::numbers(n), *panel = unit + e.padded, spread;
  const int width = panel_columns(e.padded, true);
  std::fill_n(unit, e.padded, Doubles{});
  for (int64_t k0 = 0; k0 < m; k0 += width) {
    const int columns = static_cast<int>(std::min<int64_t>(width, m - k0));
    pack_panel(g, n, e.padded, k0, columns, panel);
    add_squares(panel, columns, e.padded, unit);
  }
  to_units(unit, e.padded, spread);
  for (int64_t k0 = 0; k0 < m; k0 += width) {
    const int columns = static_cast<int>(std::min<int64_t>(width, m - k0));
    if (m > width) pack_panel(g, n, e.padded, k0, columns, panel);
    add_panel(e, panel, columns, k0 == 0, unit);
  }
  Doubles error;
  for (int l = 0; l < kLanes; ++l) error[l] = gram_error_doubled(m, (m + width - 1) / width, spread[l]);
  examine(e, m, error, options, verdict);
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
  return Task<T>{a, {}, {}}.run();
}

}  // namespace

int64_t batched_rank(const BatchedRankArgs<float>& a) { return run(a); }
int64_t batched_rank(const BatchedRankArgs<double>& a) { return run(a); }

}  // namespace gcfast::cpu
