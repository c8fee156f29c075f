"""Loss, residual and conjugate term: the same quantities from plain PyTorch beside the one-pass kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, copy_bandwidth, show

from gcfast import ops, reference

DTYPES = [torch.float32, torch.float64]
ids = [str(d).removeprefix("torch.") for d in DTYPES]
SHAPES = [(60_000, 10), (6_000, 100), (600, 10_000)]


def plain(f: torch.Tensor, y: torch.Tensor):
    log_p = torch.log_softmax(f, dim=1)
    p = log_p.exp()
    loss = F.nll_loss(log_p, y, reduction="none")
    entropy = (p * log_p).sum(dim=1)
    p[torch.arange(len(y)), y] -= 1
    return loss, p, entropy


def problem(n: int, c: int, dtype: torch.dtype):
    f, y = torch.randn(n, c, dtype=dtype) * 3, torch.randint(0, c, (n,))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for got, want in zip(ops.softmax_residual(f, y), plain(f.double(), y)):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert ops.last_backend("softmax_residual") == "cpu"
    return {
        "plain torch": lambda: plain(f, y),
        "reference": lambda: reference.softmax_residual(f, y),
        "cpu": lambda: ops.softmax_residual(f, y),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", ["plain torch", "reference", "cpu"])
def bench_ten_classes(benchmark, dtype, which):
    benchmark.group = f"softmax_residual 60000x10 {dtype}"
    benchmark(problem(60_000, 10, dtype)[which])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("n, c", SHAPES)
def bench_table(benchmark, n, c, dtype):
    candidates = problem(n, c, dtype)
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=15), rounds=1)
    size = torch.finfo(dtype).bits // 8
    limit = (2 * n * c * size + 2 * n * size + 8 * n) / copy_bandwidth()
    show(f"softmax_residual, {n} x {c}, {dtype}", timings, limit, "bytes at copy bandwidth")
