"""|H| (|H|^T 1) and weighted absolute sums: plain torch and torch.compile of it beside the fused kernels."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, copy_bandwidth, show

from gcfast import ops, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float64]
# a panel of the proof's Q at n = 4,096, and all the features; on a GPU those of n = 50,000
SHAPES = [(4096, 1024), (4096, 4505)] if DEVICE.type == "cpu" else [(50_000, 1024), (50_000, 8192)]


def plain_bound(h: torch.Tensor) -> torch.Tensor:
    a = h.abs()
    return a @ a.sum(0)


def plain_products(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = h.abs()
    return a.sum(1), a.sum(0)


def _table(benchmark, op, plain, of_reference, n, m, dtype, readings):
    h = torch.randn(n, m, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(op(h), plain(h.double()), rtol=1e-12, atol=0)
    backend = ops.last_backend("gram_error_bound")
    assert backend == ("cpu" if DEVICE.type == "cpu" else "triton")
    compiled = torch.compile(plain)
    candidates = {
        "plain torch": lambda: plain(h),
        "torch.compile": lambda: compiled(h),
        "reference": lambda: of_reference(h),
        backend: lambda: op(h),
    }
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=15), rounds=1)
    limit = readings * h.numel() * h.element_size() / copy_bandwidth()
    show(f"{op.__name__}, {n} x {m}, {dtype}", timings, limit, f"bytes read {readings}x at copy bandwidth")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SHAPES)
def bench_gram_error_bound(benchmark, n, m, dtype):
    # row by row in memory the columns' sums must be known before the rows': two readings
    _table(benchmark, ops.gram_error_bound, plain_bound, reference.gram_error_bound, n, m, dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SHAPES)
def bench_abs_products(benchmark, n, m, dtype):
    _table(benchmark, ops.abs_products, plain_products, reference.abs_products, n, m, dtype, 1)
