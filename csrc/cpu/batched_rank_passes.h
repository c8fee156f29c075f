// What the source files of batched_rank share. They are three because each takes the compiler long, once for every
// instruction set: batched_rank.cpp packs matrices into lanes and takes the pass in double, batched_rank_deflated.cpp
// ends that pass where double's Gram was not enough, and batched_rank_doubled.cpp is the pass in double-double.
#pragma once
#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace gcfast::cpu {

// The matrices of a group; their shorter side is n.
template <class T> struct Group {
  const T* base[kLanes];
  int64_t row_stride, column_stride;
  Doubles scale;
};

// Columns a panel: of double it stays in the first cache with the rows of a tile, of double-double it is long enough
// for the sums to be worth their ends.
inline int panel_columns(int padded, bool doubled) {
  return doubled ? ProductSum<Doubles>::kTerms : std::clamp((32 << 10) / (64 * padded), 8, 64);
}

// Vectors of memory that deflate() needs after the panel.
inline int64_t deflation_vectors(int padded, int width) {
  return (2 * static_cast<int64_t>(padded) + 2 + width) * padded;
}

// Columns [k0, k0 + columns) as panel[k * padded + i].
void pack_panel(const Group<float>& g, int n, int padded, int64_t k0, int columns, Doubles* panel);
void pack_panel(const Group<double>& g, int n, int padded, int64_t k0, int columns, Doubles* panel);

// Bounds ranks from above where the tolerance is beyond double's Gram.
template <class T>
void deflate(const Group<T>& g, const Single& e, int64_t m, Doubles* panel, int width, RankBounds* bounds,
             RankVerdict* verdict);

// Decides in double-double what verdicts leave open; `memory` holds as many vectors as vectors_of() says.
template <class T>
void in_double_double(const Group<T>& g, int n, int64_t m, Doubles* memory, const RankOptions* options,
                      RankVerdict* verdict);

}  // namespace gcfast::cpu
