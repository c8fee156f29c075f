// An upper bound of the rank where the tolerance is beyond a Gram in double, but p pivots of B B^T - s I at a shift s
// that double resolves are positive and the other rows seem to depend on theirs. T is unit lower triangular: beside
// its ones it has entries only in the rows of the other pivots, in the columns of the positive ones, and they say how
// a row is made of others. T B, with its other rows nearly zero, is computed to some 70 bits and stored in double as
// A. Scaled, so that nothing small is beside anything large, the Gram of A is good enough:
//     A A^T - t T T^T, congruent to B' B'^T - t I for B' = T^-1 A = B + T^-1 (A - T B),
// has as many positive eigenvalues as singular values of B' exceed sqrt(t) (Sylvester). Those of B are off by at most
// ||T^-1 (A - T B)|| (Weyl), which is ||A - T B||: T^-1 = 2 I - T leaves alone what is zero outside the other rows.
//
// Nothing is lost by trying: what stays open goes to double-double, whose Gram alone takes more operations.
#pragma once
#include "inertia.h"

namespace gcfast {

// x rounded to 22 bits below the power of two `unit` >= |x|: products of two such, and sums of 256 products, are exact.
template <class V> GCFAST_HD V leading_bits(const V& x, const V& unit) {
  const V c = unit * 0x1.8p30;
  return (x + c) - c;
}

// An entry of T B: t b is cut into t' b', summed exactly in `whole`, and t' b'' + t'' b, of up to 2^-23 unit_t unit_b
// each, which are summed by fours of columns of T and then over these.
template <class V> struct DeflatedSum {
  static constexpr int kTerms = 4;  // between two ends
  V whole = V{}, rest = V{}, four = V{};
  GCFAST_HD void add(const V& t_lead, const V& t_rest, const V& b, const V& b_lead, const V& b_rest) {
    whole = whole + t_lead * b_lead;
    four = four + t_lead * b_rest;
    four = four + t_rest * b;
  }
  GCFAST_HD void end() {
    rest = rest + four;
    four = V{};
  }
  GCFAST_HD V value() const { return whole + rest; }
};
// Its error in unit_t unit_b, for a sum of n: of the eight terms of a four, each product and sum rounded once, 8 u (2^-23
// + 2^-20), and of the sums of all (n + 4) / 4 fours, up to (n + 4) 2^-22, once each. Beside it the rounding of value().
GCFAST_HD double deflated_error(int n) {
  const double k = n + DeflatedSum<double>::kTerms;
  return 1.01 * (1.125 * k * 0x1p-72 + k * k * 0x1p-77);
}

// What `size` may be for `deflated_loss` to cover a count, and the loss, for rows scaled to
// a_i a_i^T + t T_i T_i^T <= 1.
GCFAST_HD double deflated_size(int n) { return 3.0 * n; }
GCFAST_HD double deflated_loss(int n, int64_t m) {
  return 1.02 * 0x1p-53 * n * ((static_cast<double>(m) + n + 16) + 3.0 * (n + 6));
}

}  // namespace gcfast
