// csrc/core/double_double.h, deflation.h, inertia.h and rank_team.h: errors as their comments state them, in
// arithmetic of 113 bits; inertia against exact counts; and what a GPU's team runs, by threads in its place. With
// --threads, only the last (for a thread sanitizer).
#include "../../csrc/core/inertia.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/core/deflation.h"
#include "../../csrc/core/rank_team.h"
#include "check.h"
#include "team.h"

using namespace gcfast;

#if defined(__CUDACC__)  // the device's side is compiled only; the rest is not for it: 113 bits, threads

namespace {

struct OneThread {
  static GCFAST_HD int rank() { return 0; }
  static GCFAST_HD int size() { return 1; }
  static GCFAST_HD void sync() {}
  static GCFAST_HD double sum(double v) { return v; }
  static GCFAST_HD double largest(double v) { return v; }
};
template <class T> __global__ void on_device(RankTask<T> task, void* memory) {
  if (!rank_in_double(OneThread(), task, 0, 4, memory)) rank_in_double_double(OneThread(), task, 0, 4, memory);
}
template __global__ void on_device<float>(RankTask<float>, void*);
template __global__ void on_device<double>(RankTask<double>, void*);

}  // namespace

int main() { return 0; }

#else

namespace {

#if defined(__SIZEOF_FLOAT128__)
using Quad = __float128;
constexpr bool kHasQuad = true;
#else
using Quad = long double;
constexpr bool kHasQuad = LDBL_MANT_DIG >= 113;
#endif
using Pair = DoubleDouble<double>;
constexpr double kUnit = 0x1p-53, kSlack = 1.02;  // of the 113 bits, and second-order terms

Quad magnitude(Quad x) { return x < 0 ? -x : x; }
Quad wide(double x) { return x; }
Quad wide(const Pair& x) { return Quad(x.hi) + Quad(x.lo); }

struct Random {
  uint64_t state = 88172645463325252ull;
  uint64_t next() {  // xorshift
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  }
  int below(int n) { return static_cast<int>((next() >> 20) % static_cast<uint64_t>(n)); }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53 * 2 - 1; }  // [-1, 1)
  double wide(int exponents) { return std::ldexp(unit(), below(2 * exponents + 1) - exponents); }
  // of few bits or of many, so that ties and zeros occur
  double hostile(int exponents) {
    switch (below(6)) {
      case 0: return 0;
      case 1: return std::ldexp(1.0, below(2 * exponents + 1) - exponents);
      case 2: return std::ldexp(below(9) - 4, below(7) - 53);
      case 3: return std::nextafter(std::ldexp(1.0, below(5)), below(2) ? 0.0 : 100.0);
      default: return wide(exponents);
    }
  }
  Pair pair(int exponents) {
    const double hi = hostile(exponents);
    const double lo = std::fabs(hi) * kUnit * (below(4) ? std::ldexp(unit(), -below(40)) * 0.99 : 0.0);
    return fast_two_sum(hi, lo);
  }
};

// Whether |got - want| <= bound u^2, but for the rounding of `want`.
template <class W> bool within(const Pair& got, W want, W bound) {
  return magnitude(wide(got) - want) <= bound * W(kUnit) * W(kUnit) * W(kSlack);
}
bool normal(const Pair& x) { return std::fabs(x.lo) <= kUnit * std::fabs(x.hi); }

void double_double() {
  using Op = Arithmetic<Pair>;
  Random random;
  for (int trial = 0; trial < 300000; ++trial) {
    const int exponents = trial % 3 == 0 ? 25 : trial % 3 == 1 ? 3 : 0;
    const double x = random.hostile(exponents), y = random.hostile(exponents);
    const Pair exact = two_sum(x, y);
    CHECK(wide(exact) == Quad(x) + Quad(y) && exact.hi == x + y, "%a + %a", x, y);
    const Pair quick = std::fabs(x) < std::fabs(y) ? fast_two_sum(y, x) : fast_two_sum(x, y);
    CHECK(quick.hi == exact.hi && quick.lo == exact.lo, "%a + %a", x, y);
    const Pair product = two_product(x, y);
    CHECK(wide(product) == Quad(x) * Quad(y), "%a %a", x, y);

    const Pair a = random.pair(exponents), b = random.pair(exponents);
    const Quad ab = wide(a) * wide(b);
    const Pair p = Op::product(a, b);
    CHECK(within(p, ab, 6 * magnitude(ab)) && normal(p), "%a %a times %a %a", a.hi, a.lo, b.hi, b.lo);
    Pair s = random.pair(exponents);
    if (trial % 4 == 1) s = p;  // all cancels but the error
    if (trial % 4 == 2) s = {a.hi * b.hi, 0};
    if (trial % 4 == 3) s = fast_two_sum(p.hi * (1 + std::ldexp(random.unit(), -random.below(60))), p.lo);
    const Quad left = wide(s) - ab;
    const Pair d = Op::sub_product(s, a, b);
    CHECK(within(d, left, magnitude(wide(s)) + 2 * magnitude(left) + 12 * magnitude(ab)) && normal(d),
          "%a %a - %a %a times %a %a", s.hi, s.lo, a.hi, a.lo, b.hi, b.lo);
    const Pair e = Op::difference(a, y);
    CHECK(within(e, wide(a) - Quad(y), magnitude(wide(a)) + magnitude(wide(a) - Quad(y))), "%a %a - %a", a.hi, a.lo, y);
    const Pair both = sum(a, b);
    CHECK(within(both, wide(a) + wide(b), 3 * (magnitude(wide(a)) + magnitude(wide(b)))) && normal(both),
          "%a %a + %a %a", a.hi, a.lo, b.hi, b.lo);
    const Pair negative = sum(a, Pair{-a.hi, std::ldexp(a.lo, -random.below(3))});
    CHECK(normal(negative), "%a %a", a.hi, a.lo);
    if (a.hi != 0) {
      const Pair r = Op::reciprocal(a);
      const Quad want = 1 / wide(a);
      CHECK(within(r, want, 9 * magnitude(want)) && normal(r), "1 / (%a %a)", a.hi, a.lo);
    }
  }
}

