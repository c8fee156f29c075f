// csrc/core/rank_bounds.h and the bounds of deflation.h: every number against its formula as stated there, from both
// sides, where each of its terms counts; every decision at the numbers next to where it turns.
#include "../../csrc/core/rank_bounds.h"

#include <cmath>
#include <initializer_list>

#include "../../csrc/core/deflation.h"
#include "check.h"

using namespace gcfast;

namespace {

using Wide = long double;
constexpr double kUnit = 0x1p-53;
const RankOptions kNone{0, 0}, kAbsolute{1, 0}, kRelative{0, 1};

// Whether x is `want`, but for the roundings of its few operations.
bool is(double x, Wide want) { return std::fabs(Wide(x) - want) <= 8 * Wide(kUnit) * std::fabs(want); }
double after(double x) { return std::nextafter(x, HUGE_VAL); }
double before(double x) { return std::nextafter(x, -HUGE_VAL); }

void errors() {
  for (int64_t m : {int64_t{1}, int64_t{9}, int64_t{1} << 40}) {
    CHECK(is(gram_error_double(m, 3), Wide(1.01) * kUnit * (m + 2) * 3), "%a", gram_error_double(m, 3));
    for (int64_t panels : {int64_t{1}, int64_t{1} << 39})
      CHECK(is(gram_error_doubled(m, panels, 3), Wide(1.01) * kUnit * kUnit * (Wide(m) + 8 * Wide(panels)) * 3), "%a",
            gram_error_doubled(m, panels, 3));
  }
  for (bool doubled : {false, true})
    for (int64_t n : {int64_t{1}, int64_t{9}, int64_t{1} << 20}) {
      const double unit = doubled ? kUnit * kUnit : kUnit;
      const Wide step = Wide(1.01) * unit * (doubled ? 3 * n + 40 : n + 6);
      // what underflow costs, alone; a backward error alone; and beside others of its size
      const RankBounds nothing(n, n + 2, doubled, 0, 0, 0, kNone), b(n, n + 2, doubled, 1, 1, 7 * unit, kNone);
      CHECK(is(nothing.error(0, 0), Wide(n) * (2 * n + 2) * Wide(0x1p-860)), "%a", nothing.error(0, 0));
      CHECK(is(nothing.error(1, 0), step), "n %d: %a", (int)n, nothing.error(1, 0));
      CHECK(is(b.error(2, 0.5), 7 * Wide(unit) + 2 * step + Wide(7.5) * unit), "n %d: %a", (int)n, b.error(2, 0.5));
      CHECK(!(b.error(NAN, 0) < HUGE_VAL) && b.error(HUGE_VAL, 0) == HUGE_VAL, "no bound for what is not finite");
    }
}

void top() {
  // From above by the trace, or by the Frobenius norm and the Gram's error; from below by the mean eigenvalue.
  const Wide outward = 1 + Wide(1e-14), inward = 1 - Wide(1e-14);
  RankBounds b(4, 5, false, 8, 100, 0.25, kRelative);
  CHECK(is(b.sigma_max(), std::sqrt(Wide(1.0001) * 8) * outward), "%a", b.sigma_max());
  CHECK(is(b.least_tolerance(), std::sqrt(Wide(0.9999) * 8 / 4 - Wide(0.25)) * inward), "%a", b.least_tolerance());
  const RankBounds close(4, 5, false, 8, 2, 1, kRelative);
  CHECK(is(close.sigma_max(), std::sqrt(Wide(1.0000001) * 2 + 1) * outward), "%a", close.sigma_max());
  CHECK(RankBounds(4, 5, false, 8, 100, 9, kRelative).least_tolerance() == 0, "the square root of less than nothing");
  b.largest_at_most(HUGE_VAL), b.largest_at_most(3), b.largest_at_most(4);
  CHECK(is(b.sigma_max(), std::sqrt(Wide(3)) * outward), "%a", b.sigma_max());
  // A quotient's own roundings, 17/16 u (3n + 8) trace, beside one that the Gram's error leaves little of.
  RankBounds one(1, 1, false, 1, 1, 1, kRelative);
  one.rayleigh(NAN), one.rayleigh(1 + 0x1p-40), one.rayleigh(1);
  CHECK(is(one.least_tolerance(), std::sqrt(Wide(0x1p-40) - Wide(1.0625) * kUnit * 11) * inward), "%a",
        one.least_tolerance());
  const double n = 0x1p40;
  RankBounds many(int64_t{1} << 40, int64_t{1} << 40, false, 4, 4, 0x1p-38, kRelative);
  many.rayleigh(0x1p-9);
  const Wide left = Wide(0x1p-9) - Wide(0x1p-38) - Wide(1.0625) * kUnit * (3 * n + 8) * 4;
  CHECK(is(many.least_tolerance(), std::sqrt(left) * inward), "%a", many.least_tolerance());
  // The tolerance is the larger of its two.
  const RankBounds absolute(1, 1, false, 4, 4, 0, RankOptions{3, 1}), relative(1, 1, false, 4, 4, 0, RankOptions{3, 2});
  CHECK(is(absolute.least_tolerance(), 3 * inward), "atol");
  CHECK(is(relative.least_tolerance(), std::sqrt(Wide(0.9999) * 4) * 2 * inward), "rtol");
}

void shifts() {
  const double n = 0x1p40;  // so many that a step is 1.2e-4, and counts beside the rest
  const Wide step = Wide(1.01) * kUnit * (n + 6), rounded = 5 * Wide(kUnit);
  const auto of = [](double gram, const RankOptions& options) {
    return RankBounds(int64_t{1} << 40, int64_t{1} << 40, false, 4, 4, gram, options);
  };
  const RankOptions two{2, 0};  // whose square is the tolerance
  const double least = 0.25 + 2e-3;
  for (double gram : {1e-3, 1e-9}) {
    const Wide error = gram + 8 * step + 8 * rounded;
    RankBounds b = of(gram, two);
    CHECK(is(b.shift_above(), Wide(1.001) * 4 + Wide(1.01) * error), "%a", b.shift_above());
    CHECK(is(b.shift_below(), Wide(0.999) * 4 - error), "%a", b.shift_below());
    b.rayleigh(least);
    const Wide low = least - Wide(gram) - Wide(1.0625) * kUnit * (3 * n + 8) * 4;
    CHECK(is(b.shift_of_top(), Wide(1.01) * low + gram + 8 * step + rounded * (4 + low)), "%a", b.shift_of_top());
  }
  CHECK(of(3.5, two).shift_below() == 1, "never below a quarter of the tolerance");
  CHECK(is(RankBounds().shift_above(), Wide(1.001) * Wide(0x1p-1000)), "%a", RankBounds().shift_above());
}

void decisions() {
  // `part` 0 leaves the comparison alone; the tolerance is 1, or 2^-1000 where it is not positive.
  const RankBounds b(1, 1, false, 1, 1, 0.5, kAbsolute);
  const double above = 1 + 1e-14, below = 1 - 1e-14;
  CHECK(b.from_below(above, 0, 0) && !b.from_below(before(above), 0, 0), "counts above the tolerance");
  CHECK(b.from_above(below, 0, 0) && !b.from_above(after(below), 0, 0), "counts below the tolerance");
  const double tiny = 0x1p-1000 * (1 + 1e-14);
  CHECK(RankBounds().from_below(tiny, 0) && !RankBounds().from_below(before(tiny), 0), "no tolerance");
  // the error counts whole, or by a part
  const double error = b.error(1, 1);
  CHECK(b.from_below(1.51, 1) && !b.from_below(1.49, 1) && !b.from_below(1 + 0.99 * error, 1), "the whole error");
  CHECK(b.from_below(1.26, 1, 0.5) && !b.from_below(1.24, 1, 0.5), "half of it");
  CHECK(b.from_above(0.49, 1) && !b.from_above(0.51, 1), "the whole error");
  CHECK(b.from_above(0.74, 1, 0.5) && !b.from_above(0.76, 1, 0.5), "half of it");
  for (double size : {1e40, HUGE_VAL, static_cast<double>(NAN)})
    CHECK(!b.from_below(2, size) && !b.from_above(0, size), "growth of %g", size);
  // An atol above the norm alone says that the rank is 0: a bound that is reached is enough.
  RankBounds small(1, 1, false, 1, 1, 0, kAbsolute), smaller = small;
  small.largest_at_most(after(below)), smaller.largest_at_most(below);
  CHECK(smaller.none() && !small.none(), "as large as the tolerance");
  // The precision resolves what is twice its error: `part` of it in double-double.
  CHECK(RankBounds(1, 1, false, 1, 1, 0, kNone).part() == 1 && RankBounds(1, 1, true, 1, 1, 0, kNone).part() == 0.125,
        "parts");
  for (bool doubled : {false, true}) {
    const double turn = doubled ? 16 : 2;
    const RankOptions two{2, 0};
    const RankBounds at(1, 1, doubled, 0, 0, turn, two), under(1, 1, doubled, 0, 0, before(turn), two);
    CHECK(under.resolves() && !at.resolves() && under.may_resolve() && !at.may_resolve(), "%g", turn);
  }
  // by what is known of the top from below, or from above: 0.99 and 4
  const RankBounds between(2, 2, false, 4, 4, 1, kRelative);
  CHECK(!between.resolves() && between.may_resolve(), "%a", between.error(4, 0));
}

void sigma_min() {
  for (bool doubled : {false, true}) {
    const RankBounds b(1, 1, doubled, 1, 1, 0.25, kNone);
    const double shift = 2, error = b.error(1, shift);
    const Wide left = Wide(shift) - error, inward = 1 - Wide(1e-14);
    const auto least = [&](double residual, double scaled) {  // L Y - I is in double whatever the elimination was in
      const double root = residual / (1.01 * kUnit * (1 + 3));
      return b.sigma_min(shift, 1, root, root, scaled);
    };
    for (double residual : {0.25, 0.45}) {
      const Wide slack = 1 - Wide(residual), all = left + Wide(0.99999) * slack * slack / 4;
      CHECK(is(least(residual, 4), std::sqrt(all) * inward), "%a", least(residual, 4));
    }
    CHECK(is(least(0.55, 4), std::sqrt(left) * inward), "an inverse that is none: %a", least(0.55, 4));
    CHECK(is(b.sigma_min(shift, 1, NAN, 1, 4), std::sqrt(left) * inward), "no inverse");
    // the last residual with which an inverse says something is below one half
    const double c = 1.01 * kUnit * (1.0 + 3);
    double root = 0.5 / c;
    while (c * root > 0.5) root = before(root);
    while (c * root < 0.5) root = after(root);
    const double at_half = b.sigma_min(shift, 1, root, root, 4);
    if (c * std::sqrt(root * root) == 0.5) CHECK(is(at_half, std::sqrt(left) * inward), "%a", at_half);
    CHECK(b.sigma_min(0.2, 1, 1, 1, 1e30) == 0 && b.sigma_min(2, HUGE_VAL, 1, 1, 4) == 0, "nothing is left");
    CHECK(b.sigma_min(2, NAN, 1, 1, 4) == 0, "nothing is known");
  }
}

void deflation() {
  for (int n : {1, 4, 60, 4000}) {
    const Wide k = n + 4, m = 7;
    const Wide sums = Wide(1.01) * (Wide(1.125) * k * Wide(0x1p-72) + k * k * Wide(0x1p-77));
    CHECK(is(deflated_error(n), sums), "%a", deflated_error(n));
    const Wide lost = Wide(1.02) * kUnit * n * ((m + n + 16) + 3 * (Wide(n) + 6));
    CHECK(is(deflated_loss(n, 7), lost) && deflated_size(n) == 3.0 * n, "%a", deflated_loss(n, 7));
  }
  // 22 bits below the unit: whole multiples of 2^-22, to the nearest
  for (double unit : {0x1p-500, 1.0, 0x1p300})
    for (double x : {0x1.fffffcp-1, 0x1.fffff8p-1, 0x1.5p-22, 0x1.0000010p-23, 0x1.fffffp-24, 0x1.23456789ap-3})
      for (double sign : {1.0, -1.0}) {
        const double want = sign * std::ldexp(std::nearbyint(std::ldexp(x, 22)), -22) * unit;
        CHECK(leading_bits(sign * x * unit, unit) == want, "%a of %a", leading_bits(sign * x * unit, unit), unit);
      }
}

}  // namespace

int main() {
  const RankVerdict verdict;
  CHECK(verdict.rank == -1 && verdict.lower == 0 && verdict.upper == 0 && verdict.sigma_min_lower == 0 &&
            verdict.sigma_max_upper == HUGE_VAL,
        "nothing is said at first");
  // of bounds that were given nothing
  RankBounds b;
  CHECK(b.error(1, 1) == 0 && b.sigma_max() == 0 && b.shift_of_top() == 0, "%a", b.error(1, 1));
  b.rayleigh(0x1p-40);
  CHECK(b.shift_of_top() == 1.01 * 0x1p-40 && b.least_tolerance() == 0, "%a", b.shift_of_top());
  const Wide root = Wide(0.25) / (Wide(1.01) * kUnit * 3);
  CHECK(is(b.sigma_min(0, 0, root, root, 1), std::sqrt(Wide(0.99999)) * Wide(0.75) * (1 - Wide(1e-14))), "no rows");
  CHECK(kLeastTrace * kLargestTrace == 1, "as far from underflow as from overflow");
  errors();
  top();
  shifts();
  decisions();
  sigma_min();
  deflation();
  return report();
}
