// csrc/cpu/jacobian_gram.cpp on every instruction set, operands in heap blocks of exactly their size, so that a
// sanitizer sees an access beyond them: whole numbers against exact sums, real ones against themselves in pieces.
#ifdef __CUDACC__  // of the CPU alone
int main() { return 0; }
#else
inline int forced_level = -1;
#define GCFAST_LEVEL (forced_level < 0 || forced_level > instruction_level() ? instruction_level() : forced_level)
#include "../../csrc/cpu/jacobian_gram.cpp"

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"

using namespace gcfast::cpu;

namespace {

uint32_t state = 1;
double uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<double>(state >> 8) / (1 << 23) - 1.0;
}

template <class T> void fill(std::vector<T>& x, bool whole) {
  for (T& v : x) v = static_cast<T>(whole ? std::floor(4 * uniform()) : uniform());
}

// (n, c, t, width), samples, outputs or positions outermost.
template <class T> struct Factor {
  int64_t n, c, t, width;
  std::vector<T> data;
  JacobianFactor<T> view;
  Factor(int64_t n, int64_t c, int64_t t, int64_t width, int order, bool whole)
      : n(n), c(c), t(t), width(width), data(n * c * t * width) {
    fill(data, whole);
    view = {data.data(), n, c, t, 0, 0, 0};
    if (order == 0) view.sample = c * t * width, view.output = t * width, view.position = width;
    if (order == 1) view.output = n * t * width, view.sample = t * width, view.position = width;
    if (order == 2) view.position = n * c * width, view.sample = c * width, view.output = width;
  }
  T at(int64_t row, int64_t position, int64_t o) const {
    return data[row / c * view.sample + row % c * view.output + position * view.position + o];
  }
};

template <class T> struct Problem {
  Factor<T> g, h;
  std::vector<int64_t> ends;
  std::vector<T> scale, out;
  int64_t rows, columns;
  bool turned;  // out in columns
  Problem(int64_t n, int64_t c, int64_t t, int64_t n2, int64_t c2, int64_t t2, std::vector<int64_t> layers, int layout,
          bool whole)
      : g(n, c, t, layers.back(), layout % 3, whole), h(n2, c2, t2, layers.back(), layout / 3 % 3, whole),
        ends(layers), scale(layers.size() * n * t * n2 * t2), out(n * c * n2 * c2), rows(n * c), columns(n2 * c2),
        turned(layout / 9 % 2) {
    fill(scale, whole), fill(out, whole);
  }
  T& at(int64_t i, int64_t j) { return out[turned ? j * rows + i : i * columns + j]; }
  void run(bool lower, int threads) {
    const int64_t r = g.n * g.t, c = h.n * h.t;
    jacobian_gram(JacobianGramArgs<T>{out.data(), g.view, h.view, scale.data(), ends.data(), int64_t(ends.size()),
                                      turned ? 1 : columns, turned ? rows : 1, r * c, c, 1, lower, threads});
  }
};

template <class T> void exact(Problem<T> x, bool lower, int threads) {
  const T nan = static_cast<T>(NAN);
  std::vector<T> want(x.out.size());
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < x.columns; ++j) {
      if (lower && j > i) x.at(i, j) = nan;
      T& sum = want[i * x.columns + j] = x.at(i, j);
      for (size_t l = 0; l < x.ends.size(); ++l)
        for (int64_t t = 0; t < x.g.t; ++t)
          for (int64_t s = 0; s < x.h.t; ++s) {
            const int64_t row = (l * x.g.n + i / x.g.c) * x.g.t + t, column = j / x.h.c * x.h.t + s;
            const T scale = x.scale[row * x.h.n * x.h.t + column];
            for (int64_t o = l ? x.ends[l - 1] : 0; o < x.ends[l]; ++o)
              sum += scale * x.g.at(i, t, o) * x.h.at(j, s, o);
          }
    }
  x.run(lower, threads);
  int64_t wrong = 0;
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < x.columns; ++j)
      wrong += std::memcmp(&x.at(i, j), &want[i * x.columns + j], sizeof(T)) != 0;
  CHECK(wrong == 0, "%ld of %ld x %ld, t %ld and %ld, turned %d, lower %d", long(wrong), long(x.rows), long(x.columns),
        long(x.g.t), long(x.h.t), x.turned, lower);
}

// The last sample's rows alone, by one thread, and all by three: the same bits.
template <class T> void pieces(int64_t n, int64_t c, int64_t t) {
  Problem<T> all(n, c, t, n, c, t, {40, 97}, 0, false), one = all;
  all.run(false, 3);
  one.g.view.x = one.g.data.data() + (n - 1) * one.g.view.sample, one.h.view.x = one.h.data.data();
  const int64_t width = n * t;
  jacobian_gram(JacobianGramArgs<T>{one.out.data() + (n - 1) * c * one.columns, {one.g.view.x, 1, c, t, 0, t * 97, 97},
                                    one.h.view, one.scale.data() + (n - 1) * t * width, one.ends.data(), 2,
                                    one.columns, 1, width * width, width, 1, false, 1});
  const size_t from = (n - 1) * c * one.columns, bytes = c * one.columns * sizeof(T);
  CHECK(std::memcmp(&all.out[from], &one.out[from], bytes) == 0, "n %ld c %ld t %ld alone", long(n), long(c), long(t));
}

template <class T> void all() {
  int layout = 0;
  for (int64_t n : {1, 5})
    for (int64_t c : {1, 2, 7, 20})
      for (int64_t t : {1, 3, 9})
        for (const std::vector<int64_t>& ends : {std::vector<int64_t>{1}, {5, 5, 22}, {16, 33}}) {
          exact<T>({n, c, t, 5 - n % 4, 1 + 3 * c % 11, 1 + t % 4, ends, layout, true}, false, 1 + layout % 3);
          exact<T>({n, c, t, n, c, t, ends, layout, true}, true, 1 + layout % 3);
          ++layout;
        }
  exact<T>({70, 3, 1, 70, 3, 1, {20}, 0, true}, true, 3), exact<T>({2, 2, 1, 2, 2, 1, {600, 610}, 0, true}, false, 1);
  exact<T>({3, 0, 2, 3, 1, 2, {4}, 0, true}, false, 1), exact<T>({3, 1, 0, 3, 1, 2, {4}, 0, true}, false, 1);
  exact<T>({3, 2, 2, 3, 2, 2, {0}, 0, true}, false, 1);
  pieces<T>(30, 5, 1), pieces<T>(4, 3, 11);
}

}  // namespace

int main() {
  for (int l : {-1, 0, 3}) {
    forced_level = l;
    all<float>(), all<double>();
  }
  return report();
}
#endif