void product_sums() {
  Random random;
  for (int trial = 0; trial < 20000; ++trial) {
    const int terms = 1 + random.below(ProductSum<double>::kTerms);
    std::vector<double> a(terms), b(terms);
    for (auto* v : {&a, &b}) {
      const int exponents = random.below(3) * 30;
      double square = 0;
      for (double& x : *v) {
        x = random.below(5) ? random.wide(exponents) : random.hostile(3);
        square += x * x;
      }
      // norms from a little below 1 down; some vectors are one large entry among small ones
      const double scale = (1 - 0x1p-50) / std::sqrt(square > 0 ? square : 1);
      for (double& x : *v) x *= random.below(8) ? scale : scale / 4;
    }
    if (trial % 5 == 0) b = a;
    if (trial % 5 == 1)
      for (int k = 0; k < terms; ++k) b[k] = k % 2 ? -a[k] : a[k];
    ProductSum<double> x;
    Quad want = 0;
    for (int k = 0; k < terms; ++k) {
      x.add(a[k], b[k]);
      want += Quad(a[k]) * Quad(b[k]);
    }
    CHECK(within(x.value(), want, Quad(terms) + 2) && normal(x.value()), "%d terms, trial %d", terms, trial);
  }
}

// What the proof takes from an elimination.
void deflated_sums() {
  Random random;
  const auto unit_of = [](const std::vector<double>& v) {
    double largest = 0;
    for (double x : v) largest = std::max(largest, std::fabs(x));
    return std::ldexp(1.0, largest > 0 ? std::ilogb(largest) + 1 : 0);
  };
  for (int trial = 0; trial < 20000; ++trial) {
    const int n = 4 * (1 + random.below(trial % 50 ? 20 : 64)), exponents = random.below(3) * 12;
    std::vector<double> t(n), b(n);
    Quad want = 0, exact = 0, part = 0;
    for (int k = 0; k < n; ++k) {
      t[k] = trial % 4 ? random.wide(exponents) : 1 - random.below(3) * 0x1p-53;
      b[k] = trial % 4 ? random.hostile(exponents) : random.unit();
      if (trial % 3 == 0 && k == n - 1) {  // nearly all cancels
        t[k] = 1;
        b[k] = -static_cast<double>(want);
      }
      want += Quad(t[k]) * Quad(b[k]);
    }
    const double t_unit = unit_of(t), b_unit = unit_of(b);
    DeflatedSum<double> x;
    for (int k = 0; k < n; ++k) {
      const double t_lead = leading_bits(t[k], t_unit), b_lead = leading_bits(b[k], b_unit);
      x.add(t_lead, t[k] - t_lead, b[k], b_lead, b[k] - b_lead);
      if (k % 4 == 3) x.end();
      exact += Quad(t_lead) * Quad(b_lead);
      part += Quad(t[k]) * Quad(b[k]) - Quad(t_lead) * Quad(b_lead);
    }
    CHECK(Quad(x.whole) == exact, "n = %d, trial %d", n, trial);
    const Quad bound = Quad(deflated_error(n)) * Quad(t_unit) * Quad(b_unit);
    CHECK(magnitude(Quad(x.rest) - part) <= bound, "n = %d, trial %d", n, trial);
    CHECK(magnitude(Quad(x.value()) - want) <= bound * Quad(kSlack) + Quad(kUnit) * magnitude(Quad(x.value())),
          "n = %d, trial %d", n, trial);
  }
}

