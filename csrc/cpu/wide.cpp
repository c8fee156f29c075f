// The wide layer, never stored: tiles of Phi are made by a product with the activation on it while they are in the
// first-level cache, used there and overwritten. Plain products elsewhere are torch's; these are here because of what
// happens between them, and because a library that does not know the processor leaves half of its lanes idle.
//
// Determinism: every sum runs in an order that the sizes fix, never the threads, except dz, whose shares (one a
// thread) are added in turn. An element of Phi depends on its rows of z and weight alone, bit for bit.
#include "wide.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../core/activations.h"
#include "../core/arithmetic.h"
#include "activation.h"
#include "clones.h"
#include "wide_bf16.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef GCFAST_LEVEL
#define GCFAST_LEVEL instruction_level()  // a test runs all of them on one processor
#endif

namespace gcfast::cpu {
namespace {

constexpr int64_t kStrip = 48;   // rows: a tile of Phi is 12 KB
constexpr int64_t kInner = 512;  // of d that a micro-kernel sums in registers at a time
constexpr int64_t kGroup = 4;    // packed blocks of columns, in the second-level cache, that a strip of z meets
template <class T> constexpr int64_t kColumns = 256 / sizeof(T);

// What an instruction set provides.
template <class T> struct Tiles {
  void (*pack)(const WideLayer<T>&, int64_t j0, T* packed, T* bias);
  void (*tile)(const WideLayer<T>&, int64_t i0, int64_t rows, const T* packed, const T* bias, T* out);
  void (*product)(int64_t rows, int64_t columns, const T* a, int64_t rs, int64_t ks, const T* b, int64_t ldb, int64_t k,
                  T* out, int64_t ldo, bool add);
  void (*transpose)(const T* in, int64_t ld, int64_t rows, int64_t columns, T* out, int64_t to, int64_t ldo);
  int width;
};

namespace baseline {
#define GCFAST_VECTOR 16
#define GCFAST_ROWS 4
#define GCFAST_VECTORS 2
#include "wide_tiles.h"
#undef GCFAST_VECTOR
#undef GCFAST_ROWS
#undef GCFAST_VECTORS
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GCFAST_NO_CLONES)
#define GCFAST_X86 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define GCFAST_VECTOR 32
#define GCFAST_ROWS 6
#define GCFAST_VECTORS 2
#include "wide_tiles.h"
#undef GCFAST_VECTOR
#undef GCFAST_ROWS
#undef GCFAST_VECTORS
}  // namespace v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#define GCFAST_VECTOR 64
#define GCFAST_ROWS 6
#define GCFAST_VECTORS 4
#include "wide_tiles.h"
#undef GCFAST_VECTOR
#undef GCFAST_ROWS
#undef GCFAST_VECTORS
}  // namespace v4
#pragma GCC pop_options
#endif

#if defined(GCFAST_X86) && defined(__linux__)
#define GCFAST_BF16 1

