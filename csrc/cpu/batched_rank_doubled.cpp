// The pass of batched_rank in double-double, over what the one in double leaves open.
#pragma GCC diagnostic ignored "-Wpsabi"  // everything that takes vectors is inlined

#include <algorithm>

#include "batched_rank_passes.h"

namespace gcfast::cpu {
namespace {

// norms += the squares of the panel's rows
GCFAST_CLONES void add_squares(const Doubles* panel, int columns, int padded, Doubles* norms) {
  for (int k = 0; k < columns; ++k)
    for (int i = 0; i < padded; ++i) norms[i] += panel[k * padded + i] * panel[k * padded + i];
}

// G += the panel's part, or = for the first one. Rows are scaled to norms of at most 1 first, by 2^-k, and `unit` is
// 2^k.
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

GCFAST_CLONES void examine(const Double& e, int64_t m, const Doubles& error, const RankOptions* options,
                           RankVerdict* verdict) {
  RankBounds bounds[kLanes];
  e.examine(Alone(), m, error, options, bounds, verdict);
}

}  // namespace

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

template void in_double_double(const Group<float>& g, int n, int64_t m, Doubles* memory, const RankOptions* options,
                               RankVerdict* verdict);
template void in_double_double(const Group<double>& g, int n, int64_t m, Doubles* memory, const RankOptions* options,
                               RankVerdict* verdict);

}  // namespace gcfast::cpu
