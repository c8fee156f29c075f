// The Gram of a Jacobian, layer by layer. A task is a block of out and has a tile of sums in the second-level cache;
// what is packed at a time are columns of one layer for a few positions of both factors, as add_product packs slices.
// A micro-kernel's sums are multiplied by their scales where they are added to the tile: neither the factors' Gram nor
// its product with the scales is stored, and out is touched once.
#include "jacobian_gram.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "clones.h"
#include "cut.h"

#ifndef GCFAST_LEVEL
#define GCFAST_LEVEL instruction_level()  // a test runs all of them on one processor
#endif

namespace gcfast::cpu {
namespace {

constexpr int64_t kInner = 256;                    // of a layer at a time, at most
constexpr int64_t kPositions = 8;                  // packed at a time, at most: whatever out's size, for its bits
constexpr int64_t kRowBytes = int64_t{1} << 19;    // packed, of g: half of a second-level cache
constexpr int64_t kColumnBytes = int64_t{1} << 20;  // and of h
constexpr int64_t kTasks = 2;                      // a thread, at least

// Packed rows and columns for some positions, their scales, and the sums that their products are added to.
template <class T> struct Positions {
  const T* a;
  const T* b;
  int64_t rows, columns, k, t, s, a_next, b_next;  // positions t and s, a_next and b_next apart
  const T* scale;                                  // of the first row and column
  int64_t scale_row, scale_column, scale_t, scale_s;  // from sample to sample, from position to position
  int64_t samples;                                 // of the rows
  const int64_t* at;                               // of a row: where its sample's scales are spread
  int64_t column, outputs;                         // the first column in its sample, columns of a sample
  T* spread;
  T* sums;  // N columns of all rows after N columns
  int64_t padded_rows;
  bool lower;
  int64_t above;  // the first row less the first column
};

// What an instruction set provides.
template <class T> struct Tiles {
  void (*pack_rows)(const T* x, const int64_t* at, int64_t count, int64_t k, T* out);
  void (*pack_columns)(const T* x, const int64_t* at, int64_t count, int64_t k, T* out);
  void (*multiply)(const Positions<T>&);
  void (*add)(const Positions<T>&, T* out, int64_t out_rows, int64_t out_columns);
  int64_t rows, columns;  // of which packed rows and columns are multiples
};

#define GCFAST_TILES "jacobian_gram_tiles.h"
#include "each_instruction_set.h"
#undef GCFAST_TILES

template <class T> const Tiles<T>& tiles() {
#if defined(GCFAST_X86)
  const int level = GCFAST_LEVEL;
  if (level == 4) return *v4::tiles<T>();
  if (level == 3) return *v3::tiles<T>();
#endif
  return *baseline::tiles<T>();
}

// Where the rows of a factor begin.
template <class T> std::vector<int64_t> places(const JacobianFactor<T>& f) {
  std::vector<int64_t> at(f.n * f.c);
  for (int64_t i = 0; i < f.n; ++i)
    for (int64_t c = 0; c < f.c; ++c) at[i * f.c + c] = i * f.sample + c * f.output;
  return at;
}

// The size of as few and as even pieces as `most` allows.
int64_t even(int64_t size, int64_t most) { return size == 0 ? 0 : blocks(size, blocks(size, most)); }

template <class T> void run(const JacobianGramArgs<T>& p) {
  const int64_t r = p.g.n * p.g.c, c = p.h.n * p.h.c, width = p.layers ? p.ends[p.layers - 1] : 0;
  if (r == 0 || c == 0 || width == 0 || p.g.t == 0 || p.h.t == 0) return;
  const Tiles<T>& f = tiles<T>();
  int64_t inner = 0;
  for (int64_t l = 0, begin = 0; l < p.layers; begin = p.ends[l++])
    inner = std::max(inner, even(p.ends[l] - begin, kInner));
  const int64_t t_step = even(p.g.t, kPositions), s_step = even(p.h.t, kPositions);
  // A team costs as much as some hundred thousand products.
  const double products = static_cast<double>(r) * static_cast<double>(c) * static_cast<double>(width) *
                          static_cast<double>(p.g.t) * static_cast<double>(p.h.t);
  const int team = static_cast<int>(std::max(1.0, std::min<double>(p.threads, products / (1 << 19))));
  const int64_t bytes = inner * static_cast<int64_t>(sizeof(T));
  const Cut cut({r, f.rows, kRowBytes / (bytes * t_step), blocks(8, t_step)},
                {c, f.columns, kColumnBytes / (bytes * s_step), blocks(4, s_step)},
                team == 1 ? 1 : team * kTasks * (p.lower ? 2 : 1));
  const int64_t tasks = cut.row_blocks * cut.column_blocks;
  const int threads = static_cast<int>(std::min<int64_t>(team, tasks));

  const std::vector<int64_t> g_at = places(p.g), h_at = places(p.h);
  std::vector<int64_t> spread_at(padded(r, f.rows) + f.rows, (p.g.n - 1) * f.columns);
  for (int64_t i = 0; i < r; ++i) spread_at[i] = i / p.g.c * f.columns;
  // A row that pads a tile reads scales, too, and a vector of them may be written beyond the last sample's.
  const int64_t line = 64 / sizeof(T), samples = std::min(p.g.n, (cut.rows - 1) / p.g.c + 2) + f.rows;
  const int64_t a_size = cut.rows * t_step * inner, b_size = padded(cut.columns * s_step * inner, line);
  const int64_t each = a_size + b_size + cut.rows * cut.columns + samples * f.columns;
  const Scratch<T> scratch(padded(each, line) * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    int64_t i0 = task / cut.column_blocks * cut.rows, j0 = task % cut.column_blocks * cut.columns;
    int64_t i1 = std::min(r, i0 + cut.rows), j1 = std::min(c, j0 + cut.columns);
    if (p.lower) i0 = std::max(i0, j0), j1 = std::min(j1, i1);
    if (i0 >= i1 || j0 >= j1) continue;
    T* a = scratch.get() + padded(each, line) * omp_get_thread_num();
    T *b = a + a_size, *sums = b + b_size, *spread = sums + cut.rows * cut.columns;
    const int64_t i = i0 / p.g.c, j = j0 / p.h.c, rows = padded(i1 - i0, f.rows);
    Positions<T> x{};
    x.a = a, x.b = b, x.rows = i1 - i0, x.columns = j1 - j0, x.padded_rows = rows;
    x.scale_row = p.g.t * p.scale_rows, x.scale_column = p.h.t * p.scale_columns;
    x.scale_t = p.scale_rows, x.scale_s = p.scale_columns;
    x.samples = (i1 - 1) / p.g.c - i + 1, x.at = spread_at.data() + i0, x.spread = spread;
    x.column = j0 % p.h.c, x.outputs = p.h.c, x.sums = sums, x.lower = p.lower, x.above = i0 - j0;
    std::fill(sums, sums + rows * padded(j1 - j0, f.columns), T(0));
    for (int64_t l = 0, begin = 0; l < p.layers; begin = p.ends[l++])
      for (int64_t k0 = begin, step = even(p.ends[l] - begin, kInner); k0 < p.ends[l]; k0 += step) {
        x.k = std::min(step, p.ends[l] - k0);
        x.a_next = rows * x.k, x.b_next = padded(j1 - j0, f.columns) * x.k;
        for (int64_t s0 = 0; s0 < p.h.t; s0 += s_step) {
          x.s = std::min(s_step, p.h.t - s0);
          for (int64_t s = 0; s < x.s; ++s)
            f.pack_columns(p.h.x + (s0 + s) * p.h.position + k0, h_at.data() + j0, j1 - j0, x.k, b + s * x.b_next);
          for (int64_t t0 = 0; t0 < p.g.t; t0 += t_step) {
            x.t = std::min(t_step, p.g.t - t0);
            for (int64_t t = 0; t < x.t; ++t)
              f.pack_rows(p.g.x + (t0 + t) * p.g.position + k0, g_at.data() + i0, i1 - i0, x.k, a + t * x.a_next);
            x.scale = p.scale + l * p.scale_layers + (i * p.g.t + t0) * p.scale_rows + (j * p.h.t + s0) * p.scale_columns;
            f.multiply(x);
          }
        }
      }
    f.add(x, p.out + i0 * p.out_rows + j0 * p.out_columns, p.out_rows, p.out_columns);
  }
}

}  // namespace

void jacobian_gram(const JacobianGramArgs<float>& a) { run(a); }
void jacobian_gram(const JacobianGramArgs<double>& a) { run(a); }

}  // namespace gcfast::cpu
