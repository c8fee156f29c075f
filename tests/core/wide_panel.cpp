// csrc/core/wide_panel.h: the maps of the column panel producer, and the whole product put together from them as
// cuda/wide_panel.cu does, with the matrix instruction in the host's arithmetic.
#include "../../csrc/core/wide_panel.h"

#include <cmath>
#include <cstdlib>
#include <set>
#include <utility>
#include <vector>

#include "check.h"

using namespace gcfast::wide_panel;

namespace {

void tiles() {
  for (int64_t down : {1, 2, 7})
    for (int64_t across : {1, 7, 8, 9, 16, 19}) {
      std::set<std::pair<int64_t, int64_t>> seen;
      for (int64_t id = 0; id < down * across; ++id) {
        const Tile t = tile_at(id, down, across);
        CHECK(t.row >= 0 && t.row < down && t.col >= 0 && t.col < across, "tile %d of %d x %d", int(id), int(down),
              int(across));
        seen.insert({t.row, t.col});
      }
      CHECK(int64_t(seen.size()) == down * across, "%d x %d: each tile once", int(down), int(across));
    }
}

template <int Pitch> void slots() {
  std::set<int> seen;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < Pitch; ++c) seen.insert(slot<Pitch>(r, c));
  CHECK(int(seen.size()) == kRows * Pitch && *seen.begin() == 0 && *seen.rbegin() == kRows * Pitch - 1, "pitch %d",
        Pitch);
  // 16-byte accesses of a quarter of a warp meet every bank once
  for (int row = 0; row < kRows; row += 8)
    for (int k = 0; k < Pitch; k += kStep)
      for (int quarter = 0; quarter < 4; ++quarter) {
        std::set<int> units;
        for (int lane = 8 * quarter; lane < 8 * quarter + 8; ++lane) {
          const int at = slot<Pitch>(row + lane_row(lane), k + lane_pair(lane));
          CHECK(at % 2 == 0, "an aligned pair");
          units.insert(at / 2 % 8);
        }
        CHECK(units.size() == 8, "banks of row %d, column %d", row, k);
      }
}

// The instruction on fragments by lane: a[lane][r + 2 s] is row lane / 4 + 8 r and k = lane % 4 + 4 s, b alike.
void instruction(double (*c)[4], const double (*a)[4], const double (*b)[2]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4, col = lane % 4 * 2 + e % 2;
      for (int k = 0; k < kStep; ++k)
        c[lane][e] = std::fma(a[row * 4 + k % 4][e / 2 + 2 * (k / 4)], b[col * 4 + k % 4][k / 4], c[lane][e]);
    }
}

std::vector<double> product(const std::vector<double>& z, const std::vector<double>& v, int64_t n, int64_t w,
                            int64_t d) {
  std::vector<double> out(n * w, NAN);
  const int64_t down = (n + kRows - 1) / kRows, across = (w + kCols - 1) / kCols;
  std::vector<double> a(kRows * kDepth), b(kCols * kDepth), acc(kRows * kCols);
  const auto copy = [&](std::vector<double>& to, const std::vector<double>& from, int64_t row, int64_t rows,
                        int64_t k) {
    for (int thread = 0; thread < kThreads; ++thread) {
      const int units = kDepth / 2, col = thread % units * 2, left = inside(k + col, d, 2);
      for (int i = 0; i < kRows; i += kThreads / units) {
        const int r = i + thread / units, valid = row + r < rows ? left : 0;
        for (int e = 0; e < 2; ++e)
          to[slot<kDepth>(r, col) + e] = e < valid ? from.at((row + r) * d + k + col + e) : 0.0;
      }
    }
  };
  for (int64_t id = 0; id < down * across; ++id) {
    const Tile t = tile_at(id, down, across);
    std::vector<double> c(kRows * kCols, 0.0);  // by warp, instruction, lane and element
    for (int64_t k0 = 0; k0 < d; k0 += kDepth) {
      copy(a, z, t.row * kRows, n, k0);
      copy(b, v, t.col * kCols, w, k0);
      for (int warp = 0; warp < kWarps; ++warp)
        for (int k = 0; k < kDepth; k += kStep)
          for (int i = 0; i < kWarpRows / 16; ++i)
            for (int j = 0; j < kWarpCols / 8; ++j) {
              double left[32][4], right[32][2];
              for (int lane = 0; lane < 32; ++lane)
                for (int s = 0; s < 2; ++s) {
                  const int col = k + lane_pair(lane) + s, row = warp_row(warp) + 16 * i + lane_row(lane);
                  left[lane][2 * s] = a[slot<kDepth>(row, col)];
                  left[lane][2 * s + 1] = a[slot<kDepth>(row + 8, col)];
                  right[lane][s] = b[slot<kDepth>(warp_col(warp) + 8 * j + lane_row(lane), col)];
                }
              double* mine = &c[((warp * (kWarpRows / 16) + i) * (kWarpCols / 8) + j) * 128];
              instruction(reinterpret_cast<double (*)[4]>(mine), left, right);
            }
    }
    for (int warp = 0; warp < kWarps; ++warp)
      for (int i = 0; i < kWarpRows / 16; ++i)
        for (int j = 0; j < kWarpCols / 8; ++j)
          for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < 4; ++e) {
              const int row = warp_row(warp) + 16 * i + 8 * (e / 2) + lane_row(lane);
              const int col = warp_col(warp) + 8 * j + lane_pair(lane) + e % 2;
              const int instructions = (warp * (kWarpRows / 16) + i) * (kWarpCols / 8) + j;
              acc[slot<kCols>(row, col)] = c[instructions * 128 + lane * 4 + e];
            }
    for (int thread = 0; thread < kThreads; ++thread) {
      const int col = thread % (kCols / 2) * 2, valid = inside(t.col * kCols + col, w, 2);
      const int rows = inside(t.row * kRows, n, kRows);
      for (int row = thread / (kCols / 2); row < rows; row += kThreads / (kCols / 2))
        for (int e = 0; e < valid; ++e)
          out.at((t.row * kRows + row) * w + t.col * kCols + col + e) = acc[slot<kCols>(row, col) + e];
    }
  }
  return out;
}

// Bit for bit the plain loop over k in the order that the header states, wherever an element lies.
void products() {
  const int order[kStep] = {0, 2, 4, 6, 1, 3, 5, 7};
  const int sizes[][3] = {{1, 1, 1}, {3, 5, 7}, {128, 128, 16}, {129, 130, 17}, {40, 257, 33}, {1, 129, 40}};
  for (const auto& s : sizes) {
    const int n = s[0], w = s[1], d = s[2];
    std::vector<double> z(n * d), v(w * d);
    for (double& x : z) x = std::rand() / double(RAND_MAX) - 0.5;
    for (double& x : v) x = std::rand() / double(RAND_MAX) - 0.5;
    const std::vector<double> out = product(z, v, n, w, d);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < w; ++j) {
        double sum = 0.0;
        for (int step = 0; step < d; step += kStep)
          for (int o : order)
            if (step + o < d) sum = std::fma(z[i * d + step + o], v[j * d + step + o], sum);
        CHECK(out[i * w + j] == sum, "%d x %d, d = %d: element %d, %d: %g for %g", n, w, d, i, j, out[i * w + j], sum);
      }
  }
}

}  // namespace

int main() {
  CHECK(kThreads / kWarps == 32, "the lanes of the instruction");
  tiles();
  slots<kDepth>();
  slots<kCols>();
  products();
  return report();
}
