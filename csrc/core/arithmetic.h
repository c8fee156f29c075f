// The arithmetic that proofs rest on: round to nearest, and no denormal number flushed to zero. Each thread has a
// control word of its own, which a thread inherits from the one that started it and may change at any time; so every
// kernel that proofs are made with asks in every thread that works (PlainArithmetic), which takes a few nanoseconds.
#pragma once
#include <cstdint>

#include "macros.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace gcfast {

// The bits of a control word that choose another rounding than to nearest, or flush to zero. Exception masks and flags
// are no matter of a result's value. Both are here on every machine, so that any of them tests both.
struct ControlBits { uint64_t rounding, flush; };
constexpr ControlBits kMxcsr{0x6000, 0x8040};      // x86: RC; FTZ and DAZ
constexpr ControlBits kFpcr{0xC00000, 0x1080001};  // Arm: RMode; FZ, FZ16, FIZ

#if defined(__SSE2__)
using ControlWord = uint32_t;
constexpr ControlWord kRoundingBits = kMxcsr.rounding, kFlushBits = kMxcsr.flush;
inline ControlWord control_word() { return _mm_getcsr(); }
inline void set_control_word(ControlWord word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
using ControlWord = uint64_t;
constexpr ControlWord kRoundingBits = kFpcr.rounding, kFlushBits = kFpcr.flush;
inline ControlWord control_word() {
  ControlWord word;
  __asm__ volatile("mrs %0, fpcr" : "=r"(word));
  return word;
}
inline void set_control_word(ControlWord word) { __asm__ volatile("msr fpcr, %0" ::"r"(word)); }
#else  // the rounding alone can be asked for; what flushes is seen by known answers (gcfast/ops/arithmetic.py)
using ControlWord = int;
constexpr ControlWord kRoundingBits = ~FE_TONEAREST, kFlushBits{};
inline ControlWord control_word() { return std::fegetround(); }
inline void set_control_word(ControlWord word) { std::fesetround(word); }
#endif
constexpr ControlWord kOtherArithmetic = kRoundingBits | kFlushBits;

// Round to nearest and gradual underflow in this thread, as long as this lives. What it is to hold for lies in
// functions that are called, or in memory: a compiler knows of no tie between arithmetic and the control word.
class PlainArithmetic {
 public:
  PlainArithmetic() : before_(control_word()) {
    if (before_ & kOtherArithmetic) set_control_word(before_ & ~kOtherArithmetic);
    __asm__ volatile("" ::: "memory");
  }
  ~PlainArithmetic() {
    __asm__ volatile("" ::: "memory");
    if (before_ & kOtherArithmetic) set_control_word(before_);
  }
  PlainArithmetic(const PlainArithmetic&) = delete;
  PlainArithmetic& operator=(const PlainArithmetic&) = delete;

 private:
  const ControlWord before_;
};

}  // namespace gcfast
