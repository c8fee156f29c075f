"""The bounds of softmax's sums hold in builds where no loop is vectorised, such as those for sanitizers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "softmax_residual.h"

// Equal logits and v = (0, 4/eps, 1, 1, ...): in a single sum every 1 is lost beside the second term.
// The mean of v is known; the error of (v_2 - mean) / c is that of the sum.
template <class T> bool close(int64_t c) {
  const T eps = std::numeric_limits<T>::epsilon();
  std::vector<T> f(c, T(0)), v(c, T(1)), out(c);
  v[0] = 0, v[1] = 4 / eps;
  gcfast::cpu::CurvatureArgs<T> args{f.data(), v.data(), out.data(), 1, c, c, c, 1};
  gcfast::cpu::softmax_curvature(args);
  const long double mean = (4 / (long double)eps + (c - 2)) / c, want = (1 - mean) / c;
  const long double error = std::abs((out[2] - want) / want) / eps;
  std::printf("%lld columns: %.1Lf eps\\n", (long long)c, error);
  return error <= 40;
}
int main() {
  bool fine = true;
  for (int64_t c : {65, 507, 1030, 4099}) fine = close<float>(c) && close<double>(c) && fine;
  return fine ? 0 : 1;
}
"""


@pytest.mark.tools
@pytest.mark.parametrize("level", ["-O0", "-O1", "-O3"])
def test_long_sums(level, tmp_path):
    compiler = os.environ.get("CXX", "g++")
    sources = ROOT / "csrc" / "cpu"
    if not sources.is_dir() or shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler} and the source tree")
    (tmp_path / "sums.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", level, "-fopenmp", "-Wno-unknown-pragmas", f"-I{sources}"]
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    files = [tmp_path / "sums.cpp", sources / "softmax_residual.cpp"]
    built = children.run([compiler, *flags, *files, "-o", tmp_path / "sums"])
    assert built.returncode == 0, built.stderr
    done = children.run([tmp_path / "sums"])
    assert done.returncode == 0, done.stdout + done.stderr
