// Cross-entropy, its residual and its conjugate term, accurate also where they are tiny.
//
// With k the first maximum, a_c = f_c - f_k <= 0 and s = sum over c != k of exp(a_c):
//   log-sum-exp - f_k = log1p(s),  loss = log1p(s) - sum q_c a_c,  sum p log p = (sum e_c a_c)/(1 + s) - log1p(s),
// sums of terms of one sign; and p_k - q_k = (1 - q_k) - s/(1 + s), which does not cancel when q_k = 1.
// With w_c = v_c - v_k and mu = sum over c != k of p_c w_c the curvature product is p_c (w_c - mu) and, at k, -p_k mu:
// 1 - p_k is never formed.
#include "softmax_residual.h"

#include <algorithm>
#include <limits>

#include "../core/activations.h"
#include "clones.h"

namespace gcfast::cpu {
namespace {

constexpr int kLanes = 16;         // rows side by side, one a SIMD lane, when a row is short
constexpr int64_t kShortRow = 64;  // longer rows are vectorised along themselves

template <class T> struct Terms { T e, a; };

template <class T> GCFAST_HD Terms<T> term(T f, T max) {
  const Sum<T> d = two_sum(f, -max);  // an ulp lost here would be |a| ulps in exp
  return {exp_parts(d.hi, d.lo).value(), d.hi};
}
// a where it multiplies e: e is 0 there, and 0 * inf must be 0.
template <class T> GCFAST_HD T finite(T a) { return at_least(a, Traits<T>::exp_floor); }
template <class T> GCFAST_HD T weighted(T q, T a) { return q == T(0) ? T(0) : q * a; }

template <class T> struct Smoothing {
  T keep, spread, rest;  // q = keep * y + spread;  1 - q = keep * (1 - y) + rest
  Smoothing(double eps, int64_t c) : keep(T(1.0 - eps)), spread(T(eps / c)), rest(T(eps * (c - 1) / c)) {}
};

// Columns j of `count` <= kLanes rows side by side: scratch[j * kLanes + lane]; spare lanes repeat the last row.
template <class T> GCFAST_HD void to_lanes(const T* f, int64_t stride, int64_t c, int count, T* scratch) {
  for (int l = 0; l < kLanes; ++l) {
    const T* row = f + std::min(l, count - 1) * stride;
    for (int64_t j = 0; j < c; ++j) scratch[j * kLanes + l] = row[j];
  }
}

// The first maximum of each lane.
template <class T, class I> GCFAST_HD void lanes_max(const T* scratch, int64_t c, T* max, I* arg) {
  for (int l = 0; l < kLanes; ++l) max[l] = -std::numeric_limits<T>::infinity(), arg[l] = 0;
  for (int64_t j = 0; j < c; ++j) {
    const T* v = scratch + j * kLanes;
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const bool more = v[l] > max[l];
      max[l] = more ? v[l] : max[l];
      arg[l] = more ? I(j) : arg[l];
    }
  }
}

template <class T> GCFAST_HD int64_t first_max(const T* f, int64_t c, T& max) {
  T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < c; ++j) top = f[j] > top ? f[j] : top;
  int64_t k = 0;
  while (k < c - 1 && f[k] != top) ++k;
  max = top;
  return k;
}

// Partial sums: the error of a long sum grows with the chunk, not with c. A vectorised loop has as many sums side by
// side as a vector has elements. A build that does not vectorise such loops (for sanitizers, without optimisation) has
// one, which is as exact if it is shorter. Which of both this is, the sum of a loop like those below tells: in one alone
// every 1 is lost beside the first term. Inlined, for each instruction set is compiled on its own.
template <class T> GCFAST_HD bool sums_are_vectorised() {
  constexpr int64_t n = 512;
  volatile T first = T(4) / std::numeric_limits<T>::epsilon(), one = 1, zero = 0;  // a compiler must not know the sum
  T f[n], v[n], out[n], max = zero, s = 0, sum = 0;
  for (int64_t j = 0; j < n; ++j) f[j] = zero, v[j] = j ? one : first;
  const int64_t k = first_max(f, n, max) - 1;  // no column
#pragma omp simd reduction(+ : s, sum)
  for (int64_t j = 0; j < n; ++j) {
    const T e = j == k ? T(0) : term(f[j], max).e;
    s += e;
    sum += e * (v[j] - max);
    out[j] = e;
  }
  return sum * (out[1] + s - s) > first;
}
template <class T> GCFAST_HD int64_t chunk_of_a_sum(int64_t c) {
  static const bool vectorised = sums_are_vectorised<T>();
  int64_t chunk = vectorised ? 512 : 32;
  while (!vectorised && chunk * chunk < c) chunk *= 2;  // as many chunks as terms in one
  return chunk;
}

