// The index maps of the float64 column panel producer (cuda/wide_panel.cu): which tile a block takes, where a tile lies
// in shared memory, and which elements a lane of a warp holds for the matrix instruction.
//
// The sum over k of an element runs in one order whatever n, w and its place are: k in steps of kStep, in a step the
// order of the maps below. k is padded with zeros in both operands: terms +0 * +0 leave a sum as it is (a sum that
// starts at +0 is never -0).
#pragma once
#include <cstdint>

#include "macros.h"

namespace gcfast::wide_panel {

constexpr int kRows = 128, kCols = 128;  // of a tile of the panel
constexpr int kDepth = 16;               // of k at once in shared memory: 128 bytes a row
constexpr int kStep = 8;                 // of k in a matrix instruction, or in two
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kWarpRows = 64, kWarpCols = 32, kWarpsAcross = kCols / kWarpCols;
constexpr int kGroup = 8;  // tiles across that are walked together, so that their rows of the weight stay in L2

static_assert(kWarps * kWarpRows * kWarpCols == kRows * kCols, "warps cover the tile");

struct Tile { int64_t row, col; };

// Tile `id` of down * across: groups of kGroup columns of tiles, in each the columns fastest.
GCFAST_HD Tile tile_at(int64_t id, int64_t down, int64_t across) {
  const int64_t first = id / (kGroup * down) * kGroup, within = id % (kGroup * down);
  const int64_t wide = across - first < kGroup ? across - first : kGroup;
  return {within / wide, first + within % wide};
}

// Where an element lies. Units of 16 bytes change places between odd and even rows, by which 8 lanes that read 2 rows
// of 4 units (a fragment), or 1 row of 8, meet 32 different banks.
template <int Pitch> GCFAST_HD int slot(int row, int col) { return row * Pitch + (col ^ ((row & 1) << 3)); }

// What a lane holds. The instruction has k = lane % 4 and k = lane % 4 + 4 of its step; here those are two neighbours
// in memory, one 16-byte load, in both operands alike: an order of the sum, nothing else.
GCFAST_HD int lane_row(int lane) { return lane / 4; }
GCFAST_HD int lane_pair(int lane) { return lane % 4 * 2; }  // first of its two k, and of its two columns of the result
GCFAST_HD int warp_row(int warp) { return warp / kWarpsAcross * kWarpRows; }
GCFAST_HD int warp_col(int warp) { return warp % kWarpsAcross * kWarpCols; }

// Of `width` elements that start at `first`, how many lie before `end`.
GCFAST_HD int inside(int64_t first, int64_t end, int width) {
  return first >= end ? 0 : end - first < width ? static_cast<int>(end - first) : width;
}

}  // namespace gcfast::wide_panel
