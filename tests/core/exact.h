// Activations to more digits than the type under test: float against double, double against long double. What is
// fed to an exponential is computed wider still and given in two pieces.
#pragma once
#include <cfloat>
#include <cmath>
#include <limits>

#include "../../csrc/core/activations.h"

namespace exact {

#if LDBL_MANT_DIG == 64 && defined(__SIZEOF_FLOAT128__)
constexpr bool kHasTruthForDouble = true;
using Quad = __float128;
#else
constexpr bool kHasTruthForDouble = false;  // long double is no wider than double, or so wide that this is slow
using Quad = long double;
#endif

template <class T> struct Types;
template <> struct Types<float> { using Real = double; using Wide = long double; };
template <> struct Types<double> { using Real = long double; using Wide = Quad; };

// value, and the sum of the magnitudes of its terms where it is a difference of them
template <class R> struct Value { R value, terms; };

// Literals end at 64 bits; a second one continues them.
template <class W> constexpr W kInvSqrt2 = W(0.707106781186547524381894L) + W(1.895032558893257079655062e-20L);
template <class W> constexpr W kTwoSqrt2OverPi = W(1.595769121605730711706272L) + W(5.351177755720478292013163e-20L);
template <class R, class W> R exp_of(W t) {
  const R hi = static_cast<R>(t);
  const R e = std::exp(hi);
  return e == R(0) ? e : e + e * static_cast<R>(t - W(hi));
}

template <class R, class W> struct Logistic {  // s = sigma(v), r = sigma(-v), th = tanh(v/2)
  R s, r, th;
  explicit Logistic(W v) {
    const R e = exp_of<R>(v < 0 ? v : -v);
    const R big = R(1) / (R(1) + e), little = e / (R(1) + e);
    const R m = v < 0 ? std::expm1(static_cast<R>(v)) : std::expm1(static_cast<R>(-v));
    s = v < 0 ? little : big;
    r = v < 0 ? big : little;
    th = (v < 0 ? m : -m) / (R(1) + e);
  }
};

template <class R, class W> Value<R> gated(W x, W v, W dv, W ddv, int order) {
  const Logistic<R, W> l(v);
  const R xr = static_cast<R>(x), d = static_cast<R>(dv), dd = static_cast<R>(ddv), a = std::fabs(xr);
  if (order == 0) return {xr * l.s, std::fabs(xr * l.s)};
  if (order == 1) return {l.s + xr * l.s * l.r * d, l.s + a * l.s * l.r * d};
  const R scale = l.s * l.r;
  return {scale * (R(2) * d + xr * dd - xr * d * d * l.th),
          scale * (R(2) * d + a * std::fabs(dd) + a * d * d * std::fabs(l.th))};
}

template <class R, class W> Value<R> gelu(W x, int order) {
  const R pi = R(3.14159265358979323846264338327950288L);
  const R density = exp_of<R>(x * x / W(-2)) / std::sqrt(R(2) * pi), xr = static_cast<R>(x), a = std::fabs(xr);
  const W z = -x * kInvSqrt2<W>;
  const R z_hi = static_cast<R>(z), z_lo = static_cast<R>(z - W(z_hi));
  const R cdf = (std::erfc(z_hi) - R(2) / std::sqrt(pi) * exp_of<R>(-z * z) * z_lo) / R(2);
  if (order == 0) return {xr * cdf, std::fabs(xr * cdf)};
  if (order == 1) return {cdf + xr * density, cdf + a * density};
  return {density * static_cast<R>(W(2) - x * x), density * (R(2) + xr * xr)};
}

template <class T>
Value<typename Types<T>::Real> activation(gcfast::Act act, int order, T at, double beta_) {
  using R = typename Types<T>::Real;
  using W = typename Types<T>::Wide;
  const W x = at, beta = beta_;
  const auto single = [](R v) { return Value<R>{v, std::fabs(v)}; };
  switch (act) {
    case gcfast::Act::softplus: {
      const W t = beta * x;
      if (order == 0) {
        const R low = std::log1p(exp_of<R>(t < 0 ? t : -t)) / static_cast<R>(beta);
        return single(at < 0 ? low : static_cast<R>(x) + low);
      }
      const Logistic<R, W> l(t);
      return single(order == 1 ? l.s : static_cast<R>(beta) * l.s * l.r);
    }
    case gcfast::Act::sigmoid: {
      const Logistic<R, W> l(x);
      return single(order == 0 ? l.s : order == 1 ? l.s * l.r : -l.s * l.r * l.th);
    }
    case gcfast::Act::tanh: {
      const Logistic<R, W> l(W(2) * x);
      return single(order == 0 ? l.th : order == 1 ? R(4) * l.s * l.r : R(-8) * l.th * l.s * l.r);
    }
    case gcfast::Act::gelu: return gelu<R, W>(x, order);
    case gcfast::Act::gelu_tanh: {
      const W k = kTwoSqrt2OverPi<W>, c = W(44715) / W(1000000);
      return gated<R, W>(x, k * (x + c * x * x * x), k * (W(1) + W(3) * c * x * x), W(6) * k * c * x, order);
    }
    case gcfast::Act::silu: return gated<R, W>(x, x, W(1), W(0), order);
    case gcfast::Act::relu: return single(order == 0 ? (at > 0 ? R(at) : R(0)) : order == 1 && at > 0 ? R(1) : R(0));
  }
  return single(R(0));
}

// |got - want| in spacings of T at `terms`.
template <class T, class R> double ulps(T got, Value<R> want) {
  using L = std::numeric_limits<T>;
  const R largest = R(L::max());
  if (std::fabs(want.value) > largest && std::isinf(got)) return 0;
  int exponent = 0;
  std::frexp(want.terms, &exponent);
  if (want.terms == 0 || exponent < L::min_exponent) exponent = L::min_exponent;
  return static_cast<double>(std::fabs(R(got) - want.value) / std::ldexp(R(1), exponent - L::digits));
}

}  // namespace exact
