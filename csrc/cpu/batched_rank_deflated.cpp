// The end of batched_rank's pass in double, where the tolerance is beyond its Gram: core/deflation.h for matrices in
// lanes.
#pragma GCC diagnostic ignored "-Wpsabi"  // everything that takes vectors is inlined

#include <algorithm>
#include <cmath>

#include "../core/deflation.h"
#include "batched_rank_passes.h"

namespace gcfast::cpu {
namespace {

// For the lanes that are known to have a rank of at least low[l] (-1: not wanted).
struct Deflation {
  Doubles *t, *leading;     // the rows of T, padded x padded: t'' and t'
  Doubles *unit, *changed;  // how large a row of T may be; 1 where T changes a row, 0 elsewhere
  Doubles* b_leading;       // b', as a panel
  bool *tiles, *whole;      // tiles of rows that change in some lane, and in all: those columns hold only T's ones
  Doubles off;              // the square of the Frobenius norm of A - T B
};

// One function for all who eliminate: the compiler takes seconds for each copy of it.
GCFAST_CLONES void eliminate(const Single& e, const Doubles& shift, const Doubles& least, const Doubles* keep,
                             Pivots<Doubles>& pivots) {
  pivots = e.eliminate(Alone(), shift, least, keep);
}

// T, from the pivots at `shift`; the Gram of the rows that change is cleared.
GCFAST_CLONES void find_combinations(const Single& e, const Doubles& shift, const Doubles& least, const int* low,
                                     Deflation& d) {
  constexpr int R = kTile;
  Pivots<Doubles> pivots;
  eliminate(e, shift, least, nullptr, pivots);
  Bits wanted;
  for (int l = 0; l < kLanes; ++l) wanted[l] = low[l] >= 0 && pivots.positive[l] == low[l] ? -1 : 0;
  Doubles* const stays = d.unit;
  for (int k = 0; k < e.padded; ++k) {
    const Bits kept = k < e.n ? ~wanted | (e.pivot[k] > 0) : Bits{} - 1;
    stays[k] = kept ? Doubles{} + 1.0 : Doubles{};
    d.changed[k] = 1.0 - stays[k];
  }
  Pivots<Doubles> unused;
  eliminate(e, Doubles{}, least, stays, unused);  // without the shift rows are combined as well as double can
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
  Pivots<Doubles> pivots;
  eliminate(e, Doubles{} - loss, Doubles{} + 0x1p-206, nullptr, pivots);
  for (int l = 0; l < kLanes; ++l)
    count[l] = square[l] > 0 && pivots.size[l] <= deflated_size(e.n) ? static_cast<int>(pivots.positive[l]) : -1;
}

GCFAST_CLONES void measure(const Single& e, Doubles& trace, Doubles& quotient) {
  trace = e.trace(Alone());
  quotient = e.rayleigh(Alone(), 1.0 / trace);
}

}  // namespace

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

template void deflate(const Group<float>& g, const Single& e, int64_t m, Doubles* panel, int width, RankBounds* bounds,
                      RankVerdict* verdict);
template void deflate(const Group<double>& g, const Single& e, int64_t m, Doubles* panel, int width,
                      RankBounds* bounds, RankVerdict* verdict);

}  // namespace gcfast::cpu