#pragma GCC push_options
// Features, not an architecture: the intrinsics may be compiled for a newer one than that.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
template <int R>
__attribute__((always_inline)) inline void dot_rows(const uint16_t* z, int64_t depth, const uint32_t* packed, int64_t pairs,
                                                    const float* bias, float* out) {
  __m512 sum[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) w[v] = (__m512bh)_mm512_loadu_si512(packed + p * kPairBlock + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, z + r * depth + 2 * p, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, w[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      _mm512_storeu_ps(out + r * kPairBlock + 16 * v, _mm512_add_ps(sum[r][v], _mm512_loadu_ps(bias + 16 * v)));
}

void dot_tile(int64_t rows, const uint16_t* z, int64_t d, const uint32_t* packed, const float* bias, float* out) {
  const int64_t depth = bf16_depth(d), pairs = (d + 1) / 2;
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) dot_rows<6>(z + i * depth, depth, packed, pairs, bias, out + i * kPairBlock);
  for (; i + 3 <= rows; i += 3) dot_rows<3>(z + i * depth, depth, packed, pairs, bias, out + i * kPairBlock);
  for (; i < rows; ++i) dot_rows<1>(z + i * depth, depth, packed, pairs, bias, out + i * kPairBlock);
}
#pragma GCC pop_options

// GCC's intrinsics paste the number of a tile into the instruction and take no template argument. The assembler needs
// no leave to emit them, so that these functions can be inlined anywhere.
struct HardwareAmx {
  template <int T> __attribute__((always_inline)) static void zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
  template <int T> __attribute__((always_inline)) static void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B> __attribute__((always_inline)) static void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  template <int T> __attribute__((always_inline)) static void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
};

void amx_configure() {
  alignas(64) uint8_t config[64] = {1};  // palette 1; eight tiles of 16 rows of 64 bytes
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
void amx_release() { __asm__ volatile("tilerelease"); }

GCFAST_CLONES void amx_tile(int64_t rows, const uint16_t* z, int64_t d, const uint32_t* packed, const float* bias, float* out) {
  amx_product<HardwareAmx>(rows, z, bf16_depth(d), packed, out);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kPairBlock; ++j) out[i * kPairBlock + j] += bias[j];
}

// AMX must be asked of the kernel, once a process; then one small product is compared with what it should be.
bool amx_works() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  if (instruction_level() != 4 || syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) != 0) return false;
  uint16_t z[16 * kDepth];
  uint32_t packed[kDepth / 2 * kPairBlock];
  float bias[kPairBlock], out[16 * kPairBlock];
  for (int i = 0; i < 16 * kDepth; ++i) z[i] = to_bf16(static_cast<float>(i * 7 % 19 - 9));
  for (int i = 0; i < kDepth / 2 * kPairBlock; ++i)
    packed[i] = to_bf16(static_cast<float>(i * 5 % 17 - 8)) | uint32_t{to_bf16(static_cast<float>(i * 3 % 13 - 6))} << 16;
  for (int j = 0; j < kPairBlock; ++j) bias[j] = static_cast<float>(j);
  amx_configure();
  amx_tile(16, z, kDepth, packed, bias, out);
  amx_release();
  for (int r = 0; r < 16; ++r)
    for (int j = 0; j < kPairBlock; ++j) {
      int sum = j;
      for (int k = 0; k < kDepth; ++k) {
        const int i = static_cast<int>(k / 2 * kPairBlock + j);
        sum += ((r * static_cast<int>(kDepth) + k) * 7 % 19 - 9) * (k % 2 ? i * 3 % 13 - 6 : i * 5 % 17 - 8);
      }
      if (out[r * kPairBlock + j] != static_cast<float>(sum)) return false;
    }
  return true;
}
#endif

enum class Bf16 { none, dot, amx };

Bf16 bf16_means() {
#if defined(GCFAST_BF16)
  static const Bf16 means = amx_works() ? Bf16::amx
                            : instruction_level() == 4 && __builtin_cpu_supports("avx512bf16") ? Bf16::dot
                                                                                             : Bf16::none;
  return means;
#else
  return Bf16::none;
#endif
}

template <class T> const Tiles<T>& tiles() {
#if defined(GCFAST_X86)
  const int level = GCFAST_LEVEL;
  if (level == 4) return *v4::tiles<T>();
  if (level == 3) return *v3::tiles<T>();
#endif
  return *baseline::tiles<T>();
}

// Aligned to lines of the cache; not initialised.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  operator T*() const { return data_.get(); }

 private:
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> data_;
};

int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

template <class T> struct Activation {
  ActivationBlock<T> f[2];
  Scale<T> beta;
  explicit Activation(const WideLayer<T>& a) {
    const T hi = static_cast<T>(a.beta);
    beta = {hi, static_cast<T>(a.beta - static_cast<double>(hi)), static_cast<T>(1.0 / a.beta)};
    for (int order = 0; order < 2; ++order) f[order] = activation_block<T>(a.act, order, a.beta);
  }
};