template <class Num, int R, int Own> struct Case {
  using Memory = Elimination<Num, R, Own>;
  std::vector<Num> store;
  Memory e;
  explicit Case(int n) : store(Memory::numbers(n)), e(n, store.data()) {
    for (Num& x : store) x = Arithmetic<Num>::of(std::numeric_limits<double>::quiet_NaN());
    for (int i = 0; i < e.padded; ++i)
      for (int j = 0; j <= i; ++j) e.gram(i, j) = Arithmetic<Num>::of(0.0);
  }
  Quad lower(int i, int j) const { return i == j ? Quad(1) : wide(e.at(i, j)); }
  // the largest of |L D L^T - (G - s I)| over what it may be
  double backward_error(double shift) const {
    const bool doubled = sizeof(Num) > sizeof(double);
    const double unit = doubled ? kUnit * kUnit : kUnit;
    const double step = 1.01 * unit * (doubled ? 3 * e.n + 40 : e.n + 6);
    Quad worst = 0;
    for (int i = 0; i < e.n; ++i)
      for (int j = 0; j <= i; ++j) {
        Quad product = 0, size = 0;
        for (int k = 0; k <= j; ++k) {
          const Quad term = lower(i, k) * wide(e.pivot[k]) * lower(j, k);
          product += term, size += magnitude(term);
        }
        const Quad m = wide(e.gram(i, j)) - (i == j ? Quad(shift) : Quad(0));
        Quad allowed = size * Quad(step);
        if (i == j) allowed += (magnitude(m) + magnitude(wide(e.gram(i, i)))) * Quad(unit);
        const Quad off = magnitude(product - m);
        if (off > 0 && off > worst * allowed) worst = off / allowed;
      }
    return static_cast<double>(worst);
  }
};

template <class Num, int R, int Own> void backward_errors() {
  Random random;
  for (int n : {1, 2, 3, 4, 5, 7, 8, 9, 12, 17, 24, 33})
    for (int trial = 0; trial < 6; ++trial) {
      Case<Num, R, Own> c(n);
      const int m = n + random.below(4);
      std::vector<double> b(static_cast<size_t>(n) * m);
      for (double& x : b) x = trial < 3 ? random.below(17) - 8 : random.wide(6);
      if (trial == 2 && n > 1) std::copy_n(b.begin(), m, b.begin() + (n - 1) * m);
      double trace = 0;
      for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j) {
          Pair s{0, 0};
          for (int k = 0; k < m; ++k) s = sum(s, two_product(b[i * m + k], b[j * m + k]));
          c.e.gram(i, j) = sizeof(Num) > sizeof(double) ? [&] { Num v; std::memcpy(&v, &s, sizeof v); return v; }()
                                                        : Arithmetic<Num>::of(s.hi);
          if (i == j) trace += s.hi;
        }
      const double shift = trace * (trial % 3 == 0 ? 1e-9 : trial % 3 == 1 ? 0.3 / n : 2.0);
      const Pivots<double> pivots = c.e.eliminate(Alone(), shift, 0.0);
      const double off = c.backward_error(shift);
      CHECK(off <= 1, "n %d, trial %d, %zu bytes, tile %d x %d: %g of the bound", n, trial, sizeof(Num), R, Own, off);
      for (int k = n; k < c.e.padded; ++k) CHECK(wide(c.e.pivot[k]) == 1, "n %d: padding is of the identity", n);
      Quad size = 0, square = 0;
      int positive = 0;
      for (int k = 0; k < n; ++k) {
        positive += wide(c.e.pivot[k]) > 0;
        for (int i = k; i < n; ++i) {
          size += magnitude(wide(c.e.pivot[k])) * c.lower(i, k) * c.lower(i, k);
          square += c.lower(i, k) * c.lower(i, k);
        }
      }
      CHECK(pivots.positive == positive, "%g and %d", pivots.positive, positive);
      CHECK(std::fabs(pivots.size / static_cast<double>(size) - 1) < 1e-13, "%g", pivots.size);
      CHECK(std::fabs(pivots.square / static_cast<double>(square) - 1) < 1e-13, "%g", pivots.square);
      if (trial % 3 == 2) CHECK(positive == 0, "%d of %d above twice the trace", positive, n);
      if (positive < n) continue;
      // ||L Y - I|| and the bounds of Y's norms
      std::vector<Quad> l(static_cast<size_t>(n) * n, 0);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j) l[i * n + j] = c.lower(i, j);
      c.e.invert(Alone());
      const auto inverse = c.e.inverse_norms(Alone());
      Quad off_identity = 0, own_square = 0, scaled = 0;
      for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j) {
          Quad s = i == j ? -1 : 0, terms = 0;
          for (int k = j; k <= i; ++k) {
            s += l[i * n + k] * c.lower(k, j);
            terms += magnitude(l[i * n + k] * c.lower(k, j));
          }
          const Quad allowed = terms * Quad(1.01 * kUnit * (n + 3));
          if (magnitude(s) > 0 && magnitude(s) > off_identity * allowed) off_identity = magnitude(s) / allowed;
          own_square += c.lower(i, j) * c.lower(i, j);
          scaled += c.lower(i, j) * c.lower(i, j) / wide(c.e.pivot[i]);
        }
      CHECK(off_identity <= 1, "n %d, trial %d: %g", n, trial, static_cast<double>(off_identity));
      CHECK(std::fabs(inverse.square / static_cast<double>(own_square) - 1) < 1e-12, "%g", inverse.square);
      CHECK(inverse.scaled_square <= static_cast<double>(scaled) * (1 + 1e-12), "%g", inverse.scaled_square);
      // ||D^(-1/2) Y||_2^2 from below, by power steps
      std::vector<Quad> v(n, 1), y(n);
      Quad quotient = 0;
      for (int step = 0; step < 60; ++step) {
        Quad vv = 0, yy = 0;
        for (int j = 0; j < n; ++j) vv += v[j] * v[j];
        for (int i = 0; i < n; ++i) {
          y[i] = 0;
          for (int j = 0; j <= i; ++j) y[i] += c.lower(i, j) * v[j];
          yy += y[i] * y[i] / wide(c.e.pivot[i]);
        }
        quotient = yy / vv;
        for (int j = 0; j < n; ++j) {
          v[j] = 0;
          for (int i = j; i < n; ++i) v[j] += c.lower(i, j) * y[i] / (wide(c.e.pivot[i]) * quotient);
        }
      }
      CHECK(inverse.scaled_square >= static_cast<double>(quotient) * (1 - 1e-12), "n %d, trial %d: %g, not %g", n,
            trial, inverse.scaled_square, static_cast<double>(quotient));
    }
}

