// Eight matrices side by side, one in each lane of a vector: the lanes, how matrices get into them, and their Grams.
// For one source file to include, with vectors in its functions' arguments only where they are inlined (-Wpsabi).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../core/inertia.h"
#include "clones.h"

namespace gcfast {

typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Bits __attribute__((vector_size(64)));
#if defined(__clang__)
#define GCFAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GCFAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

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

}  // namespace
}  // namespace cpu
}  // namespace gcfast