// z in bfloat16, for all threads, where products are made so; zero rows follow, for tiles that begin anywhere.
class HalfRows {
 public:
  explicit HalfRows(const WideLayer<double>&) : means_(Bf16::none), data_(0) {}
  explicit HalfRows(const WideLayer<float>& a)
      : means_(a.bf16 ? bf16_means() : Bf16::none),
        data_(means_ == Bf16::none ? 0 : (padded(a.n, 16) + 16) * bf16_depth(a.d)) {
    if (means_ == Bf16::none) return;
    const int64_t depth = bf16_depth(a.d), runs = (a.n + 63) / 64;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1 && a.n * a.d > 65536)
    for (int64_t run = 0; run < runs; ++run)
      to_bf16(a.z + run * 64 * a.z_stride, a.z_stride, std::min<int64_t>(64, a.n - run * 64), a.d, data_ + run * 64 * depth);
    std::fill(data_ + a.n * depth, data_ + (padded(a.n, 16) + 16) * depth, uint16_t{0});
  }
  Bf16 means() const { return means_; }
  const uint16_t* data() const { return data_; }

 private:
  Bf16 means_;
  Buffer<uint16_t> data_;
};

// A group of packed blocks of columns, and the tiles of Phi in them; one a thread, on the thread's stack.
template <class T> class Columns {
 public:
  static constexpr int64_t B = kColumns<T>;
  Columns(const WideLayer<T>& a, const HalfRows& half, int64_t blocks)
      : a_(a), half_(half), tiles_(tiles<T>()), act_(a), depth_(half.means() == Bf16::none ? a.d : bf16_depth(a.d) / 2),
        packed_(blocks * B * depth_), bias_(blocks * B), rows_(half.means() == Bf16::none ? 0 : B * 2 * depth_) {
#if defined(GCFAST_BF16)
    if (half.means() == Bf16::amx) amx_configure();
#endif
  }
  Columns(const Columns&) = delete;
  ~Columns() {
#if defined(GCFAST_BF16)
    if (half_.means() == Bf16::amx) amx_release();
#endif
  }
  void pack(int64_t block, int64_t slot = 0) {
    T *packed = packed_ + slot * B * depth_, *bias = bias_ + slot * B;
    if constexpr (sizeof(T) == 4)
      if (half_.means() != Bf16::none) {
        const int64_t j0 = block * B, there = std::min(B, a_.m - j0);
        to_bf16(a_.weight + j0 * a_.weight_stride, a_.weight_stride, there, a_.d, rows_);
        // Pairs move as floats do: by their bits.
        tiles_.transpose(reinterpret_cast<const float*>(static_cast<uint16_t*>(rows_)), depth_, there, depth_,
                         packed, B, B);
        for (int64_t j = 0; j < B; ++j) bias[j] = j < there ? a_.bias[j0 + j] : T(0);
        return;
      }
    tiles_.pack(a_, block * B, packed, bias);
  }
  // act^(order) of a packed block, for at most kStrip rows from i0; order -1: the pre-activations. Up to a multiple
  // of 16 rows of `out` are written.
  void tile(int64_t i0, int64_t rows, T* out, int64_t slot = 0, int order = 0) const {
    const T *packed = packed_ + slot * B * depth_, *bias = bias_ + slot * B;
#if defined(GCFAST_BF16)
    if constexpr (sizeof(T) == 4) {
      const auto* pairs = reinterpret_cast<const uint32_t*>(packed);
      if (half_.means() == Bf16::amx) amx_tile(rows, half_.data() + i0 * 2 * depth_, a_.d, pairs, bias, out);
      if (half_.means() == Bf16::dot) dot_tile(rows, half_.data() + i0 * 2 * depth_, a_.d, pairs, bias, out);
    }
    if (half_.means() == Bf16::none)
#endif
      tiles_.tile(a_, i0, rows, packed, bias, out);
    if (order >= 0) apply(out, out, rows, order);
  }
  void apply(const T* x, T* out, int64_t rows, int order) const { act_.f[order](x, out, rows * B, act_.beta); }

 private:
  const WideLayer<T>& a_;
  const HalfRows& half_;
  const Tiles<T>& tiles_;
  Activation<T> act_;
  int64_t depth_;  // of a packed column: numbers, or pairs of them
  Buffer<T> packed_, bias_;
  Buffer<uint16_t> rows_;
};

int team(int64_t tasks, int threads) { return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks))); }

