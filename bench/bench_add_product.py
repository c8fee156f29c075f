"""out += a b by slices, in the shapes of the rank proof: torch's product, torch's in slices, the kernel."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, matmul_peak, on_backend, show, sized
from _fma import fma_peak

from gcfast import ops

N = sized({"cpu": 4096, "cuda": 16384}, smallest={"cpu": 64, "cuda": 64})


def _gram(n, dtype, device):
    h = torch.randn(n, 1024, dtype=dtype, device=device)
    return torch.zeros(n, n, dtype=dtype, device=device), h, h.mT


def _strip(n, dtype, device):
    """Rows of a lower triangular matrix times a panel."""
    x = torch.randn(512, 2 * n, dtype=dtype, device=device)[:, :n]
    out = torch.zeros(512, 1024, dtype=dtype, device=device)
    return out, x, torch.randn(n, 1024, dtype=dtype, device=device)


def _tile(n, dtype, device):
    """What a tile of a left-looking Cholesky factorisation takes in."""
    low = torch.randn(1280, 2 * n, dtype=dtype, device=device)[:, :n]
    return torch.zeros(1024, 256, dtype=dtype, device=device), low[256:], low[:256].mT


SHAPES = {"Gram": (_gram, True), "strip": (_strip, False), "tile": (_tile, False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_table(benchmark, device, shape, dtype):
    make, lower = SHAPES[shape]
    n = N[device.type]
    out, a, b = make(n, dtype, device)
    settings = {"inner": 128 if device.type == "cpu" else 512, "lower": lower}
    ops.add_product(out, a, b, **settings)
    want = a @ b
    torch.testing.assert_close(out, want.tril() if lower else want, rtol=1e-3, atol=1e-2)
    ours = ops.last_backend("add_product")
    assert ours == ("cpu" if device.type == "cpu" else "reference")  # no kernel of its own on the GPU
    candidates = {"torch": lambda: torch.mm(a, b, out=want)}
    if ours == "cpu":
        candidates["by slices"] = on_backend("reference", lambda: ops.add_product(out, a, b, **settings))
    candidates[ours] = lambda: ops.add_product(out, a, b, **settings)
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=7, warmup=1), rounds=1)
    products = a.shape[1] * (len(out) * (len(out) + 1) // 2 if lower else out.numel())
    peak, why = fma_peak(dtype) if device.type == "cpu" else (matmul_peak(dtype), "products at matmul peak")
    size = f"{shape} {len(out)} x {out.shape[1]} x {a.shape[1]}"
    show(f"add_product, {size}, {dtype}", timings, 2 * products / peak, why)
