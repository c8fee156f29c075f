// The Gram of gradients in one weight, by blocks of its parameters. A block of J is made sample by sample, put into
// lanes (a lane is a row of J) and multiplied by itself while it lies in cache: J is never stored.
// Blocks are dealt to groups, whose number the sizes fix. A group has sums of its own, which are added up in order at
// the end, so that a thread runs a group alone; where sums are so large that few groups can have them, all threads
// share the rows of J and the columns of out of one group at a time.
#include "gradient_gram.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "clones.h"
#include "cut.h"

#ifndef GCFAST_LEVEL
#define GCFAST_LEVEL instruction_level()  // a test runs all of them on one processor
#endif

namespace gcfast::cpu {
namespace {

// Of a block of J. Beyond a second-level cache it is read fast enough, and larger blocks pack their factors less often.
constexpr int64_t kBlockBytes = 3 * (int64_t{1} << 19);
constexpr int64_t kLeast = 128;                    // parameters of a block, at least
constexpr int64_t kPositions = 256;                // packed at a time, at most
constexpr int64_t kInner = 128;                    // parameters that a product sums up in registers
constexpr int64_t kGroups = 16;                    // at most
constexpr int64_t kSumBytes = int64_t{1} << 26;    // of all groups
constexpr int64_t kSide = 4096;                    // of out at a time: beyond, J is made anew

// Some outputs' gradients of one sample in a block of parameters, from packed factors.
template <class T> struct Gradients {
  const T* g;
  const T* a;
  int64_t outputs, rows, columns, k;
  T* out;      // an output's after `ld`, in rows without gaps
  int64_t ld;
  bool add;  // to what is there
};

// Two blocks of J in lanes, and the sums that their products are added to: N columns of all rows after N columns.
template <class T> struct Products {
  const T* a;
  const T* b;
  int64_t rows, columns, k, inner;
  T* sums;
  int64_t padded_rows;
  bool lower;
};

// What an instruction set provides.
template <class T> struct Tiles {
  void (*pack_rows)(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, T* out);
  void (*pack_columns)(const T* x, int64_t count, int64_t lane, int64_t stride, int64_t k, T* out);
  void (*gradients)(const Gradients<T>&);
  void (*into_lanes)(const T* x, int64_t ld, int64_t first, int64_t count, int64_t k, T* lanes);
  void (*products)(const Products<T>&, int64_t j);
  int64_t rows, columns, lanes;  // of which packed rows and columns, and rows of J, are multiples
};

#define GCFAST_TILES "gradient_gram_tiles.h"
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

// The size of as few and as even pieces as `most` allows, a multiple of `step` but for the whole.
int64_t even(int64_t size, int64_t most, int64_t step) {
  return std::min(size, padded(blocks(size, blocks(size, most)), step));
}

// Blocks of the weight.
struct Blocks {
  int64_t rows, columns, across, count;
  template <class T>
  Blocks(const GradientGramArgs<T>& p, const Tiles<T>& f, int64_t lanes) {
    const int64_t most = std::max(kLeast, kBlockBytes / (lanes * static_cast<int64_t>(sizeof(T))));
    // Packing costs 1 / columns + 1 / (c rows) of the products.
    const double c = static_cast<double>(std::min(p.x.c, f.lanes));
    const int64_t best = std::llround(std::sqrt(static_cast<double>(most) / c) / static_cast<double>(f.rows)) * f.rows;
    rows = std::min(p.r, std::max(f.rows, best));
    columns = even(p.s, std::max(f.columns, most / rows / f.rows * f.rows), f.rows);
    if (columns == p.s) rows = std::max(rows, most / columns / f.rows * f.rows);
    rows = even(p.r, rows, f.rows);
    across = blocks(p.s, columns), count = across * blocks(p.r, rows);
  }
};

struct Block { int64_t r, s, rows, columns; };

template <class T> struct Workspace {
  T *g, *a, *rows;
  const T* packed;  // what a was packed from, and how many positions
  int64_t positions;
};

// A block of rows [first, first + count) of J, `origin` the first of the lanes, into their lanes.
template <class T>
void make_lanes(const Tiles<T>& f, const GradientFactors<T>& x, const Block& b, int64_t origin, int64_t first,
                int64_t count, Workspace<T>& w, T* lanes) {
  const int64_t k = b.rows * b.columns, ld = padded(k, 64 / sizeof(T)) + 64 / sizeof(T);  // rows in different sets
  const int64_t step = blocks(x.t, blocks(x.t, kPositions));
  for (int64_t row = 0; row < count;) {
    const int64_t i = (origin + first + row) / x.c, c = (origin + first + row) % x.c;
    const int64_t outputs = std::min(x.c - c, count - row);
    for (int64_t t = 0; t < x.t; t += step) {
      const int64_t positions = std::min(step, x.t - t);
      const T* a = x.a + i * x.a_sample + t * x.a_position + b.s * x.a_column;
      const T* g = x.g + i * x.g_sample + c * x.g_output + t * x.g_position + b.r * x.g_row;
      if (a != w.packed || positions != w.positions)
        f.pack_columns(a, b.columns, x.a_column, x.a_position, positions, w.a);
      w.packed = a, w.positions = positions;
      for (int64_t e = 0; e < outputs; ++e)
        f.pack_rows(g + e * x.g_output, b.rows, x.g_row, x.g_position, positions,
                    w.g + e * padded(b.rows, f.rows) * positions);
      f.gradients(Gradients<T>{w.g, w.a, outputs, b.rows, b.columns, positions, w.rows + row * ld, ld, t > 0});
    }
    row += outputs;
  }
  f.into_lanes(w.rows, ld, first, count, k, lanes);
}

// out += the sums of all groups, of which one has `each`.
template <class T>
void add(const T* sums, int64_t groups, int64_t each, int64_t n, int64_t padded_rows, int64_t rows, int64_t columns,
         T* out, int64_t out_rows, int64_t out_columns, bool lower) {
  const bool down = out_rows == 1 && out_columns != 1;
  for (int64_t j0 = 0; j0 < columns; j0 += n) {
    const int64_t here = std::min(n, columns - j0);
    for (int64_t outer = 0; outer < (down ? here : rows); ++outer)
      for (int64_t inner = 0; inner < (down ? rows : here); ++inner) {
        const int64_t i = down ? inner : outer, j = down ? outer : inner;
        if (lower && j0 + j > i) continue;
        const T* from = sums + j0 * padded_rows + i * n + j;
        T sum = *from;
        for (int64_t q = 1; q < groups; ++q) sum += from[q * each];
        out[i * out_rows + (j0 + j) * out_columns] += sum;
      }
  }
}

// Rows [i0, i1) and columns [j0, j1) of out.
template <class T>
void run(const GradientGramArgs<T>& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, bool lower) {
  const Tiles<T>& f = tiles<T>();
  const int64_t rows = i1 - i0, columns = j1 - j0, row_lanes = padded(rows, f.lanes);
  const int64_t column_lanes = lower ? 0 : padded(columns, f.lanes);
  const Blocks cut(p, f, rows + (lower ? 0 : columns));
  const int64_t padded_rows = padded(rows, f.rows), each = padded_rows * padded(columns, f.columns);
  const int64_t fit = std::max<int64_t>(1, std::min(kGroups, kSumBytes / (each * static_cast<int64_t>(sizeof(T)))));
  const int64_t groups = blocks(cut.count, blocks(cut.count, fit));  // of as many blocks each as can be
  const int64_t strips = (row_lanes + column_lanes) / f.lanes;

  // A team costs as much as some hundred thousand products.
  const double positions = static_cast<double>(p.x.t) * static_cast<double>(rows) +
                           (lower ? 0.0 : static_cast<double>(p.y.t) * static_cast<double>(columns));
  const double products = static_cast<double>(p.r) * static_cast<double>(p.s) *
                          (positions + static_cast<double>(rows) * static_cast<double>(columns) / (lower ? 2 : 1));
  const int team = static_cast<int>(std::max(1.0, std::min<double>(p.threads, products / (1 << 19))));
  const bool apart = groups >= team || strips < team;
  const int outer = apart ? static_cast<int>(std::min<int64_t>(team, groups)) : 1, inner = apart ? 1 : team;

  const int64_t line = 64 / sizeof(T), size = cut.rows * cut.columns, outputs = std::max(p.x.c, p.y.c);
  const int64_t most = std::min(kPositions, std::max(p.x.t, p.y.t));
  const int64_t g_size = padded(std::min(outputs, f.lanes) * padded(cut.rows, f.rows) * most, line);
  const int64_t a_size = padded(padded(cut.columns, f.columns) * most, line);
  const int64_t own = g_size + a_size + f.lanes * (padded(size, line) + line);
  const int64_t lanes_size = (row_lanes + column_lanes) * size;
  const Scratch<T> scratch(own * std::max(outer, inner)), all_lanes(padded(lanes_size, line) * outer);
  const Scratch<T> sums(each * groups);

#pragma omp parallel for schedule(dynamic, 1) num_threads(outer) if (outer > 1)
  for (int64_t group = 0; group < groups; ++group) {
    T* total = sums.get() + each * group;
    std::fill(total, total + each, T(0));
    const int outer_thread = omp_get_thread_num();
    T* lanes = all_lanes.get() + padded(lanes_size, line) * (outer > 1 ? outer_thread : 0);
    for (int64_t q = cut.count * group / groups; q < cut.count * (group + 1) / groups; ++q) {
      Block b{q / cut.across * cut.rows, q % cut.across * cut.columns, 0, 0};
      b.rows = std::min(cut.rows, p.r - b.r), b.columns = std::min(cut.columns, p.s - b.s);
      const int64_t k = b.rows * b.columns;
      T* other = lower ? lanes : lanes + row_lanes * k;
#pragma omp parallel num_threads(inner) if (inner > 1)
      {
        T* g = scratch.get() + own * (inner > 1 ? omp_get_thread_num() : outer > 1 ? outer_thread : 0);
        Workspace<T> w{g, g + g_size, g + g_size + a_size, nullptr, 0};
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips; ++strip) {
          const bool of_rows = strip < row_lanes / f.lanes;
          const int64_t first = (of_rows ? strip : strip - row_lanes / f.lanes) * f.lanes;
          const int64_t count = std::min(f.lanes, (of_rows ? rows : columns) - first);
          if (first == 0) w.packed = nullptr;
          make_lanes(f, of_rows ? p.x : p.y, b, of_rows ? i0 : j0, first, count, w, of_rows ? lanes : other);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < columns; j += f.columns)
          f.products(Products<T>{lanes, other, rows, columns, k, kInner, total, padded_rows, lower}, j);
      }
    }
  }
  add(sums.get(), groups, each, f.columns, padded_rows, rows, columns, p.out + i0 * p.out_rows + j0 * p.out_columns,
      p.out_rows, p.out_columns, lower);
}

template <class T> void run(const GradientGramArgs<T>& p) {
  const int64_t r = p.x.n * p.x.c, c = p.y.n * p.y.c;
  if (r == 0 || c == 0 || p.r == 0 || p.s == 0 || p.x.t == 0 || p.y.t == 0) return;
  for (int64_t i = 0; i < r; i += kSide)
    for (int64_t j = 0; j < (p.lower ? i + 1 : c); j += kSide)
      run(p, i, std::min(r, i + kSide), j, std::min(c, j + kSide), p.lower && i == j);
}

}  // namespace

void gradient_gram(const GradientGramArgs<float>& a) { run(a); }
void gradient_gram(const GradientGramArgs<double>& a) { run(a); }

}  // namespace gcfast::cpu
