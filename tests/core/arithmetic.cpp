// csrc/core/arithmetic.h and the self-test of the compiled module: kernels run by plain arithmetic whatever a thread is
// set to, and leave that as it was.
#ifdef __CUDACC__  // of the CPU alone
int main() { return 0; }
#else
#include "../../csrc/cpu/arithmetic.cpp"

#include "../../csrc/cpu/add_product.cpp"
#include "../../csrc/cpu/gram_error_bound.cpp"
#include "check.h"

using namespace gcfast;

namespace {

constexpr int kSize = 208;  // enough products for two threads to be asked

double sum_of(const std::vector<double>& x) {
  double s = 0;
  for (double v : x) s += v;
  return s;
}

std::vector<double> operands() {
  std::vector<double> a(kSize * kSize);
  for (int i = 0; i < kSize * kSize; ++i) a[i] = (i * 7919 % 1009 - 504) / 3.0 * (i % 5 == 0 ? 0x1p-530 : 1.0);
  for (int i = 0; i < 8; ++i) a[i] = 0x1.8p-1060 * (i + 1);
  return a;
}

// Results of kernels, to the bit, and of the self-test.
std::vector<double> results(const std::vector<double>& a) {
  const int n = kSize;
  std::vector<double> out(n * n, 0.0), rows(n), columns(n);
  cpu::add_product(cpu::AddProductArgs<double>{out.data(), a.data(), a.data(), n, n, n, n, 1, n, 1, 1, n, 16, 1.0, false, 2});
  cpu::abs_products(cpu::AbsProductsArgs<double>{{a.data(), n, n, n, 1}, nullptr, nullptr, rows.data(), columns.data(), 2});
  out.insert(out.end(), rows.begin(), rows.end());
  out.insert(out.end(), columns.begin(), columns.end());
  CHECK(cpu::self_test()[0] == 0, "%s", cpu::self_test());
  return out;
}

}  // namespace

int main() {
  // as the manuals number them: MXCSR.RC is bits 13 and 14, FTZ 15, DAZ 6; FPCR.RMode 22 and 23, FZ 24, FZ16 19, FIZ 0
  CHECK(kMxcsr.rounding == 3u << 13 && kMxcsr.flush == (1u << 15 | 1u << 6), "x86");
  CHECK(kFpcr.rounding == 3u << 22 && kFpcr.flush == (1u << 24 | 1u << 19 | 1u), "Arm");
  const ControlWord plain = control_word();
  const std::vector<double> a = operands(), want = results(a);
  CHECK(std::isfinite(sum_of(want)), "finite");
#if defined(__SSE2__)
  const ControlWord modes[] = {0x2000, 0x4000, 0x6000, 0x8000, 0x0040, 0xE040};
#elif defined(__aarch64__)
  const ControlWord modes[] = {0x400000, 0x800000, 0xC00000, 0x1000000};
#else
  const ControlWord modes[] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
#endif
  for (const ControlWord mode : modes) {
    CHECK((mode & ~kOtherArithmetic) == 0, "%llx", static_cast<unsigned long long>(mode));
    for (const int threads : {1, 3}) {
      // this thread and its workers are set to the mode, and the kernels are none the wiser
      const std::vector<ControlWord> before =
          cpu::exchange_control_words(std::vector<ControlWord>(threads, plain | mode), threads);
      CHECK((control_word() & kOtherArithmetic) == mode, "set");
      const std::vector<double> found = results(a);
      CHECK((control_word() & kOtherArithmetic) == mode, "left as it was");
      {
        const PlainArithmetic guard;
        CHECK((control_word() & kOtherArithmetic) == 0, "plain");
      }
      CHECK((control_word() & kOtherArithmetic) == mode, "put back");
      const std::vector<ControlWord> had = cpu::exchange_control_words({}, threads);
      CHECK(static_cast<int>(had.size()) == threads && static_cast<int>(before.size()) == threads, "one each");
      for (const ControlWord word : had) CHECK((word & kOtherArithmetic) == mode, "the workers' as well");
      CHECK((control_word() & kOtherArithmetic) == 0, "plain again");
      CHECK(std::memcmp(found.data(), want.data(), want.size() * sizeof(double)) == 0, "the same to the bit");
    }
  }
  return report();
}
#endif