// `count` <= kLanes rows starting at row i; scratch holds c * kLanes.
template <class T> GCFAST_HD void lanes(const SoftmaxArgs<T>& a, int64_t i, int count, T* scratch) {
  using I = typename Traits<T>::Int;
  const int64_t c = a.c;
  const Smoothing<T> sm(a.smoothing, c);
  const bool smooth = a.smoothing != 0.0;
  alignas(64) T max[kLanes], s[kLanes], sa[kLanes], all[kLanes], qs[kLanes], qa[kLanes], ya[kLanes], bad[kLanes];
  alignas(64) I arg[kLanes], label[kLanes];
  to_lanes(a.logits + i * a.logits_stride, a.logits_stride, c, count, scratch);
  lanes_max(scratch, c, max, arg);
  for (int l = 0; l < kLanes; ++l) {
    const int64_t row = i + std::min(l, count - 1), wanted = a.labels ? a.labels[row] : 0;
    const bool inside = wanted >= 0 && wanted < c;
    label[l] = I(inside ? wanted : 0);
    bad[l] = inside ? T(0) : std::numeric_limits<T>::quiet_NaN();
    ya[l] = scratch[label[l] * kLanes + l];
    s[l] = sa[l] = all[l] = qs[l] = qa[l] = T(0);
  }
  for (int64_t j = 0; j < c; ++j) {
    T* v = scratch + j * kLanes;
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const Terms<T> t = term(v[l], max[l]);
      const T e = I(j) == arg[l] ? T(0) : t.e;
      s[l] += e;
      sa[l] += e * finite(t.a);
      all[l] += t.a;
      v[l] = e;
    }
  }
  if (a.probs) {
    for (int l = 0; l < count; ++l) {
      const T *y = a.probs + (i + l) * a.probs_stride, *f = a.logits + (i + l) * a.logits_stride;
      for (int64_t j = 0; j < c; ++j) {
        const T q = sm.keep * y[j] + sm.spread;
        qs[l] += q;
        qa[l] += weighted(q, f[j] - max[l]);
      }
    }
  }
  alignas(64) T inv[kLanes], at_max[kLanes], loss[kLanes], ent[kLanes];
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const T poison = (max[l] - max[l]) + bad[l];  // NaN when the maximum is infinite
    const T log_sum = log1p_any(s[l]) + poison;
    inv[l] = T(1) / (T(1) + s[l] + poison);
    at_max[l] = s[l] * inv[l];
    ent[l] = sa[l] * inv[l] - log_sum;
    const T hard = max[l] - ya[l];
    const T mixed = sm.keep * hard - sm.spread * all[l];
    loss[l] = a.probs ? qs[l] * log_sum - qa[l] : log_sum + (smooth ? mixed : hard);
  }
  for (int l = 0; l < count; ++l) {
    T* r = a.residual + (i + l) * c;
    const T* y = a.probs ? a.probs + (i + l) * a.probs_stride : nullptr;
    const T w = inv[l];
    if (y) {
      for (int64_t j = 0; j < c; ++j) r[j] = scratch[j * kLanes + l] * w - (sm.keep * y[j] + sm.spread);
      r[arg[l]] = (sm.keep * (T(1) - y[arg[l]]) + sm.rest) - at_max[l];
    } else {
      for (int64_t j = 0; j < c; ++j) r[j] = scratch[j * kLanes + l] * w - sm.spread;
      r[label[l]] -= sm.keep;
      r[arg[l]] = (label[l] == arg[l] ? sm.rest : sm.keep + sm.rest) - at_max[l];
    }
    a.loss[i + l] = loss[l];
    a.neg_entropy[i + l] = ent[l];
  }
}

