// Rank of many matrices: eight of them side by side, one in each lane of a vector, so that every step of
// core/inertia.h is a vector operation whatever their size. First in double; what double leaves open, and matrices
// whose squares would over- or underflow, again in double-double. A group's Gram is the only product, from panels of
// columns transposed into lanes; a panel and its tiles stay in the first cache, the Gram (n^2 vectors) in the second.
#pragma GCC diagnostic ignored "-Wpsabi"  // everything that takes vectors is inlined

#include "batched_rank.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../core/deflation.h"
#include "../core/inertia.h"
#include "clones.h"

namespace gcfast {

typedef double Doubles __attribute__((vector_size(64)));

template <> struct Lanes<Doubles> {
  static constexpr int count = 8;
  static GCFAST_HD double get(const Doubles& v, int l) { return v[l]; }
  static GCFAST_HD void set(Doubles& v, int l, double x) { v[l] = x; }
  static GCFAST_HD Doubles fused(const Doubles& a, const Doubles& b, const Doubles& c) {
    Doubles out;
    for (int l = 0; l < count; ++l) out[l] = __builtin_fma(a[l], b[l], c[l]);
    return out;
  }
  static GCFAST_HD Doubles magnitude(const Doubles& a) { return a < 0 ? -a : a; }
  static GCFAST_HD Doubles larger(const Doubles& a, const Doubles& b) { return a < b ? b : a; }
  static GCFAST_HD Doubles smaller(const Doubles& a, const Doubles& b) { return a < b ? a : b; }
  static GCFAST_HD Doubles root(const Doubles& a) {
    Doubles out;
    for (int l = 0; l < count; ++l) out[l] = __builtin_sqrt(a[l]);
    return out;
  }
  static GCFAST_HD Doubles one_if_positive(const Doubles& a) { return a > 0 ? Doubles{} + 1.0 : Doubles{}; }
  static GCFAST_HD Doubles infinite_unless_above(const Doubles& a, const Doubles& least) {
    return a > least ? Doubles{} : Doubles{} + HUGE_VAL;
  }
};

namespace cpu {
namespace {

constexpr int kLanes = Lanes<Doubles>::count;
constexpr int kTile = 4, kDoubledTile = 2, kLargest = 256;
using Doubled = DoubleDouble<Doubles>;
using Single = Elimination<Doubles, kTile>;
using Double = Elimination<Doubled, kDoubledTile>;

// The matrices of a group; their shorter side is n.
template <class T> struct Group {
  const T* base[kLanes];
  int64_t row_stride, column_stride;
  Doubles scale;
};

template <class T>
__attribute__((always_inline)) inline void load8(const T* p, Doubles& v) {
  for (int k = 0; k < kLanes; ++k) v[k] = static_cast<double>(p[k]);
}

__attribute__((always_inline)) inline void transpose8(Doubles* v) {
  typedef int64_t Mask __attribute__((vector_size(64)));
  Doubles t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shuffle(v[i], v[i + 1], Mask{0, 8, 2, 10, 4, 12, 6, 14});
    t[i + 1] = __builtin_shuffle(v[i], v[i + 1], Mask{1, 9, 3, 11, 5, 13, 7, 15});
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + j] = __builtin_shuffle(t[i + j], t[i + j + 2], Mask{0, 1, 8, 9, 4, 5, 12, 13});
      v[i + j + 2] = __builtin_shuffle(t[i + j], t[i + j + 2], Mask{2, 3, 10, 11, 6, 7, 14, 15});
    }
  for (int j = 0; j < 4; ++j) {
    t[j] = __builtin_shuffle(v[j], v[j + 4], Mask{0, 1, 2, 3, 8, 9, 10, 11});
    t[j + 4] = __builtin_shuffle(v[j], v[j + 4], Mask{4, 5, 6, 7, 12, 13, 14, 15});
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

// Columns [k0, k0 + columns) as panel[k * padded + i].
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

GCFAST_CLONES void pack_panel(const Group<float>& g, int n, int padded, int64_t k0, int columns, Doubles* panel) {
  pack(g, n, padded, k0, columns, panel);
}
GCFAST_CLONES void pack_panel(const Group<double>& g, int n, int padded, int64_t k0, int columns, Doubles* panel) {
  pack(g, n, padded, k0, columns, panel);
}

// norms += the squares of the panel's rows
GCFAST_CLONES void add_squares(const Doubles* panel, int columns, int padded, Doubles* norms) {
  for (int k = 0; k < columns; ++k)
    for (int i = 0; i < padded; ++i) norms[i] += panel[k * padded + i] * panel[k * padded + i];
}
// From squares of norms to the powers of two above the norms; returns the sum of their squares.
GCFAST_CLONES void to_units(Doubles* norms, int padded, Doubles& spread) {
  typedef int64_t Bits __attribute__((vector_size(64)));
  spread = Doubles{};
  for (int i = 0; i < padded; ++i) {
    const Doubles raised = norms[i] * (1 + 0x1p-20);  // above the sum, whatever way 2^33 columns were rounded
    const Bits exponent = ((Bits)raised >> 52) - 1023;  // squares are positive
    norms[i] = (Doubles)((((exponent + 2) >> 1) + 1023) << 52);
    spread += norms[i] * norms[i];
  }
}

// A tile of G += the panel's part, or = for the first one. Columns in panels that the first cache holds.
__attribute__((always_inline)) inline void add_tile(const Single& e, const Doubles* panel, int columns, bool first,
                                                    int i0, int j0) {
  constexpr int R = kTile;
  Doubles x[R][R];
  GCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    GCFAST_UNROLL
    for (int c = 0; c < R; ++c) x[r][c] = first || i0 + r < j0 + c ? Doubles{} : e.gram(i0 + r, j0 + c);
  }
  for (int k = 0; k < columns; ++k) {
    const Doubles* row = panel + k * e.padded;
    GCFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      GCFAST_UNROLL
      for (int c = 0; c < R; ++c) x[r][c] += row[i0 + r] * row[j0 + c];
    }
  }
  GCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    GCFAST_UNROLL
    for (int c = 0; c < R; ++c)
      if (i0 + r >= j0 + c) e.gram(i0 + r, j0 + c) = x[r][c];
  }
}
GCFAST_CLONES void add_panel(const Single& e, const Doubles* panel, int columns, bool first) {
  for (int j0 = 0; j0 < e.padded; j0 += kTile)
    for (int i0 = j0; i0 < e.padded; i0 += kTile) add_tile(e, panel, columns, first, i0, j0);
}
// The same in double-double: rows are scaled to norms of at most 1 first, by 2^-k, and `unit` is 2^k.
GCFAST_CLONES void add_panel(const Double& e, Doubles* panel, int columns, bool first, const Doubles* unit) {
  constexpr int R = kDoubledTile;
  for (int i = 0; i < e.padded; ++i) {
    const Doubles scale = 1.0 / unit[i];
    for (int k = 0; k < columns; ++k) panel[k * e.padded + i] *= scale;
  }
  for (int j0 = 0; j0 < e.padded; j0 += R)
    for (int i0 = j0; i0 < e.padded; i0 += R) {
      ProductSum<Doubles> x[R][R];
      for (int k = 0; k < columns; ++k) {
        const Doubles* row = panel + k * e.padded;
        GCFAST_UNROLL
        for (int r = 0; r < R; ++r) {
          GCFAST_UNROLL
          for (int c = 0; c < R; ++c) x[r][c].add(row[i0 + r], row[j0 + c]);
        }
      }
      GCFAST_UNROLL
      for (int r = 0; r < R; ++r) {
        GCFAST_UNROLL
        for (int c = 0; c < R; ++c) {
          if (i0 + r < j0 + c) continue;
          const Doubles scale = unit[i0 + r] * unit[j0 + c];
          const Doubled v = x[r][c].value(), scaled{v.hi * scale, v.lo * scale};
          Doubled& g = e.gram(i0 + r, j0 + c);
          g = first ? scaled : sum(g, scaled);
        }
      }
    }
}

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

