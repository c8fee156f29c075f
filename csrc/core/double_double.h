// The numbers that core/inertia.h works in: a lane type V (double here; csrc/cpu has a vector of doubles, one matrix
// a lane) and DoubleDouble<V>, an unevaluated sum hi + lo with |lo| <= u |hi|, u = 2^-53: about 106 bits (Dekker 1971;
// Joldes, Muller, Popescu 2017). The errors stated here are what core/rank_bounds.h counts with.
#pragma once
#include <cmath>

#include "macros.h"

namespace gcfast {

// What a lane type must offer beside + - * /.
template <class V> struct Lanes;
template <> struct Lanes<double> {
  static constexpr int count = 1;
  static GCFAST_HD double get(double v, int) { return v; }
  static GCFAST_HD void set(double& v, int, double x) { v = x; }
  static GCFAST_HD double fused(double a, double b, double c) {  // of one rounding wherever it runs
#if defined(__CUDA_ARCH__)
    return __fma_rn(a, b, c);
#else
    return __builtin_fma(a, b, c);
#endif
  }
  static GCFAST_HD double magnitude(double a) { return fabs(a); }
  static GCFAST_HD double larger(double a, double b) { return a < b ? b : a; }
  static GCFAST_HD double smaller(double a, double b) { return a < b ? a : b; }  // b where one is NaN
  static GCFAST_HD double root(double a) { return sqrt(a); }
  static GCFAST_HD double one_if_positive(double a) { return a > 0 ? 1.0 : 0.0; }
  static GCFAST_HD double infinite_unless_above(double a, double least) { return a > least ? 0.0 : HUGE_VAL; }
};

// A pair of doubles is moved as one: in 16 bytes, which a GPU loads at once and without conflicts of banks.
template <class V> struct alignas(sizeof(V) == 8 ? 16 : alignof(V)) DoubleDouble { V hi, lo; };

template <class Num> struct LaneOf { using type = Num; };
template <class V> struct LaneOf<DoubleDouble<V>> { using type = V; };
template <class Num> using Lane = typename LaneOf<Num>::type;

// hi + lo = a + b exactly, if |a| >= |b| or a = 0.
template <class V> GCFAST_HD DoubleDouble<V> fast_two_sum(const V& a, const V& b) {
  const V s = a + b;
  return {s, b - (s - a)};
}
// hi + lo = a + b exactly.
template <class V> GCFAST_HD DoubleDouble<V> two_sum(const V& a, const V& b) {
  const V s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}
// a b, rounded although something is added to it: nvcc would make an FMA of the two, and two_sum(s, -p) be wrong.
template <class V> GCFAST_HD V rounded_product(const V& a, const V& b) { return a * b; }
#if defined(__CUDA_ARCH__)
GCFAST_HD double rounded_product(const double& a, const double& b) { return __dmul_rn(a, b); }
#endif
// hi + lo = a b exactly, short of underflow.
template <class V> GCFAST_HD DoubleDouble<V> two_product(const V& a, const V& b) {
  const V p = rounded_product(a, b);
  return {p, Lanes<V>::fused(a, b, -p)};
}

template <class Num> struct Arithmetic;  // conversions, and the products that the algorithms are made of

template <class V> struct Arithmetic {
  static GCFAST_HD V of(const V& x) { return x; }
  static GCFAST_HD V head(const V& x) { return x; }
  static GCFAST_HD V sub_product(const V& s, const V& a, const V& b) { return s - a * b; }
  static GCFAST_HD V product(const V& a, const V& b) { return a * b; }
  static GCFAST_HD V difference(const V& a, const V& b) { return a - b; }
  static GCFAST_HD V reciprocal(const V& a) { return 1.0 / a; }
};

// Errors short of underflow, second-order terms in u left out. Each sum ends in fast_two_sum(t.hi, c) with a
// correction c of a few u (|s| + |a b|); where the head has cancelled below |c|, t.hi is still a multiple of ulp(c),
// and that is all fast_two_sum needs.
template <class V> struct Arithmetic<DoubleDouble<V>> {
  using D = DoubleDouble<V>;
  static GCFAST_HD D of(const V& x) { return {x, V{}}; }
  static GCFAST_HD V head(const D& x) { return x.hi; }
  // s - a b: a.lo b.lo is left out (u^2) and p.lo, of up to 3u |a b|, rounded twice (5 u^2 |a b|); the sum as above
  // with that p.lo: u^2 (|s| + 2 |result| + 12 |a b|) in all.
  static GCFAST_HD D sub_product(const D& s, const D& a, const D& b) {
    const D p = two_product(a.hi, b.hi), t = two_sum(s.hi, -p.hi);
    const V low = Lanes<V>::fused(a.hi, b.lo, Lanes<V>::fused(a.lo, b.hi, p.lo));
    return fast_two_sum(t.hi, s.lo + (t.lo - low));
  }
  static GCFAST_HD D product(const D& a, const D& b) {  // relative error 6 u^2
    const D p = two_product(a.hi, b.hi);
    return fast_two_sum(p.hi, Lanes<V>::fused(a.hi, b.lo, Lanes<V>::fused(a.lo, b.hi, p.lo)));
  }
  static GCFAST_HD D difference(const D& a, const V& b) {  // u^2 (|a| + |result|)
    const D t = two_sum(a.hi, -b);
    return fast_two_sum(t.hi, a.lo + t.lo);
  }
  // A Newton step from r = fl(1/a.hi): r (1 + e), e = 1 - a r of up to 2u, known to 3 u^2; e^2 is left out, r e is
  // rounded: relative error 9 u^2.
  static GCFAST_HD D reciprocal(const D& a) {
    const V r = 1.0 / a.hi;
    const V e = Lanes<V>::fused(-a.lo, r, Lanes<V>::fused(-a.hi, r, V{} + 1.0));
    return fast_two_sum(r, rounded_product(r, e));
  }
};

// A sum of at most kTerms products a_k b_k of lanes with sum a_k^2, sum b_k^2 <= 1, so that no part of it exceeds 1.
// The sums are kept in fixed point, by adding to constants that do not let the exponent move: each product is cut at
// 2^-51 into `high`, what is left of it (up to 2^-52, rounded once: u^2) at 2^-97 into `middle`, and the rest is
// summed as is. Seven operations a term, where a renormalised double-double sum takes 13, and a third of its error:
// u^2 a term, and 2 u^2 for value().
template <class V> struct ProductSum {
  static constexpr int kTerms = 64;
  static constexpr double kHigh = 3.0, kMiddle = 0x1.8p-45;
  V high = V{} + kHigh, middle = V{} + kMiddle, rest = V{};
  GCFAST_HD void add(const V& a, const V& b) {
    const V h = Lanes<V>::fused(a, b, high), left = Lanes<V>::fused(a, b, high - h);
    const V m = middle + left;
    rest = rest + (left - (m - middle));
    high = h;
    middle = m;
  }
  GCFAST_HD DoubleDouble<V> value() const {
    const DoubleDouble<V> t = two_sum(high - kHigh, middle - kMiddle);
    return fast_two_sum(t.hi, t.lo + rest);
  }
};
// a + b in double-double: 3 u^2 (|a| + |b|).
template <class V> GCFAST_HD DoubleDouble<V> sum(const DoubleDouble<V>& a, const DoubleDouble<V>& b) {
  const DoubleDouble<V> t = two_sum(a.hi, b.hi);
  return fast_two_sum(t.hi, t.lo + (a.lo + b.lo));
}

}  // namespace gcfast