template <class T> GCFAST_HD void long_row(const SoftmaxArgs<T>& a, int64_t i) {
  const int64_t c = a.c;
  const Smoothing<T> sm(a.smoothing, c);
  const T* f = a.logits + i * a.logits_stride;
  const T* y = a.probs ? a.probs + i * a.probs_stride : nullptr;
  T* r = a.residual + i * c;
  T max;
  const int64_t k = first_max(f, c, max);
  const int64_t wanted = y ? 0 : a.labels[i];
  const bool inside = wanted >= 0 && wanted < c;
  const int64_t label = inside ? wanted : 0;

  T s = 0, sa = 0, all = 0, qs = 0, qa = 0;
  const int64_t chunk = chunk_of_a_sum<T>(c);
  for (int64_t j0 = 0; j0 < c; j0 += chunk) {
    const int64_t j1 = std::min(c, j0 + chunk);
    T s1 = 0, sa1 = 0, all1 = 0, qs1 = 0, qa1 = 0;
#pragma omp simd reduction(+ : s1, sa1, all1)
    for (int64_t j = j0; j < j1; ++j) {
      const Terms<T> t = term(f[j], max);
      const T e = j == k ? T(0) : t.e;
      s1 += e;
      sa1 += e * finite(t.a);
      all1 += t.a;
      r[j] = e;
    }
    if (y) {
#pragma omp simd reduction(+ : qs1, qa1)
      for (int64_t j = j0; j < j1; ++j) {
        const T q = sm.keep * y[j] + sm.spread;
        qs1 += q;
        qa1 += weighted(q, f[j] - max);
      }
    }
    s += s1, sa += sa1, all += all1, qs += qs1, qa += qa1;
  }
  const T poison = inside ? max - max : std::numeric_limits<T>::quiet_NaN();
  const T log_sum = log1p_any(s) + poison, w = T(1) / (T(1) + s + poison);
  a.neg_entropy[i] = sa * w - log_sum;
  if (y) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) r[j] = r[j] * w - (sm.keep * y[j] + sm.spread);
    r[k] = (sm.keep * (T(1) - y[k]) + sm.rest) - s * w;
    a.loss[i] = qs * log_sum - qa;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) r[j] = r[j] * w - sm.spread;
    r[label] -= sm.keep;
    r[k] = (label == k ? sm.rest : sm.keep + sm.rest) - s * w;
    const T hard = max - f[label];
    a.loss[i] = log_sum + (a.smoothing != 0.0 ? sm.keep * hard - sm.spread * all : hard);
  }
}

// scratch holds 2 * c * kLanes.
template <class T> GCFAST_HD void lanes(const CurvatureArgs<T>& a, int64_t i, int count, T* scratch) {
  using I = typename Traits<T>::Int;
  const int64_t c = a.c;
  T* const w = scratch + c * kLanes;
  alignas(64) T max[kLanes], s[kLanes], mu[kLanes], at_max[kLanes];
  alignas(64) I arg[kLanes];
  to_lanes(a.logits + i * a.logits_stride, a.logits_stride, c, count, scratch);
  to_lanes(a.v + i * a.v_stride, a.v_stride, c, count, w);
  lanes_max(scratch, c, max, arg);
  for (int l = 0; l < kLanes; ++l) at_max[l] = w[arg[l] * kLanes + l], s[l] = mu[l] = T(0);
  for (int64_t j = 0; j < c; ++j) {
    T *f = scratch + j * kLanes, *v = w + j * kLanes;
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T e = I(j) == arg[l] ? T(0) : term(f[l], max[l]).e;
      v[l] -= at_max[l];
      s[l] += e;
      mu[l] += e * v[l];
      f[l] = e;
    }
  }
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    s[l] = T(1) / (T(1) + s[l] + (max[l] - max[l]));
    mu[l] *= s[l];
  }
  for (int64_t j = 0; j < c; ++j) {
    T *f = scratch + j * kLanes, *v = w + j * kLanes;
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) f[l] = (I(j) == arg[l] ? T(1) : f[l]) * s[l] * (v[l] - mu[l]);
  }
  for (int l = 0; l < count; ++l) {
    T* out = a.out + (i + l) * c;
    for (int64_t j = 0; j < c; ++j) out[j] = scratch[j * kLanes + l];
  }
}