// core/deflation.h for the lanes that are known to have a rank of at least low[l] (-1: not wanted).
struct Deflation {
  Doubles *t, *leading;     // the rows of T, padded x padded: t'' and t'
  Doubles *unit, *changed;  // how large a row of T may be; 1 where T changes a row, 0 elsewhere
  Doubles* b_leading;       // b', as a panel
  bool *tiles, *whole;      // tiles of rows that change in some lane, and in all: those columns hold only T's ones
  Doubles off;              // the square of the Frobenius norm of A - T B
};

int64_t deflation_vectors(int padded, int width) { return (2 * static_cast<int64_t>(padded) + 2 + width) * padded; }

// T, from the pivots at `shift`; the Gram of the rows that change is cleared.
GCFAST_CLONES void find_combinations(const Single& e, const Doubles& shift, const Doubles& least, const int* low,
                                     Deflation& d) {
  typedef int64_t Bits __attribute__((vector_size(64)));
  constexpr int R = kTile;
  const Pivots<Doubles> pivots = e.eliminate(Alone(), shift, least);
  Bits wanted;
  for (int l = 0; l < kLanes; ++l) wanted[l] = low[l] >= 0 && pivots.positive[l] == low[l] ? -1 : 0;
  Doubles* const stays = d.unit;
  for (int k = 0; k < e.padded; ++k) {
    const Bits kept = k < e.n ? ~wanted | (e.pivot[k] > 0) : Bits{} - 1;
    stays[k] = kept ? Doubles{} + 1.0 : Doubles{};
    d.changed[k] = 1.0 - stays[k];
  }
  e.eliminate(Alone(), Doubles{}, least, stays);  // without the shift rows are combined as well as double can
  // lanes that are left out may hold anything
  for (int i = 1; i < e.padded; ++i)
    for (int k = 0; k < i; ++k) e.at(i, k) = wanted ? e.at(i, k) : Doubles{};
  e.invert(Alone());
  d.off = Doubles{};
  for (int i = 0; i < e.padded; ++i) {
    const Doubles changed = d.changed[i];
    bool any = false, all = true;
    for (int l = 0; l < kLanes; ++l) any = any || changed[l] != 0, all = all && changed[l] != 0;
    d.tiles[i / R] = (i % R ? d.tiles[i / R] : false) || any;
    d.whole[i / R] = (i % R ? d.whole[i / R] : true) && all;
    Doubles largest = Doubles{} + 1.0;
    for (int k = 0; k < e.padded; ++k) {
      const Doubles t = k < i ? (changed != 0 ? e.at(i, k) : Doubles{}) : k == i ? Doubles{} + 1.0 : Doubles{};
      d.t[i * e.padded + k] = t;
      largest = Lanes<Doubles>::larger(largest, Lanes<Doubles>::magnitude(t));
    }
    const Bits exponent = ((Bits)largest >> 52) + 1;
    d.unit[i] = (Doubles)(exponent << 52);
    for (int k = 0; k < e.padded; ++k) {
      Doubles &t = d.t[i * e.padded + k], &leading = d.leading[i * e.padded + k];
      leading = leading_bits(t, d.unit[i]);
      t -= leading;
    }
  }
  for (int i = 0; i < e.padded; ++i)
    for (int j = 0; j <= i; ++j)
      if (d.tiles[i / R] || d.tiles[j / R]) e.gram(i, j) = Doubles{};
}

