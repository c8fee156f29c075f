// Activations and their first two derivatives: one source for host and device.
//
// Every function is branch-free (selects only), so that a loop over it vectorises, and none of it needs
// -ffast-math. Two things carry the accuracy:
//   * exp(-|t|) is returned as p * s with a power of two s that is scaled up out of the denormal range, so that a
//     factor can be multiplied in before the result is scaled down: one rounding there instead of two;
//   * products inside an exponent (beta*x, x*x/2) are carried as an unevaluated sum hi + lo, because an error of
//     one ulp in t is an error of |t| ulps in exp(t).
// Polynomials: Chebyshev interpolation in 60 digits, rewritten in powers; the erfc form follows Shepherd and
// Laframboise (1981).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

namespace gcfast {

enum class Act { softplus, sigmoid, tanh, gelu, gelu_tanh, silu, relu };

template <class T> struct Traits;

template <> struct Traits<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23;
  static constexpr uint32_t split_mask = 0xfffff000u;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr float log2e = 1.44269504f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float exp_floor = -120.0f;  // exp(-104) is already 0
  static constexpr float up = 18446744073709551616.0f, down = 5.42101086242752217e-20f;  // 2^64, 2^-64
  static constexpr float erfc_max = 10.5f, erfcx_centre = 0.375f;
};

template <> struct Traits<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52;
  static constexpr uint64_t split_mask = 0xfffffffff8000000ull;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2e = 1.4426950408889634074, ln2_hi = 6.93147180369123816490e-01,
                          ln2_lo = 1.90821492927058770002e-10;
  static constexpr double exp_floor = -800.0;
  static constexpr double up = 1.3407807929942597e154, down = 7.458340731200207e-155;  // 2^512, 2^-512
  static constexpr double erfc_max = 27.9, erfcx_centre = 0.4375;
};

template <class To, class From> GCFAST_HD To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  memcpy(&out, &v, sizeof(To));
  return out;
}

// NaN in `a` survives both of these.
template <class T> GCFAST_HD T at_least(T a, T low) { return a < low ? low : a; }
template <class T> GCFAST_HD T at_most(T a, T high) { return a > high ? high : a; }
GCFAST_HD float magnitude(float a) { return fabsf(a); }
GCFAST_HD double magnitude(double a) { return fabs(a); }

template <int First, int Step, class T, int N> GCFAST_HD T horner(T x, const T (&c)[N]) {
  constexpr int last = First + (N - 1 - First) / Step * Step;
  T r = c[last];
  GCFAST_UNROLL
  for (int i = last - Step; i >= 0; i -= Step) r = r * x + c[i];
  return r;
}

// Long polynomials in two or four interleaved chains: one chain waits for itself more than the ports are busy.
template <class T, int N> GCFAST_HD T polynomial(T x, const T (&c)[N]) {
  if constexpr (N <= 5) return horner<0, 1>(x, c);
  const T x2 = x * x;
  if constexpr (N <= 12) return horner<0, 2>(x2, c) + x * horner<1, 2>(x2, c);
  const T x4 = x2 * x2;
  return (horner<0, 4>(x4, c) + x * horner<1, 4>(x4, c)) + x2 * (horner<2, 4>(x4, c) + x * horner<3, 4>(x4, c));
}

GCFAST_HD float exp_poly(float r) {
  constexpr float c[] = {0.500000001353872989f, 0.16666666681704215f,   0.0416664641974056923f,
                         0.00833331084464786256f, 0.00139337307157920825f, 0.00019891080463998842f};
  return polynomial(r, c);
}
GCFAST_HD double exp_poly(double r) {
  constexpr double c[] = {0.500000000000000103, 0.166666666666666675, 0.0416666666666238205, 0.0083333333333300382,
                          0.00138888889173670806, 0.00019841269863171556, 0.0000248015210578682052,
                          2.75572682769056962e-6, 2.76202015910315488e-7, 2.5100472505694996e-8};
  return polynomial(r, c);
}
// (y - log(1 + y)) / y^2 on [0, 1], u = y - 1/2: longer than the usual form in y/(2 + y), but without its division
// and selects. Powers of u, not of y: their terms fall fast, so little rounding piles up, and none is a denormal.
GCFAST_HD float log_poly(float u) {
  constexpr float c[] = {0.378139571f, -0.179224939f, 0.0932297089f, -0.0510830385f, 0.0289640082f,
                         -0.0168016515f, 0.00968185867f, -0.00578768344f, 0.00457687801f, -0.00280164199f};
  return polynomial(u, c);
}
GCFAST_HD double log_poly(double u) {
  constexpr double c[] = {0.378139567567342472, -0.179224936936036275, 0.0932303663636650409,
                          -0.0510834461056585199, 0.0289431831652281894, -0.016788742470007618,
                          0.00990990070901868873, -0.00592901234789971385, 0.00358566675681426994,
                          -0.00218763196321537011, 0.001344493715755721, -0.000831523408149073258,
                          0.000516957599362573072, -0.000322216110299234201, 0.000202048802683137088,
                          -0.000130560543790504917, 0.0000824550194446244055, -0.0000413824966137594519,
                          0.0000262088260562658163, -0.000035907402357816666, 0.0000229388568184714378};
  return polynomial(u, c);
}
// ((1 + a) erfcx(a / sqrt2) / 2 - 1/2) / v for v = a/(a + 4.25), u = v - centre: what is added to 1/2 is small where
// a is, and so are its errors.
GCFAST_HD float erfcx_poly(float u) {
  constexpr float c[] = {-0.0166688001f, -0.480701412f, 1.13193358f, -1.50758573f, 1.23794578f, -0.469262298f,
                          -0.175636625f, 0.255462019f, 0.000601679855f, -0.0979199226f, 0.0139688231f};
  return polynomial(u, c);
}