#if defined(__SIZEOF_INT128__)
// The number of positive eigenvalues of an integer matrix from the signs of its leading minors (Jacobi), by
// fraction-free elimination; -1 where one is zero.
int exactly_positive(std::vector<__int128> a, int n) {
  __int128 former = 1;
  int positive = 0;
  for (int k = 0; k < n; ++k) {
    const __int128 minor = a[k * n + k];
    if (minor == 0) return -1;
    positive += (minor > 0) == (former > 0);
    for (int i = k + 1; i < n; ++i)
      for (int j = k + 1; j < n; ++j) a[i * n + j] = (a[i * n + j] * minor - a[i * n + k] * a[k * n + j]) / former;
    former = minor;
  }
  return positive;
}

template <class Num, int R, int Own> void exact_counts() {
  Random random;
  int told = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const int n = 1 + random.below(7);
    Case<Num, R, Own> c(n);
    std::vector<__int128> a(static_cast<size_t>(n) * n);
    const int shift = random.below(12);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j <= i; ++j) {
        const int g = random.below(13) - 6 + (i == j ? 6 : 0);
        c.e.gram(i, j) = Arithmetic<Num>::of(static_cast<double>(g));
        a[i * n + j] = a[j * n + i] = g - (i == j ? shift : 0);
      }
    const int want = exactly_positive(a, n);
    if (want < 0) continue;
    const Pivots<double> pivots = c.e.eliminate(Alone(), shift, 0.0);
    // No eigenvalue is nearer than |det| / norm^(n - 1) to the shift.
    const double unit = sizeof(Num) > sizeof(double) ? kUnit * kUnit : kUnit;
    if (pivots.size * unit * (3 * n + 40) > std::pow(24.0 * n, 1 - n)) continue;
    ++told;
    CHECK(pivots.positive == want, "n %d, trial %d: %g and not %d", n, trial, pivots.positive, want);
  }
  CHECK(told > 2000, "%d matrices told", told);
}
#endif

// 2 - 2 cos(k pi / (n + 1)), k = 1 .. n
template <class Num, int R, int Own> void known_eigenvalues() {
  for (int n : {1, 2, 5, 16, 33, 60}) {
    const double pi = 3.14159265358979323846;
    for (int above = 0; above <= n; ++above) {
      Case<Num, R, Own> c(n);
      for (int i = 0; i < n; ++i) {
        c.e.gram(i, i) = Arithmetic<Num>::of(2.0);
        if (i > 0) c.e.gram(i, i - 1) = Arithmetic<Num>::of(-1.0);
      }
      const double shift = 2 - 2 * std::cos((n - above + 0.5) * pi / (n + 1));
      CHECK(c.e.eliminate(Alone(), shift, 0.0).positive == above, "n %d, %d above", n, above);
    }
  }
}

void roots() {
  CHECK(exponent_above_root(1) >= 0 && power_of_two(exponent_above_root(1)) <= 2, "%d", exponent_above_root(1));
  for (double x : {0x1p-1022, 1e-300, 0.24999999, 0.25, 0.9999999999, 1.0, 3.9, 4.0, 1e300}) {
    const double root = std::sqrt(x), above = power_of_two(exponent_above_root(x));
    CHECK(above >= root && above <= 2 * root * (1 + 1e-5), "%g above the root of %g", above, x);
  }
}