template <class T> void forward(const WideForward<T>& f) {
  constexpr int64_t B = kColumns<T>;
  const WideLayer<T>& a = f.layer;
  const Tiles<T>& t = tiles<T>();
  const HalfRows half(a);
  const int64_t blocks = (a.m + B - 1) / B, c = padded(f.c, t.width);
  // Rows are independent of each other: each thread has a run of whole micro-kernels' rows and all columns.
  const int threads = team((a.n + 5) / 6, a.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t self = omp_get_thread_num(), all = omp_get_num_threads(), sixes = (a.n + 5) / 6;
    const int64_t i0 = std::min(a.n, sixes * self / all * 6), i1 = std::min(a.n, sixes * (self + 1) / all * 6);
    if (i0 < i1) {
      Columns<T> columns(a, half, kGroup);
      Buffer<T> head(kGroup * B * c), phi(kStrip * B), sums((i1 - i0) * c);
      std::fill_n(static_cast<T*>(sums), (i1 - i0) * c, T(0));
      for (int64_t block = 0; block < blocks; block += kGroup) {
        const int64_t here = std::min(kGroup, blocks - block);
        for (int64_t s = 0; s < here; ++s) {
          const int64_t j0 = (block + s) * B, there = std::min(B, a.m - j0);
          columns.pack(block + s, s);
          // (c, m) to rows of c, zero beyond c. What a tile has beyond m is not read: it may be NaN.
          t.transpose(f.head + j0, f.head_stride, f.c, there, head + s * B * c, c, c);
        }
        for (int64_t i = i0; i < i1; i += kStrip)
          for (int64_t s = 0; s < here; ++s) {
            const int64_t rows = std::min(kStrip, i1 - i);
            columns.tile(i, rows, phi, s);
            t.product(rows, c, phi, B, 1, head + s * B * c, c, std::min(B, a.m - (block + s) * B), sums + (i - i0) * c, c,
                      true);
          }
      }
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = 0; j < f.c; ++j) f.out[i * f.c + j] = sums[(i - i0) * c + j] + (f.head_bias ? f.head_bias[j] : T(0));
    }
  }
}

template <class T> void head_grad(const WideHeadGrad<T>& f) {
  constexpr int64_t B = kColumns<T>;
  constexpr int64_t group = kGroup / 2;
  const WideLayer<T>& a = f.layer;
  const Tiles<T>& t = tiles<T>();
  const HalfRows half(a);
  const int64_t blocks = (a.m + B - 1) / B, tasks = (blocks + group - 1) / group;
  const int threads = team(tasks, a.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Columns<T> columns(a, half, group);
    Buffer<T> phi(kStrip * B), sums(group * f.c * B);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t block = task * group, here = std::min(group, blocks - block);
      for (int64_t s = 0; s < here; ++s) columns.pack(block + s, s);
      std::fill_n(static_cast<T*>(sums), group * f.c * B, T(0));
      for (int64_t i = 0; i < a.n; i += kStrip)
        for (int64_t s = 0; s < here; ++s) {
          const int64_t rows = std::min(kStrip, a.n - i);
          columns.tile(i, rows, phi, s);
          t.product(f.c, B, f.r + i * f.r_stride, 1, f.r_stride, phi, B, rows, sums + s * f.c * B, B, true);
        }
      for (int64_t s = 0; s < here; ++s)
        for (int64_t k = 0; k < f.c; ++k)
          std::copy_n(sums + (s * f.c + k) * B, std::min(B, a.m - (block + s) * B), f.out + k * a.m + (block + s) * B);
    }
  }
}