GCFAST_HD double erfcx_poly(double u) {
  constexpr double c[] = {-0.042640654664111708, -0.355704511359045698, 0.877095438253166646, -1.21715031699431165,
                          1.08314388948510798, -0.514405297548200207, -0.064883026755576288, 0.243722843912467139,
                          -0.0607250586704820045, -0.102662669629282688, 0.0473551049549462716,
                          0.0532863635844671556, -0.0264029154751662846, -0.0346829959892779803,
                          0.011025261028013864, 0.0251833475270213046, -0.000407983943376141055,
                          -0.0176480790394904882, -0.00591238923399909065, 0.0100950517781596059,
                          0.00712644006374419079, -0.00339992805892255881, -0.00362510783200619013};
  return polynomial(u, c);
}

template <class T> struct Sum { T hi, lo; };  // an unevaluated hi + lo

// a + b exactly (Knuth).
template <class T> GCFAST_HD Sum<T> two_sum(T a, T b) {
  const T s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

// a * b to twice the precision. Host: Dekker, since not every instruction set has an FMA; splitting by bit mask
// cannot overflow, and FMA contraction only helps. Device: one FMA, exact barring underflow. The low words may
// differ in their last bits, so results on host and device may, too; each meets the same error bounds.
template <class T> GCFAST_HD T upper_half(T a) {
  using U = decltype(Traits<T>::split_mask + 0);
  return bits<T>(static_cast<U>(bits<U>(a) & Traits<T>::split_mask));
}
#if defined(__CUDA_ARCH__)
// The intrinsic keeps the product from being contracted into a later sum: hi must be the rounded product.
GCFAST_HD Sum<float> two_prod(float a, float b) {
  const float p = __fmul_rn(a, b);
  return {p, __fmaf_rn(a, b, -p)};
}
GCFAST_HD Sum<double> two_prod(double a, double b) {
  const double p = __dmul_rn(a, b);
  return {p, __fma_rn(a, b, -p)};
}
#else
template <class T> GCFAST_HD Sum<T> two_prod(T a, T b) {
  const T p = a * b, ah = upper_half(a), al = a - ah, bh = upper_half(b), bl = b - bh;
  return {p, ((ah * bh - p) + ah * bl + al * bh) + al * bl};
}
#endif

// exp(hi + lo) for hi <= 0 as p * s * down; q = p - 1 to full relative precision.
template <class T> struct Exp {
  T p, q, s;
  GCFAST_HD T value() const { return p * s * Traits<T>::down; }
  GCFAST_HD T times(T factor) const { return (factor + factor * q) * s * Traits<T>::down; }  // without p's rounding
  // 1 - exp(t) without cancellation: q is exact in the sense above when the power of two is 1.
  GCFAST_HD T one_minus() const {
    const T power = s * Traits<T>::down;
    return (T(1) - power) - power * q;
  }
};

// 2^n up from n + magic, whose low bits hold n.
template <class T> GCFAST_HD T power_of_two(T shifted) {
  using U = decltype(Traits<T>::split_mask + 0);
  return bits<T>(static_cast<U>((bits<U>(shifted) << Traits<T>::mantissa) + bits<U>(Traits<T>::up)));
}

template <class T> GCFAST_HD Exp<T> exp_parts(T hi, T lo) {
  using R = Traits<T>;
  const T t = at_least(hi, R::exp_floor);
  const T tail = hi > R::exp_floor ? lo : T(0);
  const T shifted = t * R::log2e + R::magic, n = shifted - R::magic;
  const T r = (t - n * R::ln2_hi) + (tail - n * R::ln2_lo);
  const T q = r + (r * r) * exp_poly(r);
  return {T(1) + q, q, hi < R::exp_floor ? T(0) : power_of_two(shifted)};
}

// log(1 + y), 0 <= y <= 1.
template <class T> GCFAST_HD T log1p_unit(T y) { return y * (T(1) - y * log_poly(y - T(0.5))); }

// log(1 + y) for any y >= 0 (softmax sums): y = 2^k (1 + f) above 1.
template <class T> GCFAST_HD T log1p_any(T y) {
  using R = Traits<T>;
  using U = decltype(R::split_mask + 0);
  const T safe = at_least(y, T(1));
  // 1 + y = (1 + 1/y) y, and log y by its exponent; 1/y <= 1 goes through the same polynomial.
  const U b = bits<U>(safe);
  const U one = bits<U>(T(1));
  const T m = bits<T>(static_cast<U>((b & ((U(1) << R::mantissa) - 1)) | one));  // in [1, 2)
  const T k = bits<T>(static_cast<U>((b >> R::mantissa) - (one >> R::mantissa) + bits<U>(R::magic))) - R::magic;
  const T log_m = log1p_unit(m - T(1));
  const T extra = log1p_unit(y > T(1) ? T(1) / y : y);
  const T big = k * R::ln2_hi + (log_m + (extra + k * R::ln2_lo));
  return y > T(1) ? big : (y == y ? extra : y);
}

// beta in two pieces (a float kernel is given a double beta) and its inverse.
template <class T> struct Scale { T hi, lo, inverse; };

// exp(-|beta x|); Scaled = false is beta == 1.
template <bool Scaled, class T> GCFAST_HD Exp<T> exp_minus_abs(T x, const Scale<T>& beta) {
  const T a = -magnitude(x);
  if constexpr (!Scaled) return exp_parts(a, T(0));
  const Sum<T> t = two_prod(a, beta.hi);
  return exp_parts(t.hi, t.lo + a * beta.lo);
}

// Quotients by powers of 1 + y, y = exp(-|t|): one division of everything, since a reciprocal's error would count
// as often as it is multiplied in; and the power expanded, since the rounding of 1 + y would.
template <int N, class T> GCFAST_HD T power_of_one_plus(T y) {
  if constexpr (N == 2) return T(1) + y * (T(2) + y);
  return T(1) + y * (T(3) + y * (T(3) + y));
}

template <int K, bool Scaled, class T> GCFAST_HD T softplus(T x, const Scale<T>& beta) {
  const Exp<T> e = exp_minus_abs<Scaled>(x, beta);
  const T y = e.value(), w = T(1) + y;
  if constexpr (K == 0) {
    T low = log1p_unit(y);
    if constexpr (Scaled) low = y < T(1e-18) ? e.times(beta.inverse) : low * beta.inverse;
    return (x < T(0) ? T(0) : x) + low;
  } else if constexpr (K == 1) {
    const T r = T(1) / w;
    return x < T(0) ? y * r : r;
  } else {
    return e.times(beta.hi / power_of_one_plus<2>(y));
  }
}

template <int K, class T> GCFAST_HD T sigmoid(T x) {
  const Scale<T> one{T(1), T(0), T(1)};
  if constexpr (K < 2) return softplus<K + 1, false>(x, one);
  const Exp<T> e = exp_minus_abs<false>(x, one);
  const T v = e.times(e.one_minus() / power_of_one_plus<3>(e.value()));
  return x > T(0) ? -v : v;
}

template <int K, class T> GCFAST_HD T tanh_(T x) {
  const Exp<T> e = exp_parts(T(-2) * magnitude(x), T(0));
  const T y = e.value(), w = T(1) + y;
  if constexpr (K == 0) {
    const T v = e.one_minus() / w;
    return x < T(0) ? -v : (x == T(0) ? x : v);
  } else if constexpr (K == 1) {
    return e.times(T(4) / power_of_one_plus<2>(y));
  } else {
    const T v = e.times(T(8) * e.one_minus() / power_of_one_plus<3>(y));
    return x > T(0) ? -v : v;
  }
}

// x s(v) with v = v(x) odd, given what v does to derivatives (silu: v = x; gelu_tanh: a cubic). xc is x clamped to
// where s is not 0.
template <class T> struct Inner { T dv, xdv, xdv2, xddv; };  // v', x v', x v'^2, x v''; low words may ride on xddv

template <int K, class T> GCFAST_HD T gated(T x, T xc, const Exp<T>& e, const Inner<T>& v) {
  const T y = e.value(), w = T(1) + y;
  const bool neg = x < T(0);
  if constexpr (K == 0) {
    const T c = (neg ? xc : x) / w;
    return neg ? e.times(c) : c;
  } else if constexpr (K == 1) {
    const T c = (w + (neg ? v.xdv : y * v.xdv)) / power_of_one_plus<2>(y);
    return neg ? e.times(c) : c;
  } else {
    // s r (2 v' + x v'' + x v'^2 (1 - 2 s)) with 1 - 2 s = +-(1 - y)/(1 + y)
    const T bend = T(2) * v.dv + v.xddv, pull = neg ? v.xdv2 : -v.xdv2;
    return e.times(((bend + pull) + y * (bend - pull)) / power_of_one_plus<3>(y));
  }
}

template <int K, class T> GCFAST_HD T silu(T x) {
  const T xc = at_most(at_least(x, Traits<T>::exp_floor), -Traits<T>::exp_floor);
  return gated<K>(x, xc, exp_parts(-magnitude(x), T(0)), Inner<T>{T(1), xc, xc, T(0)});
}

template <int K, class T> GCFAST_HD T gelu_tanh(T x) {
  // v = x (A + B x^2), A = 2 sqrt(2/pi), B = 0.044715 A, in twice the precision.
  const double A = 1.5957691216057308115, B = 0.071354816272600249394;
  const T a_hi = T(A), b_hi = T(B);
  const T a_lo = sizeof(T) == 8 ? T(-9.9693088091109203146e-17) : T(A - double(a_hi));
  const T b_lo = sizeof(T) == 8 ? T(-6.1751499181553154534e-19) : T(B - double(b_hi));
  const T xc = at_most(at_least(x, T(-40)), T(40));
  const T a = -magnitude(xc);
  const Sum<T> square = two_prod(a, a);
  const Sum<T> cubic = two_prod(square.hi, b_hi);
  const Sum<T> sum = two_sum(a_hi, cubic.hi);
  const T cubic_lo = cubic.lo + (square.hi * b_lo + square.lo * b_hi), sum_lo = sum.lo + (a_lo + cubic_lo);
  const Sum<T> v = two_prod(a, sum.hi);
  const Exp<T> e = exp_parts(v.hi, v.lo + a * sum_lo);
  if constexpr (K < 2) {
    const T dv = a_hi + T(3 * B) * square.hi;
    return gated<K>(x, xc, e, Inner<T>{dv, xc * dv, T(0), T(0)});
  }
  // v' = A + 3 B x^2. Its error would count twice in x v'^2, so that is made with low words.
  const Sum<T> dv = two_sum(sum.hi, T(2) * cubic.hi), xdv = two_prod(xc, dv.hi);
  const T dv_lo = dv.lo + (sum_lo + T(2) * cubic_lo);
  const T xdv2 = xdv.hi * dv.hi + (xdv.hi * dv_lo + (xdv.lo + xc * dv_lo) * dv.hi);
  return gated<K>(x, xc, e, Inner<T>{dv.hi, xdv.hi, xdv2, T(6 * B) * square.hi + T(2) * dv_lo});
}

template <int K, class T> GCFAST_HD T gelu(T x) {
  using R = Traits<T>;
  const T inv_sqrt_2pi = T(0.3989422804014326779399461);
  const T a = at_most(magnitude(x), T(1.4142135623730951) * R::erfc_max);
  const Sum<T> square = two_prod(a, T(-0.5) * a);
  const Exp<T> e = exp_parts(square.hi, square.lo);  // exp(-x^2 / 2)
  const T v = a / (a + T(4.25));
  const T erfcx = T(0.5) + v * erfcx_poly(v - R::erfcx_centre);  // times w: erfcx(a / sqrt2) / 2
  const T w = T(1) + a;
  const bool neg = x < T(0);
  if constexpr (K == 0) {
    const T tail = e.times((neg ? -a * erfcx : erfcx) / w);
    return neg ? tail : x * (T(1) - tail);
  } else if constexpr (K == 1) {
    const T tail = e.times(erfcx / w - a * inv_sqrt_2pi);
    return neg ? tail : T(1) - tail;
  } else {
    const Sum<T> two_minus = two_sum(T(2), T(2) * square.hi);
    return e.times((two_minus.hi + (two_minus.lo + T(2) * square.lo)) * inv_sqrt_2pi);
  }
}

template <int K, class T> GCFAST_HD T relu(T x) {
  if constexpr (K == 0) return x < T(0) ? T(0) : x;
  const T nan_or_zero = x == x ? T(0) : x;
  if constexpr (K == 1) return x > T(0) ? T(1) : nan_or_zero;
  return nan_or_zero;
}

template <Act A, int K, bool Scaled, class T> GCFAST_HD T activate(T x, const Scale<T>& beta) {
  if constexpr (A == Act::softplus) return softplus<K, Scaled>(x, beta);
  else if constexpr (A == Act::sigmoid) return sigmoid<K>(x);
  else if constexpr (A == Act::tanh) return tanh_<K>(x);
  else if constexpr (A == Act::gelu) return gelu<K>(x);
  else if constexpr (A == Act::gelu_tanh) return gelu_tanh<K>(x);
  else if constexpr (A == Act::silu) return silu<K>(x);
  else return relu<K>(x);
}

}  // namespace gcfast
