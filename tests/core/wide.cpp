// csrc/cpu/wide.cpp: every function on ragged sizes against sums in double, each operand in a heap block of exactly
// its size, so that a sanitizer sees an access beyond it; and AMX products on a model of the tiles.
#ifdef __CUDACC__  // of the CPU alone
int main() { return 0; }
#else
inline int forced_level = -1;
#define GCFAST_LEVEL (forced_level < 0 || forced_level > instruction_level() ? instruction_level() : forced_level)
#include "../../csrc/cpu/wide.cpp"

#include <cmath>
#include <vector>

#include "../../csrc/cpu/activation.cpp"
#include "check.h"

using namespace gcfast::cpu;

namespace {

// Intel's definition: dot adds, for each of 16 x 16 sums, 16 pairs of products; a pair of B stands in a row.
struct ModelAmx {
  inline static uint8_t tile[8][16][64];
  template <int T> static void zero() { memset(tile[T], 0, sizeof(tile[T])); }
  template <int T> static void load(const void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r) memcpy(tile[T][r], static_cast<const uint8_t*>(p) + r * stride, 64);
  }
  template <int T> static void store(void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r) memcpy(static_cast<uint8_t*>(p) + r * stride, tile[T][r], 64);
  }
  static float half(const uint8_t* p) {
    uint32_t b = 0;
    memcpy(reinterpret_cast<uint8_t*>(&b) + 2, p, 2);
    float x;
    memcpy(&x, &b, 4);
    return x;
  }
  template <int C, int A, int B> static void dot() {
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        float sum;
        memcpy(&sum, &tile[C][m][4 * n], 4);
        for (int k = 0; k < 32; ++k) sum += half(&tile[A][m][2 * k]) * half(&tile[B][k / 2][4 * n + 2 * (k % 2)]);
        memcpy(&tile[C][m][4 * n], &sum, 4);
      }
  }
};

uint32_t state = 1;
double uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<double>(state >> 8) / (1 << 23) - 1.0;
}
template <class T> std::vector<T> some(int64_t size) {
  std::vector<T> v(size);
  for (T& x : v) x = static_cast<T>(uniform());
  return v;
}

void amx(int64_t rows, int64_t d) {
  const std::vector<float> z = some<float>(rows * d), w = some<float>(kPairBlock * d);
  const int64_t depth = bf16_depth(d), all = padded(rows, 16);
  std::vector<uint16_t> zh(all * depth), wh(kPairBlock * depth);
  to_bf16(z.data(), d, rows, d, zh.data());
  to_bf16(w.data(), d, kPairBlock, d, wh.data());
  std::vector<uint32_t> packed(depth / 2 * kPairBlock);
  for (int64_t j = 0; j < kPairBlock; ++j)
    for (int64_t k = 0; k < depth; k += 2)
      packed[k / 2 * kPairBlock + j] = wh[j * depth + k] | uint32_t{wh[j * depth + k + 1]} << 16;
  std::vector<float> out(all * kPairBlock, NAN);
  amx_product<ModelAmx>(rows, zh.data(), depth, packed.data(), out.data());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kPairBlock; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < d; ++k)
        sum += double(ModelAmx::half(reinterpret_cast<uint8_t*>(&zh[i * depth + k]))) *
               ModelAmx::half(reinterpret_cast<uint8_t*>(&wh[j * depth + k]));
      CHECK(std::fabs(out[i * kPairBlock + j] - sum) < 1e-6 * (d + 1), "%g for %g", out[i * kPairBlock + j], sum);
    }
}