template <class T> void gram_product(const WideGramProduct<T>& f) {
  constexpr int64_t B = kColumns<T>;
  const WideLayer<T>& a = f.layer;
  const Tiles<T>& t = tiles<T>();
  const HalfRows half(a);
  const int64_t blocks = (a.m + B - 1) / B, c = padded(f.c, t.width);
  // Shares of Phi_block^T r by chunks of rows, in a number that only the sizes fix.
  const int64_t most = std::clamp<int64_t>(2048 / f.c, 8, 32);
  const int64_t chunk = padded(std::max((a.n + most - 1) / most, kStrip), kStrip), chunks = (a.n + chunk - 1) / chunk;
  const int threads = team(chunks, a.threads);
  Buffer<T> panel(padded(a.n, 16) * B), shares(2 * chunks * f.c * B), sums(a.n * c);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t self = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t first = chunks * self / all, last = chunks * (self + 1) / all;
    const int64_t i0 = first * chunk, i1 = std::min(a.n, last * chunk);
    Columns<T> columns(a, half, 1);
    Buffer<T> g(f.c * B), g_rows(B * c);
    std::fill_n(sums + i0 * c, (i1 - i0) * c, T(0));
    for (int64_t block = 0; block < blocks; ++block) {
      // Two sets of shares in turns: one barrier a block keeps writers of the next from readers of this one.
      T* share = shares + block % 2 * chunks * f.c * B;
      if (i0 < i1) columns.pack(block);
      for (int64_t k = first; k < last; ++k) {
        T* mine = share + k * f.c * B;
        std::fill_n(mine, f.c * B, T(0));
        const int64_t end = std::min(a.n, (k + 1) * chunk);
        for (int64_t i = k * chunk; i < end; i += kStrip) {
          const int64_t rows = std::min(kStrip, end - i);
          columns.tile(i, rows, panel + i * B);
          t.product(f.c, B, f.r + i * f.r_stride, 1, f.r_stride, panel + i * B, B, rows, mine, B, true);
        }
      }
#pragma omp barrier
      std::copy_n(share, f.c * B, static_cast<T*>(g));
      for (int64_t k = 1; k < chunks; ++k)
        for (int64_t e = 0; e < f.c * B; ++e) g[e] += share[k * f.c * B + e];
      const int64_t there = std::min(B, a.m - block * B);
      t.transpose(g, B, f.c, there, g_rows, c, c);
      for (int64_t i = i0; i < i1; i += kStrip)
        t.product(std::min(kStrip, i1 - i), c, panel + i * B, B, 1, g_rows, c, there, sums + i * c, c, true);
    }
    for (int64_t i = i0; i < i1; ++i) std::copy_n(sums + i * c, f.c, f.out + i * f.c);
  }
}

template <class T> void backward(const WideBackward<T>& f) {
  constexpr int64_t B = kColumns<T>;
  const WideLayer<T>& a = f.layer;
  const Tiles<T>& t = tiles<T>();
  const HalfRows half(a);
  const int64_t blocks = (a.m + B - 1) / B, d = padded(a.d, t.width);
  const bool below = f.dz || f.dweight || f.dbias;
  const int threads = team(blocks, a.threads);
  // Rows in runs, so that the shares of dz take no more than `run` rows a thread.
  const int64_t run = f.dz ? std::min<int64_t>(a.n, 2048) : a.n;
  Buffer<T> shares(f.dz ? threads * run * d : 0), z(f.dweight ? run * d : 0);
  if (f.dweight) std::fill_n(f.dweight, a.m * a.d, T(0));
  if (f.dbias) std::fill_n(f.dbias, a.m, T(0));
  if (f.dhead) std::fill_n(f.dhead, f.c * a.m, T(0));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t self = omp_get_thread_num(), all = omp_get_num_threads();
    Columns<T> columns(a, half, 1);
    Buffer<T> pre(kStrip * B), phi(kStrip * B), grad(kStrip * B), head(f.c * B), dhead(f.c * B);
    Buffer<T> weight(f.dz ? B * d : 0), dweight(f.dweight ? B * d : 0), dbias(B);
    T* share = shares + self * run * d;
    for (int64_t r0 = 0; r0 < a.n; r0 += run) {
      const int64_t r1 = std::min(a.n, r0 + run);
      if (f.dz) std::fill_n(share, (r1 - r0) * d, T(0));
      if (f.dweight) {
#pragma omp for schedule(static)
        for (int64_t i = r0; i < r1; ++i) {
          std::copy_n(a.z + i * a.z_stride, a.d, z + (i - r0) * d);
          std::fill_n(z + (i - r0) * d + a.d, d - a.d, T(0));
        }
      }
      for (int64_t block = blocks * self / all; block < blocks * (self + 1) / all; ++block) {
        const int64_t j0 = block * B, there = std::min(B, a.m - j0);
        columns.pack(block);
        for (int64_t k = 0; k < f.c; ++k) {
          std::copy_n(f.head + k * f.head_stride + j0, there, head + k * B);
          std::fill_n(head + k * B + there, B - there, T(0));
        }
        if (f.dz)
          for (int64_t j = 0; j < there; ++j) {
            std::copy_n(a.weight + (j0 + j) * a.weight_stride, a.d, weight + j * d);
            std::fill_n(weight + j * d + a.d, d - a.d, T(0));
          }
        if (f.dweight) std::fill_n(static_cast<T*>(dweight), B * d, T(0));
        if (f.dbias) std::fill_n(static_cast<T*>(dbias), B, T(0));
        if (f.dhead) std::fill_n(static_cast<T*>(dhead), f.c * B, T(0));
        for (int64_t i = r0; i < r1; i += kStrip) {
          const int64_t rows = std::min(kStrip, r1 - i);
          columns.tile(i, rows, pre, 0, -1);
          if (f.dhead) {
            columns.apply(pre, phi, rows, 0);
            t.product(f.c, B, f.g + i * f.g_stride, 1, f.g_stride, phi, B, rows, dhead, B, true);
          }
          if (!below) continue;
          columns.apply(pre, phi, rows, 1);
          t.product(rows, B, f.g + i * f.g_stride, f.g_stride, 1, head, B, f.c, grad, B, false);
          for (int64_t e = 0; e < rows * B; ++e) grad[e] *= phi[e];
          if (f.dz) t.product(rows, d, grad, B, 1, weight, d, there, share + (i - r0) * d, d, true);
          if (f.dweight) t.product(there, d, grad, 1, B, z + (i - r0) * d, d, rows, dweight, d, true);
          if (f.dbias)
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t j = 0; j < B; ++j) dbias[j] += grad[r * B + j];
        }
        if (f.dweight)
          for (int64_t j = 0; j < there; ++j)
            for (int64_t k = 0; k < a.d; ++k) f.dweight[(j0 + j) * a.d + k] += dweight[j * d + k];
        if (f.dbias)
          for (int64_t j = 0; j < there; ++j) f.dbias[j0 + j] += dbias[j];
        if (f.dhead)
          for (int64_t k = 0; k < f.c; ++k)
            for (int64_t j = 0; j < there; ++j) f.dhead[k * a.m + j0 + j] += dhead[k * B + j];
      }
#pragma omp barrier
      if (f.dz) {
#pragma omp for schedule(static)
        for (int64_t i = r0; i < r1; ++i)
          for (int64_t k = 0; k < a.d; ++k) {
            T s = 0;
            for (int64_t p = 0; p < all; ++p) s += shares[(p * run + i - r0) * d + k];
            f.dz[i * a.d + k] = s;
          }
      }
    }
  }
}