template <class T> GCFAST_HD void long_row(const CurvatureArgs<T>& a, int64_t i) {
  const int64_t c = a.c;
  const T *f = a.logits + i * a.logits_stride, *v = a.v + i * a.v_stride;
  T* out = a.out + i * c;
  T max, s = 0, mu = 0;
  const int64_t k = first_max(f, c, max);
  const T at_max = v[k];
  const int64_t chunk = chunk_of_a_sum<T>(c);
  for (int64_t j0 = 0; j0 < c; j0 += chunk) {
    const int64_t j1 = std::min(c, j0 + chunk);
    T s1 = 0, mu1 = 0;
#pragma omp simd reduction(+ : s1, mu1)
    for (int64_t j = j0; j < j1; ++j) {
      const T e = j == k ? T(0) : term(f[j], max).e;
      s1 += e;
      mu1 += e * (v[j] - at_max);
      out[j] = e;
    }
    s += s1, mu += mu1;
  }
  const T inverse = T(1) / (T(1) + s + (max - max));
  mu *= inverse;
  out[k] = T(1);
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) out[j] = out[j] * inverse * ((v[j] - at_max) - mu);
}

#define GCFAST_SOFTMAX(ARGS, T, NAME)                                                                        \
  GCFAST_CLONES void NAME##_lanes(const ARGS<T>& a, int64_t begin, int64_t end, T* scratch) {                \
    for (int64_t i = begin; i < end; i += kLanes)                                                            \
      lanes(a, i, static_cast<int>(std::min<int64_t>(kLanes, end - i)), scratch);                            \
  }                                                                                                          \
  GCFAST_CLONES void NAME##_rows(const ARGS<T>& a, int64_t begin, int64_t end, T*) {                         \
    for (int64_t i = begin; i < end; ++i) long_row(a, i);                                                    \
  }
GCFAST_SOFTMAX(SoftmaxArgs, float, residual_f32)
GCFAST_SOFTMAX(SoftmaxArgs, double, residual_f64)
GCFAST_SOFTMAX(CurvatureArgs, float, curvature_f32)
GCFAST_SOFTMAX(CurvatureArgs, double, curvature_f64)

template <class T, class Args, class F> void run(const Args& a, F short_rows, F long_rows) {
  if (a.rows <= 0 || a.c <= 0) return;
  const bool is_short = a.c <= kShortRow;
  // About 4,096 elements a task: enough to hide the scheduling, few enough to balance.
  const int64_t step = is_short ? std::max<int64_t>(1, 4096 / (a.c * kLanes)) * kLanes : std::max<int64_t>(1, 4096 / a.c);
  const int64_t tasks = (a.rows + step - 1) / step;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(a.threads, tasks)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tasks; ++t) {
    alignas(64) T scratch[2 * kShortRow * kLanes];
    (is_short ? short_rows : long_rows)(a, t * step, std::min(a.rows, (t + 1) * step), scratch);
  }
}

}  // namespace

void softmax_residual(const SoftmaxArgs<float>& a) { run<float>(a, residual_f32_lanes, residual_f32_rows); }
void softmax_residual(const SoftmaxArgs<double>& a) { run<double>(a, residual_f64_lanes, residual_f64_rows); }
void softmax_curvature(const CurvatureArgs<float>& a) { run<float>(a, curvature_f32_lanes, curvature_f32_rows); }
void softmax_curvature(const CurvatureArgs<double>& a) { run<double>(a, curvature_f64_lanes, curvature_f64_rows); }

}  // namespace gcfast::cpu