// B's panel becomes A's, the Gram of the changed rows grows by it, and `off` by what A - T B may be.
GCFAST_CLONES void add_deflated(const Single& e, Doubles* panel, int columns, Deflation& d) {
  typedef int64_t Bits __attribute__((vector_size(64)));
  constexpr int R = kTile, C = 2;
  static_assert(R == DeflatedSum<Doubles>::kTerms);
  Doubles largest{};
  for (int k = 0; k < columns * e.padded; ++k)
    largest = Lanes<Doubles>::larger(largest, Lanes<Doubles>::magnitude(panel[k]));
  const Doubles unit = (Doubles)((((Bits)largest >> 52) + 1) << 52);
  for (int k = 0; k < columns * e.padded; ++k) d.b_leading[k] = leading_bits(panel[k], unit);
  const Doubles error = unit * deflated_error(e.n);
  for (int i0 = 0; i0 < e.padded; i0 += R) {
    if (!d.tiles[i0 / R]) continue;
    for (int c0 = 0; c0 < columns; c0 += C) {
      const int count = std::min(C, columns - c0);
      const Doubles* b[C];
      const Doubles* b1[C];
      for (int c = 0; c < C; ++c) {
        const int column = c0 + std::min(c, count - 1);
        b[c] = panel + column * e.padded;
        b1[c] = d.b_leading + column * e.padded;
      }
      DeflatedSum<Doubles> x[R][C];
      for (int k0 = 0; k0 <= i0; k0 += R) {
        if (d.whole[k0 / R] && k0 != i0) continue;
        GCFAST_UNROLL
        for (int k = k0; k < k0 + R; ++k) {
          GCFAST_UNROLL
          for (int c = 0; c < C; ++c) {
            const Doubles b_rest = b[c][k] - b1[c][k];
            GCFAST_UNROLL
            for (int r = 0; r < R; ++r)
              x[r][c].add(d.leading[(i0 + r) * e.padded + k], d.t[(i0 + r) * e.padded + k], b[c][k], b1[c][k], b_rest);
          }
        }
        GCFAST_UNROLL
        for (int r = 0; r < R; ++r) {
          GCFAST_UNROLL
          for (int c = 0; c < C; ++c) x[r][c].end();
        }
      }
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < count; ++c) {
          const Doubles a = x[r][c].value(), bound = error * d.unit[i0 + r];
          panel[(c0 + c) * e.padded + i0 + r] = a;
          d.off += d.changed[i0 + r] * (bound * bound + a * a * 0x1.01p-106);
        }
    }
  }
  for (int j0 = 0; j0 < e.padded; j0 += R)
    for (int i0 = j0; i0 < e.padded; i0 += R)
      if (d.tiles[i0 / R] || d.tiles[j0 / R]) add_tile(e, panel, columns, false, i0, j0);
}

