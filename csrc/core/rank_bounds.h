// What the inertia of a shifted Gram proves of a rank, rounding errors included: plain numbers, one matrix at a time.
//
// B is n x m, n <= m, G its computed Gram, ||G - B B^T|| <= gram. Eliminating M = G - s I without pivoting gives a
// unit lower L and a diagonal D, all as stored, with L D L^T = M + F, |F| <= step |L||D||L|^T: whatever the pivots are;
// the norm of that is at most its trace, sum |d_k| l_ik^2. By Sylvester the number p of positive pivots is
// that of positive eigenvalues of L D L^T, and by Weyl, with E the sum of all errors,
//     lambda_p(B B^T) > s - E   and   lambda_(p+1)(B B^T) <= s + E.
// Nothing is assumed about growth: it is in the trace, and a bad one makes a weak bound, never a wrong one.
#pragma once
#include <cmath>
#include <cstdint>

#include "macros.h"

namespace gcfast {

// Traces within this range keep all that matters far from underflow and overflow; other matrices are scaled first.
constexpr double kLeastTrace = 0x1p-690, kLargestTrace = 0x1p690;

struct RankOptions {
  double atol, rtol;  // of the matrix as scaled
};

struct RankVerdict {
  double rank = -1, lower = 0, upper = 0;  // -1: not decided here
  double sigma_min_lower = 0, sigma_max_upper = HUGE_VAL;
};

// ||G - B B^T|| for a G summed in double: gamma_m || |B||B|^T ||, at most gamma_m tr(B B^T).
GCFAST_HD double gram_error_double(int64_t m, double trace) {
  return 1.01 * 0x1p-53 * (static_cast<double>(m) + 2) * trace;
}
// In double-double from ProductSums of rows scaled by 2^-k_i to norms of at most 1, `panels` of them added up: an entry
// is off by (m + 8 panels) u^2 2^(k_i + k_j), and the norm of that matrix is at most its trace; `spread` is sum 4^k_i.
GCFAST_HD double gram_error_doubled(int64_t m, int64_t panels, double spread) {
  return 1.01 * 0x1p-106 * (static_cast<double>(m) + 8 * static_cast<double>(panels)) * spread;
}

class RankBounds {
 public:
  RankBounds() = default;
  // Roundings are counted in core/double_double.h and core/inertia.h; 1.01 covers the second-order terms and the
  // rounding of the traces.
  GCFAST_HD RankBounds(int64_t n, int64_t m, bool doubled, double trace, double frobenius, double gram_error,
                       const RankOptions& o)
      : n_(static_cast<double>(n)), trace_(trace), gram_(gram_error), doubled_(doubled), options_(o) {
    const double u = 0x1p-53;
    unit_ = doubled ? u * u : u;
    step_ = 1.01 * unit_ * (doubled ? 3 * n_ + 40 : n_ + 6);
    tiny_ = n_ * (n_ + static_cast<double>(m)) * 0x1p-860;
    top_hi_ = fmin(1.0001 * trace, 1.0000001 * frobenius + gram_);
    top_lo_ = 0.9999 * trace / n_ - gram_;
  }

  // B is small enough in norm for the tolerance alone to say that no singular value exceeds it.
  GCFAST_HD bool none() const { return tolerance(top_lo_) * (1 - 1e-14) >= top_hi_; }

  // Of v^T G v / v^T v, computed in double in any order. NaN counts for nothing.
  GCFAST_HD void rayleigh(double quotient) {
    top_lo_ = fmax(top_lo_, quotient - gram_ - 0x1.1p-53 * (3 * n_ + 8) * trace_);
  }
  GCFAST_HD void largest_at_most(double bound) { top_hi_ = fmin(top_hi_, bound); }

  GCFAST_HD double error(double size, double shift) const {
    return gram_ + step_ * size + 5 * unit_ * (trace_ + shift) + tiny_;
  }
  // A shift whose count bounds the rank from below if the pivots grow moderately, and likewise from above.
  GCFAST_HD double shift_above() const {
    const double t = tolerance(top_hi_) + 0x1p-1000;
    return 1.001 * t + 1.01 * error(2 * trace_, t);
  }
  GCFAST_HD double shift_below() const {
    const double t = tolerance(top_lo_);
    return fmax(0.999 * t - error(2 * trace_, t), 0.25 * t);
  }
  GCFAST_HD double shift_of_top() const { return 1.01 * top_lo_ + error(2 * trace_, top_lo_); }

  // Whether the count at `shift` is proved to bound the rank; with `part` < 1 whether it is so by any realistic share
  // of the worst case.
  GCFAST_HD bool from_below(double shift, double size, double part = 1) const {
    return shift - part * error(size, shift) >= (tolerance(top_hi_) + 0x1p-1000) * (1 + 1e-14);
  }
  GCFAST_HD bool from_above(double shift, double size, double part = 1) const {
    return shift + part * error(size, shift) <= tolerance(top_lo_) * (1 - 1e-14);
  }
  // The share of the worst case that an answer must withstand. Double is held to the whole of it, since double-double
  // comes next and proves more; after that there is only the SVD, which is no more accurate.
  GCFAST_HD double part() const { return doubled_ ? 0.125 : 1.0; }
  // Whether counts at the tolerance can mean anything in this precision; `may` before the top is well known.
  GCFAST_HD bool resolves() const { return part() * error(trace_, 0) < 0.5 * tolerance(top_lo_); }
  GCFAST_HD bool may_resolve() const { return part() * error(trace_, 0) < 0.5 * tolerance(top_hi_); }

  // sigma_n(B), all pivots at `shift` being positive, from C = L D^(1/2) and Y = fl(L^-1), |L Y - I| <= gamma_(n+1)
  // |L||Y|: ||C^-1|| <= ||D^(-1/2) Y|| / (1 - ||L Y - I||). The arguments are upper bounds of squares.
  GCFAST_HD double sigma_min(double shift, double size, double lower_square, double inverse_square,
                             double scaled_inverse_square) const {
    double least = shift - error(size, shift);
    const double residual = 1.01 * 0x1p-53 * (n_ + 3) * sqrt(lower_square * inverse_square);
    if (residual < 0.5) {
      const double slack = 1 - residual;
      least += 0.99999 * slack * slack / scaled_inverse_square;
    }
    return sqrt(fmax(least, 0.0)) * (1 - 1e-14);
  }
  // A lower bound of the tolerance itself.
  GCFAST_HD double least_tolerance() const { return sqrt(tolerance(top_lo_)) * (1 - 1e-14); }
  GCFAST_HD double sigma_max() const { return sqrt(top_hi_) * (1 + 1e-14); }

 private:
  GCFAST_HD double tolerance(double top) const {  // squared
    const double r = options_.rtol * sqrt(fmax(top, 0.0)), t = options_.atol > r ? options_.atol : r;
    return t * t;
  }
  double n_ = 0, trace_ = 0, unit_ = 0, gram_ = 0, step_ = 0, tiny_ = 0, top_hi_ = 0, top_lo_ = 0;
  bool doubled_ = false;
  RankOptions options_{0, 0};
};

}  // namespace gcfast
