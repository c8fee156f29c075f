// Float products with operands rounded to bfloat16 and float sums, where the processor has instructions for them:
// vdpbf16ps (twice float's rate on AMD, float's own on Intel) or AMX tiles (five times). A pair of values along k
// is one 32-bit word; packed weights have the pairs of kBlock columns next to each other for either.
//
// An AMX product is Tiles' product too, so that a model of the tiles can take the hardware's place in a test.
#pragma once
#include <cstdint>
#include <cstring>

namespace gcfast::cpu {

constexpr int64_t kPairBlock = 64;  // columns of a block; also the words between two pairs of rows
constexpr int64_t kDepth = 32;      // of k that a tile holds: rows are padded to it with zeros

// To nearest even; a NaN stays one.
inline uint16_t to_bf16(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? (b >> 16) | 0x40 : rounded);
}

inline int64_t bf16_depth(int64_t d) { return (d + kDepth - 1) / kDepth * kDepth; }

// `rows` rows of d floats at x, to rows of bf16_depth(d) at out.
inline void to_bf16(const float* x, int64_t stride, int64_t rows, int64_t d, uint16_t* out) {
  const int64_t depth = bf16_depth(d);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < d; ++k) out[i * depth + k] = to_bf16(x[i * stride + k]);
    for (int64_t k = d; k < depth; ++k) out[i * depth + k] = 0;
  }
}

// out[r, j] = sum_k z[r, k] w[k, j], 16 rows by kPairBlock columns a turn: rows past the last one up to a multiple
// of 16 are read from z and written to out as well. Amx has eight tiles of 16 rows of 64 bytes.
template <class Amx>
__attribute__((always_inline)) inline void amx_product(int64_t rows, const uint16_t* z, int64_t depth,
                                                       const uint32_t* packed, float* out) {
  for (int64_t i = 0; i < rows; i += 16) {
    Amx::template zero<0>(), Amx::template zero<1>(), Amx::template zero<2>(), Amx::template zero<3>();
    for (int64_t k = 0; k < depth; k += kDepth) {
      const uint32_t* b = packed + k / 2 * kPairBlock;
      Amx::template load<4>(z + i * depth + k, depth * 2);
      Amx::template load<5>(b, kPairBlock * 4);
      Amx::template dot<0, 4, 5>();
      Amx::template load<6>(b + 16, kPairBlock * 4);
      Amx::template dot<1, 4, 6>();
      Amx::template load<5>(b + 32, kPairBlock * 4);
      Amx::template dot<2, 4, 5>();
      Amx::template load<6>(b + 48, kPairBlock * 4);
      Amx::template dot<3, 4, 6>();
    }
    float* o = out + i * kPairBlock;
    Amx::template store<0>(o, kPairBlock * 4), Amx::template store<1>(o + 16, kPairBlock * 4);
    Amx::template store<2>(o + 32, kPairBlock * 4), Amx::template store<3>(o + 48, kPairBlock * 4);
  }
}

}  // namespace gcfast::cpu