// Scales and shifts, and counts: the positive pivots, -1 for a lane whose bound does not hold.
GCFAST_CLONES void count_deflated(const Single& e, int64_t m, const double* tolerance, const Deflation& d, int* count) {
  constexpr int R = kTile;
  Doubles square;  // t
  for (int l = 0; l < kLanes; ++l) {
    // ||A - T B||, an underflow of each of its entries included; (x + y)^2 <= 2 x^2 + 2 y^2 for its two errors
    const double off = std::sqrt(2 * d.off[l] + static_cast<double>(e.n) * m * 0x1p-900);
    const double left = tolerance[l] - 1.001 * off;
    square[l] = left > 0 ? left * left * (1 - 1e-14) : 0;
  }
  for (int k = 0; k < e.padded * e.padded; ++k) d.t[k] += d.leading[k];  // the parts of T together again, exactly
  // M = A A^T - t T T^T; rows of T that are not changed are those of the identity
  for (int j0 = 0; j0 < e.padded; j0 += R)
    for (int i0 = j0; i0 < e.padded; i0 += R) {
      Doubles tt[R][R] = {};
      if (d.tiles[i0 / R] && d.tiles[j0 / R]) {
        for (int k0 = 0; k0 <= j0; k0 += R) {
          if (d.whole[k0 / R] && k0 != j0) continue;
          for (int k = k0; k < k0 + R; ++k) {
            GCFAST_UNROLL
            for (int r = 0; r < R; ++r) {
              GCFAST_UNROLL
              for (int c = 0; c < R; ++c) tt[r][c] += d.t[(i0 + r) * e.padded + k] * d.t[(j0 + c) * e.padded + k];
            }
          }
        }
      } else {
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < R; ++c)
            tt[r][c] = d.tiles[i0 / R] ? d.t[(i0 + r) * e.padded + j0 + c] : Doubles{} + (i0 + r == j0 + c ? 1.0 : 0.0);
      }
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < R; ++c) {
          if (i0 + r < j0 + c || i0 + r >= e.n) continue;
          Doubles& g = e.gram(i0 + r, j0 + c);
          const Doubles part = square * tt[r][c];
          if (i0 + r == j0 + c) d.unit[i0 + r] = g + part;  // from here on the unit of the row of M
          g = g - part;
        }
    }
  Doubles spread;
  to_units(d.unit, e.n, spread);
  for (int i = 0; i < e.n; ++i)
    for (int j = 0; j <= i; ++j) e.gram(i, j) *= (1.0 / d.unit[i]) * (1.0 / d.unit[j]);
  const double loss = deflated_loss(e.n, m);
  const Pivots<Doubles> pivots = e.eliminate(Alone(), Doubles{} - loss, Doubles{} + 0x1p-206);
  for (int l = 0; l < kLanes; ++l)
    count[l] = square[l] > 0 && pivots.size[l] <= deflated_size(e.n) ? static_cast<int>(pivots.positive[l]) : -1;
}

// Columns a panel: of double it stays in the first cache with the rows of a tile, of double-double it is long enough
// for the sums to be worth their ends.
int panel_columns(int padded, bool doubled) {
  return doubled ? ProductSum<Doubles>::kTerms : std::clamp((64 << 10) / (64 * padded), 8, 64);
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
  double tolerance[kLanes];
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

}  // namespace cpu
}  // namespace gcfast
