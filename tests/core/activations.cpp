// csrc/core/activations.h: every activation and order, ulps from the exact value, hostile values.
//   activations [--stride N] [--worst]
// takes every N-th of the 2^32 floats (default 4099; 1 is exhaustive and takes hours); --worst prints the largest
// distances instead of only failing above the limits.
#include "../../csrc/core/activations.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "check.h"
#include "exact.h"

using namespace gcfast;

namespace {

const char* const kNames[] = {"softplus", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "relu"};
// Largest distance from the exact value, in ulps of it (of the sum of its terms, where a derivative crosses 0).
#if defined(__FMA__)
constexpr double kLimit = 4;
#else
constexpr double kLimit = 4.5;  // a product rounded before it is added: 4.1 was seen
#endif
constexpr double limit_of(Act act) { return act == Act::relu ? 0 : kLimit; }

uint64_t stride = 4099;
bool show_worst = false;

template <class T> Scale<T> scale_of(double beta) {
  const T hi = static_cast<T>(beta);
  return {hi, static_cast<T>(beta - static_cast<double>(hi)), static_cast<T>(1.0 / beta)};
}

// f(x) for the floats of a stride through their bit patterns; for doubles, as many patterns and a linear sweep.
template <class F> void each(float, F f) {
  for (uint64_t i = 0; i < (uint64_t(1) << 32); i += stride) f(bits<float>(static_cast<uint32_t>(i)));
}
template <class F> void each(double, F f) {
  const uint64_t count = (uint64_t(1) << 32) / stride / 4, step = ~uint64_t(0) / count;
  for (uint64_t i = 0; i < count; ++i) f(bits<double>(i * step));
  for (uint64_t i = 0; i < count; ++i) {
    const double u = 2.0 * double(i) / double(count) - 1.0;
    f(4 * u);
    f(40 * u);
    f(750 * u);
  }
}

template <class T, Act A, int K, bool Scaled> void distance(double beta) {
  const Scale<T> scale = scale_of<T>(beta);
  double worst = 0;
  T where = 0;
  each(T(0), [&](T x) {
    if (!(magnitude(x) <= std::numeric_limits<T>::max())) return;
    const double u = exact::ulps<T>(activate<A, K, Scaled>(x, scale), exact::activation<T>(A, K, x, beta));
    if (!(u <= worst)) worst = u, where = x;
  });
  const double limit = limit_of(A);
  CHECK(worst <= limit, "%s of %zu bytes, order %d, beta %g: %.2f ulps at %.17g", kNames[int(A)], sizeof(T), K, beta,
        worst, double(where));
  if (show_worst)
    std::printf("%-10s %-6s order %d beta %-5g %6.3f ulps at %.17g\n", kNames[int(A)],
                sizeof(T) == 4 ? "float" : "double", K, beta, worst, double(where));
}

struct Limits { double low, high; };  // at -inf and inf
constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T, Act A, int K, bool Scaled> void hostile(double beta) {
  const Scale<T> scale = scale_of<T>(beta);
  constexpr bool saturates = A == Act::sigmoid || A == Act::tanh;
  const double low = A == Act::tanh && K == 0 ? -1 : 0;
  const double high = K == 0 ? (saturates ? 1 : kInf) : K == 1 && !saturates ? 1 : 0;
  const auto f = [&](double x) { return double(activate<A, K, Scaled>(static_cast<T>(x), scale)); };
  const double big = double(std::numeric_limits<T>::max()), tiny = double(std::numeric_limits<T>::denorm_min());
  const char* name = kNames[int(A)];
  CHECK(f(-kInf) == low && f(kInf) == high, "%s order %d: %g, %g", name, K, f(-kInf), f(kInf));
  CHECK(f(-big) == low, "%s order %d: %g", name, K, f(-big));
  CHECK(f(big) == (high == kInf ? big : high), "%s order %d: %g", name, K, f(big));
  CHECK(std::isnan(f(std::numeric_limits<double>::quiet_NaN())), "%s order %d", name, K);
  for (double x : {0.0, -0.0, tiny, -tiny, 1e-30, -1e-30})
    CHECK(exact::ulps<T>(T(f(x)), exact::activation<T>(A, K, static_cast<T>(x), beta)) <= limit_of(A),
          "%s order %d at %g: %g", name, K, x, f(x));
}

template <class T, Act A, bool Scaled = false> void all_orders(double beta = 1) {
  hostile<T, A, 0, Scaled>(beta);
  hostile<T, A, 1, Scaled>(beta);
  hostile<T, A, 2, Scaled>(beta);
  if (sizeof(T) == 8 && !exact::kHasTruthForDouble) return;
  distance<T, A, 0, Scaled>(beta);
  distance<T, A, 1, Scaled>(beta);
  distance<T, A, 2, Scaled>(beta);
}

template <class T> void all() {
  all_orders<T, Act::softplus>();
  for (double beta : {0.1, 3.7, 100.0}) all_orders<T, Act::softplus, true>(beta);
  all_orders<T, Act::sigmoid>();
  all_orders<T, Act::tanh>();
  all_orders<T, Act::gelu>();
  all_orders<T, Act::gelu_tanh>();
  all_orders<T, Act::silu>();
  all_orders<T, Act::relu>();
}

// The building blocks that softmax uses on its own, and the error-free ones.
template <class T> void pieces() {
  using R = typename exact::Types<T>::Real;
  using W = typename exact::Types<T>::Wide;
  const T eps = std::numeric_limits<T>::epsilon();
  double worst_log = 0, worst_prod = 0;
  bool sums_exact = true;
  uint64_t state = 88172645463325252ull;
  const auto uniform = [&] {  // xorshift
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return T(state >> 11) * T(1.1102230246251565e-16);
  };
  for (int i = 0; i < 100000; ++i) {
    const T a = (uniform() - T(0.5)) * T(std::ldexp(1.0, i % 60 - 30)), b = uniform() - T(0.5);
    const Sum<T> p = two_prod(a, b), s = two_sum(a, b);
    const W exact_product = W(a) * W(b), error = exact_product - (W(p.hi) + W(p.lo));
    if (exact_product != 0)
      worst_prod = std::fmax(worst_prod, std::fabs(double(error / exact_product)) / (double(eps) * double(eps)));
    sums_exact = sums_exact && W(s.hi) + W(s.lo) == W(a) + W(b) && s.hi == a + b;
    const T y = T(std::ldexp(double(uniform()), i % 90 - 60));
    const R want = std::log1p(R(y));
    worst_log = std::fmax(worst_log, exact::ulps<T>(log1p_any(y), exact::Value<R>{want, want}));
  }
  CHECK(worst_prod <= 1, "two_prod of %zu bytes is off by %g eps^2", sizeof(T), worst_prod);
  CHECK(sums_exact || sizeof(W) == sizeof(T), "two_sum of %zu bytes is not exact", sizeof(T));
  CHECK(worst_log <= 4, "log1p_any of %zu bytes: %g ulps", sizeof(T), worst_log);
  CHECK(std::isnan(log1p_any(T(NAN))) && log1p_any(T(0)) == 0, "log1p_any at NaN, 0");
}

#if defined(__CUDACC__)
template <class T> __global__ void on_device(T* x, Scale<T> beta) {
  x[threadIdx.x] = activate<Act::softplus, 0, true>(x[threadIdx.x], beta) + log1p_any(x[threadIdx.x]);
}
template __global__ void on_device<float>(float*, Scale<float>);
template __global__ void on_device<double>(double*, Scale<double>);
#endif

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--stride" && i + 1 < argc) stride = std::strtoull(argv[++i], nullptr, 10);
    if (std::string(argv[i]) == "--worst") show_worst = true;
  }
  if (stride == 0) return 2;
  all<float>();
  all<double>();
  pieces<float>();
  if (exact::kHasTruthForDouble) pieces<double>();
  return report();
}
