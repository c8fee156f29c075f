"""The processor's own ceiling: FMAs a second out of registers, by a loop compiled for this machine.

A library's product is no limit where it does not know the processor: it may use half of the vector's width.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from _compare import compare, matmul_peak, sized

_SOURCE = """
#include <cstdint>
typedef T V __attribute__((vector_size(BYTES)));
extern "C" T fma_loop(int64_t rounds, T x, T y, int threads) {
  T out = 0;
#pragma omp parallel num_threads(threads) reduction(+ : out)
  {
    V sum[12];
    for (int i = 0; i < 12; ++i) sum[i] = V{} + x * i;
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) sum[i] = sum[i] * x + y;
    }
    for (int i = 0; i < 12; ++i) out += sum[i][0];
  }
  return out;
}
"""


def _bytes() -> int:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return 64 if "avx512f" in flags else 32 if "avx2" in flags else 16


@cache
def fma_peak(dtype: torch.dtype) -> tuple[float, str]:
    """FLOP a second on all threads, and what it is: a product of torch where there is no compiler."""
    kind = {torch.float32: "float", torch.float64: "double"}[dtype]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "fma.cpp"), Path(folder, "fma.so")
        source.write_text(_SOURCE)
        define = [f"-DT={kind}", f"-DBYTES={_bytes()}"]
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", *define]
        try:
            subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(target)], check=True)
        except (OSError, subprocess.CalledProcessError):
            return matmul_peak(dtype), "products at measured matmul peak"
        loop = ctypes.CDLL(str(target)).fma_loop
    number = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    loop.restype, loop.argtypes = number, (ctypes.c_int64, number, number, ctypes.c_int)
    rounds = sized(1_000_000, smallest=10)
    threads, lanes = torch.get_num_threads(), _bytes() // (4 if kind == "float" else 8)
    (time,) = compare({"fma": lambda: loop(rounds, 0.5, 0.5, threads)}, repeats=9, device="cpu")
    return 2 * 12 * lanes * rounds * threads / time.best, "FMAs at their measured peak"
