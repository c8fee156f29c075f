// The arithmetic that proofs rest on, asked of threads and of the compiled code. Flags such as -ffast-math are refused
// when the package is built (setup.py, core/macros.h); what slips through is seen here, at every import.
#pragma GCC diagnostic ignored "-Wpsabi"  // everything that takes vectors is inlined
#include "arithmetic.h"

#include <omp.h>

#include <cmath>
#include <cstring>

#include "../core/deflation.h"
#include "lanes.h"

namespace gcfast::cpu {
namespace {

// Results of facts().
enum Fact { sum, quotient, nan, split, product_head, product_tail, pair, fixed_point, denormal, literal, kFacts };

// Operands come through memory, so that nothing is computed by the compiler.
struct Operands {
  double big = 0x1p60, one = 1, odd = 49, not_a_number = NAN, third = 1.0 / 3, near = 1 + 0x1p-30, tiny = 0x1.8p-1060,
         ten = 10;
};

// Steps of the kernels, as those are written and compiled.
template <class V> GCFAST_HD void facts(const Operands& o, V* out) {
  const V zero{}, one = zero + o.one, big = zero + o.big, near = zero + o.near, third = zero + o.third;
  out[sum] = (big + one) - big;
  const V divisor = zero + o.odd;
  out[quotient] = zero;
  for (int i = 1; i <= 8; ++i) out[quotient] += (divisor * static_cast<double>(i)) / divisor - static_cast<double>(i);
  const V bad = zero + o.not_a_number;
  out[nan] = bad == bad ? zero : one;
  out[split] = leading_bits(third, one);
  const DoubleDouble<V> square = two_product(near, near);
  out[product_head] = square.hi;
  out[product_tail] = square.lo;
  // head less the product whose head it is: if the product were fused with that difference, its tail counted twice
  const DoubleDouble<V> left = Arithmetic<DoubleDouble<V>>::sub_product({square.hi, zero}, {near, zero}, {near, zero});
  out[pair] = left.hi + left.lo;
  ProductSum<V> terms;
  for (int i = 0; i < 3; ++i) terms.add(third, third * 0.5);
  const DoubleDouble<V> total = terms.value();
  out[fixed_point] = (total.hi - V(zero + 0x1.5555555555555p-3)) + total.lo;
  out[denormal] = (zero + o.tiny) * one;
  out[literal] = (zero + 0.1) - one / (zero + o.ten);
}

GCFAST_CLONES void facts_of_lanes(const Operands& o, Doubles* out) { facts(o, out); }
GCFAST_CLONES void facts_alone(const Operands& o, double* out) { facts(o, out); }

bool equal_bits(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0; }

const char* judged(const double* x) {
  static const char* const kSums = "sums are reordered, as by -fassociative-math";
  static const char* const kFused = "a product that must be rounded is fused with a sum, as by -ffp-contract=fast";
  if (!equal_bits(x[literal], 0.0)) return "constants are rounded to float, as by -fsingle-precision-constant";
  if (!equal_bits(x[sum], 0.0) || !equal_bits(x[split], 0x1.55555p-2)) return kSums;
  if (!equal_bits(x[quotient], 0.0)) return "quotients are products with a reciprocal, as by -freciprocal-math";
  if (!equal_bits(x[nan], 1.0)) return "a NaN equals itself, as by -ffinite-math-only";
  if (!equal_bits(x[product_head], 1 + 0x1p-29) || !equal_bits(x[product_tail], 0x1p-60)) return kFused;
  if (!equal_bits(x[pair], -0x1p-60)) return kFused;
  if (!(std::fabs(x[fixed_point] + 0x1p-54 / 6) < 0x1p-95)) return kSums;
  if (!equal_bits(x[denormal], 0x1.8p-1060)) return "denormal numbers are flushed to zero whatever the control word says";
  return "";
}

}  // namespace

const char* self_test() {
  const PlainArithmetic plain;
  const Operands operands;
  double one[kFacts];
  facts_alone(operands, one);
  if (*judged(one)) return judged(one);
  Doubles lanes[kFacts];
  facts_of_lanes(operands, lanes);
  for (int l = 0; l < kLanes; ++l) {
    for (int f = 0; f < kFacts; ++f) one[f] = lanes[f][l];
    if (*judged(one)) return judged(one);
  }
  return "";
}

std::vector<ControlWord> exchange_control_words(const std::vector<ControlWord>& words, int threads) {
  std::vector<ControlWord> before(threads, 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const size_t self = omp_get_thread_num();
    const ControlWord word = control_word();
    if (self < before.size()) before[self] = word;
    set_control_word(self < words.size() ? words[self] : word & ~kOtherArithmetic);
  }
  return before;
}

}  // namespace gcfast::cpu