// Matrices in the layouts that a caller may have, and the task of a launch.
template <class T> struct Batch {
  int64_t batch, n, m, batch_stride = 0, row_stride = 0, column_stride = 0;
  std::vector<T> store;
  std::vector<double> atol, rtol, least, largest;
  std::vector<int64_t> rank, lower, upper;

  Batch(int64_t batch_, int64_t n_, int64_t m_, const std::string& layout)
      : batch(batch_), n(n_), m(m_), atol(batch), rtol(batch), least(batch, -7), largest(batch, -7), rank(batch, -7),
        lower(batch, -7), upper(batch, -7) {
    if (layout == "rows") row_stride = m, column_stride = 1, batch_stride = n * m;
    if (layout == "columns") row_stride = 1, column_stride = n, batch_stride = n * m;
    if (layout == "gaps") row_stride = 2 * m + 3, column_stride = 2, batch_stride = n * row_stride + 1;
    if (layout == "batch last") row_stride = m * batch, column_stride = batch, batch_stride = 1;
    if (layout == "one column") row_stride = 1, column_stride = 0, batch_stride = n;
    store.resize((batch - 1) * batch_stride + (n - 1) * row_stride + (m - 1) * column_stride + 1);
    std::fill(rtol.begin(), rtol.end(), static_cast<double>(m) * std::numeric_limits<T>::epsilon());
  }
  T& at(int64_t b, int64_t i, int64_t k) { return store[b * batch_stride + i * row_stride + k * column_stride]; }
  RankTask<T> task() {
    return {store.data(), batch, m, batch_stride, row_stride, column_stride, atol.data(), rtol.data(), rank.data(),
            lower.data(), upper.data(), least.data(), largest.data(), static_cast<int>(n)};
  }
  // Both passes; which of the matrices went on to the second.
  template <class Team> std::vector<char> both(const Team& team, double* single, Pair* doubled, int columns) {
    std::vector<char> open(batch);
    const RankTask<T> t = task();
    for (int64_t b = 0; b < batch; ++b) {
      open[b] = !rank_in_double(team, t, b, columns, single);
      team.sync();
      if (open[b]) rank_in_double_double(team, t, b, columns, doubled);
      team.sync();
    }
    return open;
  }
  std::vector<char> by(int threads, int columns) {
    // exactly the bytes that a launch would ask for: a sanitizer sees what lies beyond
    std::vector<double> single(team_bytes<false>(static_cast<int>(n), columns) / 8);
    std::vector<Pair> doubled(team_bytes<true>(static_cast<int>(n), columns) / 16);
    std::vector<char> open;
    if (threads == 0) return both(Alone(), single.data(), doubled.data(), columns);
    with_team(threads, [&](const ThreadTeam& team) {
      const std::vector<char> mine = both(team, single.data(), doubled.data(), columns);
      if (team.rank() == 0) open = mine;
    });
    return open;
  }
};

// Fills a batch: full rank, a row twice, rank about half, ill-conditioned, zero, tiny, huge, with a NaN; the rank of
// each is `want`, or -2.
template <class T> std::vector<int64_t> fill(Batch<T>& batch, Random& random) {
  std::vector<int64_t> want(batch.batch);
  const int64_t n = batch.n, m = batch.m;
  for (int64_t b = 0; b < batch.batch; ++b) {
    const int kind = static_cast<int>(b % 8);
    const int64_t half = (n + 1) / 2;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < m; ++k) batch.at(b, i, k) = static_cast<T>(random.below(15) - 7 + (i == k ? 40 : 0));
    want[b] = batch.column_stride == 0 ? 1 : n;
    if (kind == 1 && n > 1) {
      for (int64_t k = 0; k < m; ++k) batch.at(b, n - 1, k) = batch.at(b, 0, k);
      want[b] = std::min<int64_t>(want[b], n - 1);
    }
    if (kind == 2 && batch.column_stride != 0) {
      for (int64_t i = half; i < n; ++i)
        for (int64_t k = 0; k < m; ++k)
          batch.at(b, i, k) = batch.at(b, i - half, k) - (i > half ? batch.at(b, i - half - 1, k) : T(0));
      want[b] = half;
    }
    if (kind == 3)  // a graded one, its least singular value about 1e4 tolerances
      for (int64_t k = 0; k < m; ++k) batch.at(b, n - 1, k) *= static_cast<T>(1e5 * batch.rtol[b]);
    if (kind == 3 && n > 1 && batch.column_stride != 0)
      batch.at(b, n - 1, n - 1) += static_cast<T>(1e6 * batch.rtol[b]);
    if (kind == 4) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < m; ++k) batch.at(b, i, k) = 0;
      want[b] = 0;
    }
    using Limits = std::numeric_limits<T>;
    const T scale = kind == 5 ? Limits::min() * 16 : kind == 6 ? Limits::max() / 4096 : T(1);
    if (scale != T(1))
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < (batch.column_stride == 0 ? 1 : m); ++k) batch.at(b, i, k) *= scale;
    if (kind == 7) {
      batch.at(b, n / 2, m / 2) = n % 2 ? Limits::quiet_NaN() : -Limits::infinity();
      want[b] = -2;
    }
  }
  return want;
}

