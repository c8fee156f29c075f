"""K x for symmetric K and few right-hand sides: torch's product beside the kernel that reads half of K."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, matmul_peak, show

from gcfast import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("c", [1, 10])
def bench_table(benchmark, c, dtype):
    n = 4000
    gram = torch.randn(n, n, dtype=dtype)
    gram = gram + gram.T
    x = torch.randn(n, c, dtype=dtype)
    torch.testing.assert_close(ops.gram_product(gram, x), gram @ x, rtol=1e-3, atol=1e-3)
    assert ops.last_backend("gram_product") == "cpu"
    candidates = {"torch": lambda: gram @ x, "cpu": lambda: ops.gram_product(gram, x)}
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=25), rounds=1)
    # K of this size stays in the last cache, so that operations count, not bytes
    limit = 2 * n * n * c / matmul_peak(dtype)
    show(f"gram_product, n = {n}, {c} sides, {dtype}", timings, limit, "products at matmul peak")
