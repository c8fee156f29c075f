"""Loss, residual and conjugate term, and the curvature product: plain PyTorch beside the one-pass kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, copy_bandwidth, show

from gcfast import ops, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float64] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
ids = [str(d).removeprefix("torch.") for d in DTYPES]
SHAPES = [(60_000, 10), (6_000, 100), (600, 10_000)]
if DEVICE.type == "cuda":
    SHAPES = [(1_000_000, 10), (100_000, 100), (100_000, 1_000), (8_192, 32_000), (4_096, 100_000)]
KERNELS = [b for b in ("cpu", "triton") if (b == "cpu") == (DEVICE.type == "cpu")]
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def plain(f: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_p = torch.log_softmax(f, dim=1)
    p = log_p.exp()
    loss = F.nll_loss(log_p, y, reduction="none")
    entropy = (p * log_p).sum(dim=1)
    p[torch.arange(len(y), device=y.device), y] -= 1
    return loss, p, entropy


def plain_curvature(f: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    pv = torch.softmax(f, dim=1)
    p, pv = pv, pv * v
    return pv - p * pv.sum(dim=1, keepdim=True)


def on(backend: str, f: Callable[..., object], *args: object, **options: object) -> Callable[[], object]:
    def call() -> object:
        with ops.backend(backend):
            return f(*args, **options)

    return call


def inputs(n: int, c: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    f = (torch.randn(n, c, device=DEVICE) * 3).to(dtype)
    return f, torch.randint(0, c, (n,), device=DEVICE), torch.randn(n, c, device=DEVICE).to(dtype)


def check(got: object, want: object, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    for g, w in zip(got, want) if isinstance(got, tuple) else [(got, want)]:
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


def residuals(n: int, c: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Labels are read back in no candidate but "checked", so that all do the same work."""
    f, y, _ = inputs(n, c, dtype)
    compiled = torch.compile(plain, dynamic=False)
    candidates = {"plain torch": lambda: plain(f, y), "torch.compile": lambda: compiled(f, y)}
    candidates["reference"] = lambda: reference.softmax_residual(f, y)
    for backend in KERNELS:
        candidates[backend] = on(backend, ops.softmax_residual, f, y, check_target=False)
        candidates[f"{backend}, checked"] = on(backend, ops.softmax_residual, f, y)
        check(candidates[backend](), plain(f.double(), y), dtype)
        assert ops.last_backend("softmax_residual") == backend
    return candidates


def curvatures(n: int, c: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    f, _, v = inputs(n, c, dtype)
    compiled = torch.compile(plain_curvature, dynamic=False)
    candidates = {"plain torch": lambda: plain_curvature(f, v), "torch.compile": lambda: compiled(f, v)}
    candidates["reference"] = lambda: reference.softmax_curvature(f, v)
    for backend in KERNELS:
        candidates[backend] = on(backend, ops.softmax_curvature, f, v)
        check(candidates[backend](), plain_curvature(f.double(), v.double()), dtype)
        assert ops.last_backend("softmax_curvature") == backend
    return candidates


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", ["plain torch", "reference", *KERNELS])
def bench_ten_classes(benchmark, dtype, which):
    benchmark.group = f"softmax_residual 60000x10 {dtype}"
    call = residuals(60_000, 10, dtype)[which]

    def timed():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("n, c", SHAPES)
@pytest.mark.parametrize("op", ["softmax_residual", "softmax_curvature"])
def bench_table(benchmark, op, n, c, dtype):
    candidates = (residuals if op == "softmax_residual" else curvatures)(n, c, dtype)
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=15), rounds=1)
    limit = None
    if DEVICE.type == "cpu":  # the least bytes at the speed of torch's own copy
        size = torch.finfo(dtype).bits // 8
        least = 2 * n * c * size + 2 * n * size + 8 * n if op == "softmax_residual" else 3 * n * c * size
        limit = least / copy_bandwidth()
    show(f"{op}, {n} x {c}, {dtype}", timings, limit, "bytes at copy bandwidth")