// Whether sign (B B^T - shift I) has no negative eigenvalue, short of 113 bits.
template <class T> bool definite(Batch<T>& batch, int64_t b, Quad shift, int sign) {
  const int64_t n = batch.n;
  std::vector<Quad> a(n * n, 0);
  Quad trace = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t k = 0; k < batch.m; ++k) a[i * n + j] += Quad(batch.at(b, i, k)) * Quad(batch.at(b, j, k));
      if (i == j) trace += a[i * n + j], a[i * n + j] -= shift;
      a[i * n + j] *= sign;
    }
  for (int64_t k = 0; k < n; ++k) {
    const Quad d = a[k * n + k];
    if (d < -trace * Quad(0x1p-100)) return false;
    if (!(d > 0)) return true;
    for (int64_t i = k + 1; i < n; ++i)
      for (int64_t j = k + 1; j < n; ++j) a[i * n + j] -= a[i * n + k] * a[k * n + j] / d;
  }
  return true;
}

// The Gram that the panels make, against its stated error.
template <bool Doubled, class T> void gram_errors() {
  Random random;
  for (const std::string layout : {"rows", "columns", "gaps"})
    for (int n : {1, 4, 7, 18})
      for (int m : {n, n + 1, 3 * n + 50}) {
        const int columns = 16;
        Batch<T> batch(1, n, m, layout);
        const int exponents = random.below(3) * 6;
        for (T& x : batch.store) x = static_cast<T>(random.wide(exponents));
        using Numbers = TeamNumbers<Doubled>;
        std::vector<Pair> memory(team_bytes<Doubled>(n, columns) / 16);
        RankVerdict verdict;
        examine_matrix<Doubled>(Alone(), batch.task(), batch.store.data(), 0, 0, 1e-3, columns, memory.data(), verdict);
        const typename Numbers::Memory e(n, reinterpret_cast<typename Numbers::Num*>(memory.data()));
        const auto product = [&](int i, int j, bool magnitudes) {
          Quad s = 0;
          for (int k = 0; k < m; ++k) {
            const Quad term = Quad(batch.at(0, i, k)) * Quad(batch.at(0, j, k));
            s += magnitudes ? magnitude(term) : term;
          }
          return s;
        };
        const auto unit = [&](int i) {
          return power_of_two(exponent_above_root(static_cast<double>(product(i, i, false)) * (1 - 1e-12)));
        };
        const int panels = (m + columns - 1) / columns;
        for (int i = 0; i < n; ++i)
          for (int j = 0; j <= i; ++j) {
            const Quad off = magnitude(wide(e.gram(i, j)) - product(i, j, false));
            const Quad allowed = Doubled ? Quad(kUnit * kUnit * kSlack * (m + 8 * panels)) * unit(i) * unit(j)
                                         : Quad(kUnit * kSlack * (m + 2)) * product(i, j, true);
            CHECK(off <= allowed, "%d x %d %s, entry %d %d", n, m, layout.c_str(), i, j);
            if (Doubled) CHECK(off <= Quad(2e-28) * unit(i) * unit(j), "%d x %d, entry %d %d: in double", n, m, i, j);
          }
      }
}

template <class T> void teams(int n, int m, const std::string& layout, const std::vector<int>& sizes, int columns) {
  Random random;
  random.state += static_cast<uint64_t>(n * 1000 + m);
  Batch<T> alone(8, n, m, layout);
  const std::vector<int64_t> want = fill(alone, random);
  const std::vector<char> open = alone.by(0, columns);
  for (int64_t b = 0; b < alone.batch; ++b) {
    const bool open_still = alone.rank[b] == -1 && alone.lower[b] <= want[b] && want[b] <= alone.upper[b];
    const bool told = alone.rank[b] == want[b] || open_still;
    CHECK(told, "%d x %d %s, matrix %d: rank %d, %d to %d, not %d", n, m, layout.c_str(), (int)b, (int)alone.rank[b],
          (int)alone.lower[b], (int)alone.upper[b], (int)want[b]);
    if (want[b] >= 0) CHECK(alone.rank[b] >= 0, "%d x %d %s, matrix %d is not told", n, m, layout.c_str(), (int)b);
    if (want[b] < 0 || !kHasQuad) continue;
    const Quad least = alone.least[b], largest = alone.largest[b];
    CHECK(definite(alone, b, least * least, 1), "%d x %d %s, matrix %d: sigma above %g", n, m, layout.c_str(), (int)b,
          alone.least[b]);
    CHECK(definite(alone, b, largest * largest, -1), "%d x %d %s, matrix %d: sigma to %g", n, m, layout.c_str(),
          (int)b, alone.largest[b]);
    if (alone.column_stride == 0 || b > 0) continue;
    CHECK(least > 0 && !definite(alone, b, 16 * least * least, 1), "%d x %d: %g is weak", n, m, alone.least[b]);
    CHECK(!definite(alone, b, largest * largest / 4, -1), "%d x %d: %g is weak", n, m, alone.largest[b]);
  }
  for (int size : sizes) {
    Batch<T> batch(8, n, m, layout);
    batch.store = alone.store;
    const std::vector<char> again = batch.by(size, columns);
    for (int64_t b = 0; b < batch.batch; ++b) {
      const bool same = batch.rank[b] == alone.rank[b] && batch.lower[b] == alone.lower[b] &&
                        batch.upper[b] == alone.upper[b] && again[b] == open[b];
      CHECK(same, "%d x %d %s, matrix %d, %d threads: rank %d, %d to %d", n, m, layout.c_str(), (int)b, size,
            (int)batch.rank[b], (int)batch.lower[b], (int)batch.upper[b]);
      const auto near = [](double x, double y) { return x == y || std::fabs(x - y) <= 1e-9 * std::fabs(y); };
      CHECK(near(batch.least[b], alone.least[b]) && near(batch.largest[b], alone.largest[b]), "%g %g, alone %g %g",
            batch.least[b], batch.largest[b], alone.least[b], alone.largest[b]);
    }
  }
}

