// Includes the header that GCFAST_TILES names once for each instruction set, in a namespace of its own, with
// GCFAST_VECTOR (bytes of a vector), GCFAST_ROWS and GCFAST_VECTORS (the tile that a micro-kernel holds in registers).

namespace baseline {
#define GCFAST_VECTOR 16
#define GCFAST_ROWS 4
#define GCFAST_VECTORS 3
#include GCFAST_TILES
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
#define GCFAST_ROWS 4
#define GCFAST_VECTORS 3
#include GCFAST_TILES
#undef GCFAST_VECTOR
#undef GCFAST_ROWS
#undef GCFAST_VECTORS
}  // namespace v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#define GCFAST_VECTOR 64
#define GCFAST_ROWS 8
#define GCFAST_VECTORS 3
#include GCFAST_TILES
#undef GCFAST_VECTOR
#undef GCFAST_ROWS
#undef GCFAST_VECTORS
}  // namespace v4
#pragma GCC pop_options
#endif
