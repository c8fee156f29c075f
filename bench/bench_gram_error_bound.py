"""|H| (|H|^T 1) and weighted absolute sums: plain torch and torch.compile of it beside the fused kernels."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, copy_bandwidth, show, sized, with_compiled

from gcfast import ops, reference

DTYPES = [torch.float32, torch.float64]
ids = [str(d).removeprefix("torch.") for d in DTYPES]
# a panel of the proof's Q at n = 4,096, and all the features; on a GPU those of n = 50,000
SHAPES = sized(
    {
        "cpu": {"panel": (4096, 1024), "features": (4096, 4505)},
        "cuda": {"panel": (50_000, 1024), "features": (50_000, 8192)},
    },
    smallest={where: {"panel": (64, 32), "features": (64, 71)} for where in ("cpu", "cuda")},
)


def plain_bound(h: torch.Tensor) -> torch.Tensor:
    a = h.abs()
    return a @ a.sum(0)


def plain_products(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = h.abs()
    return a.sum(1), a.sum(0)


def _table(benchmark, device, op, plain, of_reference, which, dtype):
    n, m = SHAPES[device.type][which]
    h = torch.randn(n, m, dtype=dtype, device=device)
    torch.testing.assert_close(op(h), plain(h.double()), rtol=1e-12, atol=0)
    backend = ops.last_backend("gram_error_bound")
    assert backend == ("cpu" if device.type == "cpu" else "triton")
    candidates = with_compiled({"plain torch": lambda: plain(h)}, plain, lambda f: lambda: f(h))
    candidates |= {"reference": lambda: of_reference(h), backend: lambda: op(h)}
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=15), rounds=1)
    limit = h.numel() * h.element_size() / copy_bandwidth()
    show(f"{op.__name__}, {n} x {m}, {dtype}", timings, limit, "bytes read once, at copy bandwidth")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", SHAPES["cpu"])
def bench_table_gram_error_bound(benchmark, device, which, dtype):
    op, plain = ops.gram_error_bound, plain_bound
    _table(benchmark, device, op, plain, reference.gram_error_bound, which, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", SHAPES["cpu"])
def bench_table_abs_products(benchmark, device, which, dtype):
    op, plain = ops.abs_products, plain_products
    _table(benchmark, device, op, plain, reference.abs_products, which, dtype)
