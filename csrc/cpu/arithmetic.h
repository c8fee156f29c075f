#pragma once
#include <vector>

#include "../core/arithmetic.h"

namespace gcfast::cpu {

// Gives the calling thread and its OpenMP workers, `threads` in all, these control words, one each; where `words` is
// short, the bits of theirs that stand for another arithmetic are cleared. Returns the words that they had.
std::vector<ControlWord> exchange_control_words(const std::vector<ControlWord>& words, int threads);

// What the compiler made of arithmetic that the kernels' proofs rest on, for every instruction set that may run here:
// "" where it is as written, else what is not.
const char* self_test();

}  // namespace gcfast::cpu