template <class T> void panel(const WidePanel<T>& f) {
  constexpr int64_t B = kColumns<T>;
  const WideLayer<T>& a = f.layer;
  const HalfRows half(a);
  const int64_t blocks = (a.m + B - 1) / B, run = 4 * kStrip, runs = (a.n + run - 1) / run, tasks = blocks * runs;
  const int threads = team(tasks, a.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const PlainArithmetic plain;  // a proof makes the panel more than once, and it must be the same to the bit
    Columns<T> columns(a, half, 1);
    Buffer<T> phi(kStrip * B);
    int64_t packed = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t block = task / runs, r0 = task % runs * run, there = std::min(B, a.m - block * B);
      if (packed != block) columns.pack(packed = block);
      for (int64_t i = r0; i < std::min(a.n, r0 + run); i += kStrip) {
        const int64_t rows = std::min(kStrip, a.n - i);
        columns.tile(i, rows, phi);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(phi + r * B, there, f.out + (i + r) * f.out_stride + block * B);
      }
    }
  }
}

}  // namespace

#define GCFAST_WIDE_OPS(T)                                                \
  void wide_forward(const WideForward<T>& f) { forward(f); }              \
  void wide_head_grad(const WideHeadGrad<T>& f) { head_grad(f); }         \
  void wide_backward(const WideBackward<T>& f) { backward(f); }           \
  void wide_gram_product(const WideGramProduct<T>& f) { gram_product(f); } \
  void wide_panel(const WidePanel<T>& f) { panel(f); }
GCFAST_WIDE_OPS(float)
GCFAST_WIDE_OPS(double)

const char* wide_bf16() {
  const Bf16 means = bf16_means();
  return means == Bf16::amx ? "amx" : means == Bf16::dot ? "avx512_bf16" : "";
}

}  // namespace gcfast::cpu