// L and D do not depend on how many there are.
template <class Num, int R, int Own> void same_factors(int n, const std::vector<int>& sizes) {
  Random random;
  Case<Num, R, Own> alone(n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j <= i; ++j) alone.e.gram(i, j) = Arithmetic<Num>::of(random.unit() + (i == j ? n : 0));
  const std::vector<Num> gram = alone.store;
  const Pivots<double> pivots = alone.e.eliminate(Alone(), 0.5, 0.0);
  std::vector<Num> factors = alone.store;
  alone.e.invert(Alone());
  const size_t factor_bytes = sizeof(Num) * static_cast<size_t>(alone.e.w - alone.store.data());
  for (int size : sizes) {
    Case<Num, R, Own> c(n);
    c.store = gram;
    typename Case<Num, R, Own>::Memory e(n, c.store.data());
    std::vector<Num> mine;
    std::vector<double> positive(size);
    with_team(size, [&](const ThreadTeam& team) {
      positive[team.rank()] = e.eliminate(team, 0.5, 0.0).positive;
      if (team.rank() == 0) mine = c.store;
      team.sync();
      e.invert(team);
      e.inverse_norms(team);
    });
    CHECK(std::memcmp(mine.data(), factors.data(), factor_bytes) == 0, "n %d, %d threads: other factors", n, size);
    const bool same = std::memcmp(c.store.data(), alone.store.data(), factor_bytes) == 0;
    CHECK(same, "n %d, %d threads: another inverse", n, size);
    for (double p : positive) CHECK(p == pivots.positive, "%g and %g", p, pivots.positive);
  }
}

void all_teams(bool few) {
  const std::vector<int> sizes = few ? std::vector<int>{3, 8} : std::vector<int>{1, 2, 3, 8, 32};
  for (int n : {1, 6, 13, 21}) {
    same_factors<double, 4, 1>(n, sizes);
    same_factors<Pair, 4, 1>(n, sizes);
    same_factors<double, 4, 4>(n, sizes);
    same_factors<Pair, 2, 2>(n, sizes);
  }
  const std::vector<std::string> layouts = {"rows", "columns", "gaps", "batch last", "one column"};
  for (size_t i = 0; i < layouts.size(); ++i) {  // every size of team in every layout, in one or the other dtype
    teams<double>(9, 14, layouts[i], {sizes[i % sizes.size()]}, 4);
    teams<float>(9, 14, layouts[i], {sizes[(i + 2) % sizes.size()]}, 8);
  }
  for (int size : sizes) {
    teams<double>(1, 1, "rows", {size}, 4);
    teams<float>(3, 5, "rows", {size}, 4);
    teams<double>(5, 5, "columns", {size}, 16);
    teams<float>(size > 8 ? 11 : 17, 33, "columns", {size}, 16);
  }
  for (const std::string& layout : layouts) {
    teams<float>(33, 70, layout, {}, 16);
    teams<double>(40, 41, layout, {}, 8);
    teams<double>(8, 200, layout, {}, 64);
  }
}

// The largest entry comes into [1/2, 1), as far as a power of two is a double; what is decided is not scaled.
void scales() {
  const double infinity = std::numeric_limits<double>::infinity();
  for (double largest : {1.0, 0x1.8p5, 0x1p999, 0x1p1000, DBL_MAX, 0x1p-1001, 0x1p-1002, 0x1p-1074, 0.0, infinity}) {
    Batch<double> batch(1, 2, 3, "rows");
    batch.at(0, 1, 2) = -largest;
    int exponent = 77, e = 0;
    RankVerdict verdict;
    find_scale(Alone(), batch.task(), batch.store.data(), exponent, verdict);
    const bool decided = largest == 0 || largest == infinity;
    if (!decided) std::frexp(largest, &e);
    CHECK(exponent == std::max(-1000, std::min(1000, -e)), "%g: %d", largest, exponent);
    CHECK(verdict.rank == (largest == 0 ? 0 : decided ? -2 : -1), "%g: rank %g", largest, verdict.rank);
    CHECK(largest > 0 || (verdict.lower == 0 && verdict.upper == 0 && verdict.sigma_max_upper == 0), "nothing is zero");
  }
}