template <class T> void layer(int64_t n, int64_t m, int64_t d, int64_t c, int act, int threads, bool bf16) {
  const int64_t zs = d + n % 3, ws = d + m % 2, rs = c + n % 2, hs = m + c % 2;
  const std::vector<T> z = some<T>((n - 1) * zs + d), w = some<T>((m - 1) * ws + d), b = some<T>(m);
  const std::vector<T> r = some<T>((n - 1) * rs + c), h = some<T>((c - 1) * hs + m), hb = some<T>(c);
  const WideLayer<T> a{z.data(), w.data(), b.data(), n, d, m, zs, ws, act, 1.0, bf16, threads};
  std::vector<double> phi(n * m), slope(n * m), forward(n * c), grad(c * m), dz(n * d), dw(m * d), db(m), gram(n * c);
  const gcfast::Scale<double> one{1.0, 0.0, 1.0};
  const auto f = activation_block<double>(act, 0, 1.0), g = activation_block<double>(act, 1, 1.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      double pre = b[j];
      for (int64_t k = 0; k < d; ++k) pre += double(z[i * zs + k]) * w[j * ws + k];
      f(&pre, &phi[i * m + j], 1, one);
      g(&pre, &slope[i * m + j], 1, one);
      double up = 0;
      for (int64_t k = 0; k < c; ++k) {
        forward[i * c + k] += phi[i * m + j] * h[k * hs + j] + (j ? 0.0 : double(hb[k]));
        grad[k * m + j] += double(r[i * rs + k]) * phi[i * m + j];
        up += double(r[i * rs + k]) * h[k * hs + j];
      }
      slope[i * m + j] *= up;
      db[j] += slope[i * m + j];
      for (int64_t k = 0; k < d; ++k) dz[i * d + k] += slope[i * m + j] * w[j * ws + k], dw[j * d + k] += slope[i * m + j] * z[i * zs + k];
    }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j)
      for (int64_t k = 0; k < c; ++k) gram[i * c + k] += phi[i * m + j] * grad[k * m + j];
  const double eps = bf16 && gcfast::cpu::wide_bf16()[0] ? 0.02 : sizeof(T) == 4 ? 1e-6 : 1e-15;
  const auto same = [&](const char* what, const std::vector<T>& got, const std::vector<double>& want, double sums) {
    double most = 0, error = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      most = std::max(most, std::fabs(want[i]));
      error = std::isnan(got[i]) ? INFINITY : std::max(error, std::fabs(got[i] - want[i]));
    }
    CHECK(error <= eps * (most + std::sqrt(sums)), "%s, n %ld m %ld d %ld c %ld act %d: %g of %g", what, long(n), long(m), long(d), long(c), act, error, most);
  };
  const T nan = static_cast<T>(NAN);
  std::vector<T> out(n * c, nan), column(c * m, nan), gz(n * d, nan), gw(m * d, nan), gb(m, nan), gh(c * m, nan);
  wide_forward(WideForward<T>{a, h.data(), hb.data(), out.data(), c, hs});
  same("forward", out, forward, m);
  wide_head_grad(WideHeadGrad<T>{a, r.data(), column.data(), c, rs});
  same("head_grad", column, grad, n);
  wide_backward(WideBackward<T>{a, r.data(), h.data(), gz.data(), gw.data(), gb.data(), gh.data(), c, rs, hs});
  same("dz", gz, dz, m * c), same("dweight", gw, dw, n * c), same("dbias", gb, db, n * c), same("dhead", gh, grad, n);
  wide_backward(WideBackward<T>{a, r.data(), h.data(), nullptr, gw.data(), nullptr, nullptr, c, rs, hs});
  same("dweight alone", gw, dw, n * c);
  std::fill(out.begin(), out.end(), nan);
  wide_gram_product(WideGramProduct<T>{a, r.data(), out.data(), c, rs});
  same("gram_product", out, gram, n * m);
  const int64_t os = m + 1;
  std::vector<T> panel((n - 1) * os + m, nan), alone(m);
  wide_panel(WidePanel<T>{a, panel.data(), os});
  WideLayer<T> last = a;  // the last row, without the first column, is the same to the bit
  last.z += (n - 1) * zs, last.n = 1, last.weight += m > 1 ? ws : 0, last.bias += m > 1, last.m -= m > 1, last.threads = 1;
  wide_panel(WidePanel<T>{last, alone.data(), m});
  CHECK(memcmp(alone.data(), panel.data() + (n - 1) * os + (m > 1), last.m * sizeof(T)) == 0, "n %ld m %ld", long(n), long(m));
}

template <class T> void all(bool bf16) {
  const int64_t sizes[][4] = {{1, 1, 1, 1}, {5, 7, 3, 2}, {48, 64, 16, 16}, {49, 65, 17, 17}, {100, 133, 530, 33},
                              {7, 330, 31, 1}, {97, 3, 40, 5}, {150, 32, 2, 70}};
  int i = 0;
  for (const auto& s : sizes) layer<T>(s[0], s[1], s[2], s[3], i % 7, 1 + i % 3, bf16), ++i;
}

}  // namespace

int main() {
  for (int64_t rows : {1, 15, 16, 48})
    for (int64_t d : {1, 31, 32, 70}) amx(rows, d);
  CHECK(to_bf16(1.0f + 0x1p-8f) == to_bf16(1.0f) && to_bf16(1.0f + 0x1.8p-8f) == to_bf16(1.0f) + 1, "ties to even");
  CHECK(std::isnan(ModelAmx::half(reinterpret_cast<const uint8_t*>(std::vector<uint16_t>{to_bf16(NAN)}.data()))), "NaN");
  for (int l : {-1, 0, 3}) {
    forced_level = l;
    all<float>(false), all<double>(false);
  }
  all<float>(true);
  return report();
}
#endif
