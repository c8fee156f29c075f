// Eight matrices side by side, one in each lane of a vector: the lanes, and steps that more than one source file of
// batched_rank takes. Vectors are arguments by value only where a function is inlined (-Wpsabi).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../core/inertia.h"
#include "clones.h"

namespace gcfast {

typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Bits __attribute__((vector_size(64)));

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

constexpr int kLanes = Lanes<Doubles>::count;
constexpr int kTile = 4, kDoubledTile = 2, kLargest = 256;
using Doubled = DoubleDouble<Doubles>;
using Single = Elimination<Doubles, kTile>;
using Double = Elimination<Doubled, kDoubledTile>;

namespace {

// From squares of norms to the powers of two above the norms; returns the sum of their squares.
[[maybe_unused]] GCFAST_CLONES void to_units(Doubles* norms, int padded, Doubles& spread) {
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

}  // namespace
}  // namespace cpu
}  // namespace gcfast
