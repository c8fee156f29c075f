// Cross-entropy, its residual and its conjugate term, accurate also where they are tiny.
//
// With k the first maximum, a_c = f_c - f_k <= 0 and s = sum over c != k of exp(a_c):
//   log-sum-exp - f_k = log1p(s),  loss = log1p(s) - sum q_c a_c,  sum p log p = (sum e_c a_c)/(1 + s) - log1p(s),
// sums of terms of one sign; and p_k - q_k = (1 - q_k) - s/(1 + s), which does not cancel when q_k = 1.
#include "softmax_residual.h"

#include <algorithm>
#include <limits>

#include "../core/activations.h"
#include "clones.h"

namespace gcfast::cpu {
namespace {

constexpr int kLanes = 16;         // rows side by side, one a SIMD lane, when a row is short
constexpr int64_t kShortRow = 64;  // longer rows are vectorised along themselves
constexpr int64_t kChunk = 512;    // partial sums: the error of a long sum grows with kChunk, not with c

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

// `count` <= kLanes rows starting at row i; scratch holds c * kLanes.
template <class T> GCFAST_HD void lanes(const SoftmaxArgs<T>& a, int64_t i, int count, T* scratch) {
  using I = typename Traits<T>::Int;
  const int64_t c = a.c;
  const Smoothing<T> sm(a.smoothing, c);
  const bool smooth = a.smoothing != 0.0;
  alignas(64) T max[kLanes], s[kLanes], sa[kLanes], all[kLanes], qs[kLanes], qa[kLanes], ya[kLanes];
  alignas(64) I arg[kLanes], label[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int64_t row = i + std::min(l, count - 1);  // spare lanes repeat the last row
    const T* f = a.logits + row * a.logits_stride;
    for (int64_t j = 0; j < c; ++j) scratch[j * kLanes + l] = f[j];
    label[l] = a.labels ? I(a.labels[row]) : I(-1);
    ya[l] = a.labels ? f[label[l]] : T(0);
    max[l] = -std::numeric_limits<T>::infinity();
    arg[l] = 0;
    s[l] = sa[l] = all[l] = qs[l] = qa[l] = T(0);
  }
  for (int64_t j = 0; j < c; ++j) {
    const T* v = scratch + j * kLanes;
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const bool more = v[l] > max[l];
      max[l] = more ? v[l] : max[l];
      arg[l] = more ? I(j) : arg[l];
    }
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
    const T poison = max[l] - max[l];  // NaN when the maximum is infinite
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
  T max = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < c; ++j) max = f[j] > max ? f[j] : max;
  int64_t k = 0;
  while (k < c - 1 && f[k] != max) ++k;

  T s = 0, sa = 0, all = 0, qs = 0, qa = 0;
  for (int64_t j0 = 0; j0 < c; j0 += kChunk) {
    const int64_t j1 = std::min(c, j0 + kChunk);
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
  const T poison = max - max, log_sum = log1p_any(s) + poison, w = T(1) / (T(1) + s + poison);
  a.neg_entropy[i] = sa * w - log_sum;
  if (y) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) r[j] = r[j] * w - (sm.keep * y[j] + sm.spread);
    r[k] = (sm.keep * (T(1) - y[k]) + sm.rest) - s * w;
    a.loss[i] = qs * log_sum - qa;
  } else {
    const int64_t label = a.labels[i];
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) r[j] = r[j] * w - sm.spread;
    r[label] -= sm.keep;
    r[k] = (label == k ? sm.rest : sm.keep + sm.rest) - s * w;
    const T hard = max - f[label];
    a.loss[i] = log_sum + (a.smoothing != 0.0 ? sm.keep * hard - sm.spread * all : hard);
  }
}

#define GCFAST_SOFTMAX(T, SUFFIX)                                                                            \
  GCFAST_CLONES void lanes_##SUFFIX(const SoftmaxArgs<T>& a, int64_t begin, int64_t end, T* scratch) {       \
    for (int64_t i = begin; i < end; i += kLanes)                                                            \
      lanes(a, i, static_cast<int>(std::min<int64_t>(kLanes, end - i)), scratch);                            \
  }                                                                                                          \
  GCFAST_CLONES void long_rows_##SUFFIX(const SoftmaxArgs<T>& a, int64_t begin, int64_t end, T*) {           \
    for (int64_t i = begin; i < end; ++i) long_row(a, i);                                                    \
  }
GCFAST_SOFTMAX(float, f32)
GCFAST_SOFTMAX(double, f64)

template <class T, class F> void run(const SoftmaxArgs<T>& a, F short_rows, F long_rows) {
  if (a.rows <= 0 || a.c <= 0) return;
  const bool is_short = a.c <= kShortRow;
  // About 4,096 elements a task: enough to hide the scheduling, few enough to balance.
  const int64_t step = is_short ? std::max<int64_t>(1, 4096 / (a.c * kLanes)) * kLanes : std::max<int64_t>(1, 4096 / a.c);
  const int64_t tasks = (a.rows + step - 1) / step;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(a.threads, tasks)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tasks; ++t) {
    alignas(64) T scratch[kShortRow * kLanes];
    (is_short ? short_rows : long_rows)(a, t * step, std::min(a.rows, (t + 1) * step), scratch);
  }
}

}  // namespace

void softmax_residual(const SoftmaxArgs<float>& a) { run(a, lanes_f32, long_rows_f32); }
void softmax_residual(const SoftmaxArgs<double>& a) { run(a, lanes_f64, long_rows_f64); }

}  // namespace gcfast::cpu