// A matrix that is exactly deficient is never said to be of full rank, whatever the tolerance.
template <class T> void never_full() {
  Random random;
  for (int trial = 0; trial < 400; ++trial) {
    const int n = 2 + random.below(12), m = n + random.below(6);
    Batch<T> batch(1, n, m, "rows");
    batch.rtol[0] = trial % 3 == 0 ? 0 : trial % 3 == 1 ? 1e-300 : std::ldexp(1.0, -random.below(120));
    batch.atol[0] = trial % 5 == 0 ? 1e-20 : 0;
    const int exponents = random.below(2) * 20, i = random.below(n), j = (i + 1 + random.below(n - 1)) % n;
    for (T& x : batch.store) x = static_cast<T>(random.wide(exponents));
    const int how = random.below(4);
    for (int k = 0; k < m; ++k) {
      T& x = batch.at(0, j, k);
      if (how == 0) x = batch.at(0, i, k);
      if (how == 1) x = batch.at(0, i, k) * T(-0x1p-30);
      if (how == 2) x = 0;
    }
    if (how == 3)  // integers: the last row is the sum of the others
      for (int k = 0; k < m; ++k) {
        int s = 0;
        for (int r = 0; r + 1 < n; ++r) {
          const int v = random.below(2001) - 1000;
          batch.at(0, r, k) = static_cast<T>(v), s += v;
        }
        batch.at(0, n - 1, k) = static_cast<T>(s);
      }
    batch.by(0, 16);
    CHECK(batch.lower[0] < n && batch.rank[0] < n && batch.least[0] == 0,
          "n %d, trial %d: rank %d, at least %d, sigma %g", n, trial, (int)batch.rank[0], (int)batch.lower[0],
          batch.least[0]);
  }
}

// Without memory for double-double, what needs none is still told.
void without_room() {
  Batch<double> batch(8, 6, 9, "rows");
  Random random;
  const std::vector<int64_t> want = fill(batch, random);
  std::vector<double> single(team_bytes<false>(6, 4) / 8);
  batch.both(Alone(), single.data(), nullptr, 4);
  for (int64_t b = 0; b < batch.batch; ++b)
    CHECK(batch.rank[b] == want[b] || batch.rank[b] == -1, "matrix %d: rank %d", (int)b, (int)batch.rank[b]);
  CHECK(batch.rank[0] == 6 && batch.rank[4] == 0 && batch.rank[7] == -2 && batch.rank[5] == -1 && batch.rank[6] == -1,
        "%d %d %d", (int)batch.rank[0], (int)batch.rank[4], (int)batch.rank[7]);
}

// Traces of 2^-690 to 2^690 are taken as they are; what is beyond is scaled first, for the second pass.
void ends_of_the_range() {
  Batch<double> batch(4, 1, 1, "rows");
  const double least = 0x1p-345, largest = 0x1p345;
  batch.store = {least, largest, std::nextafter(least, 0), std::nextafter(largest, HUGE_VAL)};
  const std::vector<double> entries = batch.store;
  const std::vector<char> open = batch.by(0, 4);
  for (int b = 0; b < 4; ++b) {
    CHECK(open[b] == (b >= 2) && batch.rank[b] == 1, "matrix %d: rank %d", b, (int)batch.rank[b]);
    const double low = batch.least[b] / entries[b], high = batch.largest[b] / entries[b];
    CHECK(0.999 < low && low <= 1 && 1 <= high && high < 1.001, "matrix %d: %g to %g", b, low, high);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool threads = argc > 1 && std::string(argv[1]) == "--threads";
  all_teams(threads);
  if (threads) return report();
  if (kHasQuad) {
    double_double();
    product_sums();
    deflated_sums();
    gram_errors<false, float>();
    gram_errors<false, double>();
    gram_errors<true, float>();
    gram_errors<true, double>();
    backward_errors<double, 4, 4>();
    backward_errors<double, 4, 1>();
    backward_errors<Pair, 2, 2>();
    backward_errors<Pair, 4, 1>();
  }
#if defined(__SIZEOF_INT128__)
  exact_counts<double, 4, 4>();
  exact_counts<Pair, 2, 2>();
  exact_counts<Pair, 4, 1>();
#endif
  known_eigenvalues<double, 4, 1>();
  known_eigenvalues<Pair, 2, 2>();
  roots();
  never_full<float>();
  never_full<double>();
  without_room();
  scales();
  ends_of_the_range();
  return report();
}

#endif
