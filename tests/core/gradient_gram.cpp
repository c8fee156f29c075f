// csrc/cpu/gradient_gram.cpp on every instruction set, operands in heap blocks of exactly their size, so that a
// sanitizer sees an access beyond them: whole numbers against exact sums, real ones against themselves by more threads.
#ifdef __CUDACC__  // of the CPU alone
int main() { return 0; }
#else
inline int forced_level = -1;
#define GCFAST_LEVEL (forced_level < 0 || forced_level > instruction_level() ? instruction_level() : forced_level)
#include "../../csrc/cpu/gradient_gram.cpp"

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

// g with positions or rows innermost, or samples; a with positions or columns, or samples.
template <class T> struct Factors {
  std::vector<T> g, a;
  GradientFactors<T> view;
  Factors(int64_t n, int64_t c, int64_t t, int64_t r, int64_t s, int layout, bool whole)
      : g(n * c * t * r), a(n * t * s) {
    fill(g, whole), fill(a, whole);
    view = {g.data(), a.data(), n, c, t, 0, 0, 0, 0, 0, 0, 0};
    if (layout == 0) view.g_sample = t * r, view.g_output = n * t * r, view.g_position = r, view.g_row = 1;
    if (layout == 1) view.g_sample = t * r, view.g_output = n * t * r, view.g_position = 1, view.g_row = t;
    if (layout == 2) view.g_sample = 1, view.g_output = n, view.g_position = n * c * r, view.g_row = n * c;
    if (layout == 0) view.a_sample = t * s, view.a_position = s, view.a_column = 1;
    if (layout == 1) view.a_sample = t * s, view.a_position = 1, view.a_column = t;
    if (layout == 2) view.a_sample = 1, view.a_position = n, view.a_column = n * t;
  }
  // All of J, rows (i, c).
  std::vector<T> jacobian(int64_t r, int64_t s) const {
    std::vector<T> j(view.n * view.c * r * s);
    for (int64_t row = 0; row < view.n * view.c; ++row)
      for (int64_t t = 0; t < view.t; ++t) {
        const int64_t i = row / view.c, c = row % view.c;
        for (int64_t e = 0; e < r; ++e)
          for (int64_t f = 0; f < s; ++f)
            j[(row * r + e) * s + f] +=
                g[i * view.g_sample + c * view.g_output + t * view.g_position + e * view.g_row] *
                a[i * view.a_sample + t * view.a_position + f * view.a_column];
      }
    return j;
  }
};

template <class T> struct Problem {
  int64_t rows, columns, r, s;
  Factors<T> x, y;
  std::vector<T> out;
  bool turned;  // out in columns
  Problem(int64_t n, int64_t c, int64_t t, int64_t n2, int64_t c2, int64_t t2, int64_t r, int64_t s, int layout,
          bool whole)
      : rows(n * c), columns(n2 * c2), r(r), s(s), x(n, c, t, r, s, layout % 3, whole),
        y(n2, c2, t2, r, s, layout / 3 % 3, whole), out(rows * columns), turned(layout / 9 % 2) {
    fill(out, whole);
  }
  int64_t place(int64_t i, int64_t j) const { return turned ? j * rows + i : i * columns + j; }
  void run(bool lower, int threads) {
    gradient_gram(GradientGramArgs<T>{out.data(), x.view, lower ? x.view : y.view, r, s, turned ? 1 : columns,
                                      turned ? rows : 1, lower, threads});
  }
};

template <class T> void exact(Problem<T>&& p, bool lower, int threads) {
  const std::vector<T> one = p.x.jacobian(p.r, p.s), two = lower ? one : p.y.jacobian(p.r, p.s);
  const int64_t size = p.r * p.s;
  std::vector<T> want(p.out.size());
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      if (lower && j > i) p.out[p.place(i, j)] = static_cast<T>(NAN);
      T& sum = want[p.place(i, j)] = p.out[p.place(i, j)];
      for (int64_t e = 0; e < size; ++e) sum += one[i * size + e] * two[j * size + e];
    }
  p.run(lower, threads);
  int64_t wrong = 0;
  for (size_t e = 0; e < want.size(); ++e) wrong += std::memcmp(&p.out[e], &want[e], sizeof(T)) != 0;
  CHECK(wrong == 0, "%ld of %ld x %ld, t %ld, r %ld, s %ld, turned %d, lower %d", long(wrong), long(p.rows),
        long(p.columns), long(p.x.view.t), long(p.r), long(p.s), p.turned, lower);
}

// Threads that run groups alone, and those that share one: the same bits.
template <class T> void threads(int64_t n, int64_t c, int64_t t, int64_t r, int64_t s) {
  Problem<T> alone(n, c, t, n, c, t, r, s, 1, false);
  for (const bool lower : {true, false}) {
    Problem<T> one = alone, more = alone, many = alone;
    for (Problem<T>* p : {&one, &more, &many}) {
      p->x.view.g = p->x.g.data(), p->x.view.a = p->x.a.data(), p->y.view.g = p->y.g.data();
      p->y.view.a = p->y.a.data();
    }
    one.run(lower, 1), more.run(lower, 3), many.run(lower, 17);
    const size_t bytes = one.out.size() * sizeof(T);
    CHECK(std::memcmp(one.out.data(), more.out.data(), bytes) == 0, "n %ld c %ld, 3 threads", long(n), long(c));
    CHECK(std::memcmp(one.out.data(), many.out.data(), bytes) == 0, "n %ld c %ld, 17 threads", long(n), long(c));
  }
}

template <class T> void all() {
  int layout = 0;
  for (int64_t n : {1, 5})
    for (int64_t c : {1, 2, 7, 60})
      for (int64_t t : {1, 3, 17})
        for (int64_t r : {1, 9, 17})
          for (int64_t s : {1, 8, 26}) {
            exact<T>({n, c, t, 5 - n % 4, 1 + 3 * c % 11, 1 + t % 4, r, s, layout, true}, false, 1 + layout % 3);
            exact<T>({n, c, t, n, c, t, r, s, layout, true}, true, 1 + layout % 3);
            ++layout;
          }
  for (layout = 0; layout < 18; ++layout) exact<T>({2, 3, 300, 1, 5, 257, 5, 51, layout, true}, false, 2);
  exact<T>({3, 10, 5, 3, 10, 5, 20, 150, 0, true}, true, 3);
  exact<T>({3, 0, 2, 3, 1, 2, 4, 4, 0, true}, false, 1), exact<T>({3, 1, 0, 3, 1, 2, 4, 4, 0, true}, false, 1);
  exact<T>({3, 2, 2, 3, 2, 2, 0, 4, 0, true}, false, 1), exact<T>({3, 2, 2, 3, 2, 2, 4, 0, 0, true}, true, 1);
  threads<T>(5, 7, 20, 40, 60), threads<T>(20, 15, 4, 16, 30);
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
