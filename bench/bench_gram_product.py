"""K x for symmetric K and few right-hand sides: torch's product beside the kernel that reads half of K."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, copy_bandwidth, matmul_peak, show, sized

from gcfast import ops

SIZES = sized({"cpu": 4_000, "cuda": 16_000}, smallest={"cpu": 64, "cuda": 64})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("c", [1, 10])
def bench_table(benchmark, device, c, dtype):
    n = SIZES[device.type]
    gram = torch.randn(n, n, dtype=dtype, device=device)
    gram = gram + gram.T
    x = torch.randn(n, c, dtype=dtype, device=device)
    torch.testing.assert_close(ops.gram_product(gram, x), gram @ x, rtol=1e-3, atol=1e-3)
    ours = ops.last_backend("gram_product")
    assert ours == ("cpu" if device.type == "cpu" else "reference")  # no kernel of its own on the GPU
    candidates = {"torch": lambda: gram @ x, ours: lambda: ops.gram_product(gram, x)}
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=25), rounds=1)
    limit, why = 2 * n * n * c / matmul_peak(dtype), "products at matmul peak"
    if device.type == "cuda":  # on the CPU K of this size stays in the last cache: bytes do not count there
        limit, why = max((limit, why), (gram.nbytes / 2 / copy_bandwidth(), "half of K at copy bandwidth"))
    show(f"gram_product, n = {n}, {c} sides, {dtype}", timings, limit, why)
