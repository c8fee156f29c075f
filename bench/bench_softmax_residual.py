"""Loss, residual and conjugate term, and the curvature product: plain PyTorch beside the one-pass kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, copy_bandwidth, on_backend, show, sized, with_compiled

from gcfast import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
ids = [str(d).removeprefix("torch.") for d in DTYPES]
SHAPES = sized(
    {
        "cpu": {"ten": (60_000, 10), "hundred": (6_000, 100), "many": (600, 10_000)},
        "cuda": {"ten": (1_000_000, 10), "hundred": (100_000, 1_000), "many": (4_096, 100_000)},
    },
    smallest={
        where: {"ten": (64, 10), "hundred": (16, 100), "many": (4, 10_000)} for where in ("cpu", "cuda")
    },
)
KERNELS = {"cpu": "cpu", "cuda": "triton"}
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


def inputs(device: torch.device, which: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("no bfloat16 kernel on the CPU")
    n, c = SHAPES[device.type][which]
    f = (torch.randn(n, c, device=device) * 3).to(dtype)
    return f, torch.randint(0, c, (n,), device=device), torch.randn(n, c, device=device).to(dtype)


def check(got: object, want: object, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    for g, w in zip(got, want) if isinstance(got, tuple) else [(got, want)]:
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


def residuals(device: torch.device, which: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Labels are read back in no candidate but "checked", so that all do the same work."""
    f, y, _ = inputs(device, which, dtype)
    backend = KERNELS[device.type]
    timed = with_compiled({"plain torch": lambda: plain(f, y)}, plain, lambda g: lambda: g(f, y))
    timed["reference"] = lambda: reference.softmax_residual(f, y)
    timed[backend] = on_backend(backend, lambda: ops.softmax_residual(f, y, check_target=False))
    timed[f"{backend}, checked"] = on_backend(backend, lambda: ops.softmax_residual(f, y))
    check(timed[backend](), plain(f.double(), y), dtype)
    assert ops.last_backend("softmax_residual") == backend
    return timed


def curvatures(device: torch.device, which: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    f, _, v = inputs(device, which, dtype)
    backend = KERNELS[device.type]
    first = {"plain torch": lambda: plain_curvature(f, v)}
    timed = with_compiled(first, plain_curvature, lambda g: lambda: g(f, v))
    timed["reference"] = lambda: reference.softmax_curvature(f, v)
    timed[backend] = on_backend(backend, lambda: ops.softmax_curvature(f, v))
    check(timed[backend](), plain_curvature(f.double(), v.double()), dtype)
    assert ops.last_backend("softmax_curvature") == backend
    return timed


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", ["plain torch", "reference", "kernel"])
def bench_ten_classes(benchmark, device, dtype, which):
    call = residuals(device, "ten", dtype)[KERNELS[device.type] if which == "kernel" else which]
    benchmark.group = f"softmax_residual, ten classes, {dtype}"
    benchmark(lambda: (call(), torch.cuda.synchronize()) if device.type == "cuda" else call())


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", SHAPES["cpu"])
@pytest.mark.parametrize("op", ["softmax_residual", "softmax_curvature"])
def bench_table(benchmark, device, op, which, dtype):
    timed = (residuals if op == "softmax_residual" else curvatures)(device, which, dtype)
    timings = benchmark.pedantic(lambda: compare(timed, repeats=15), rounds=1)
    n, c = SHAPES[device.type][which]
    size = torch.finfo(dtype).bits // 8
    least = 2 * n * c * size + 2 * n * size + 8 * n if op == "softmax_residual" else 3 * n * c * size
    show(f"{op}, {n} x {c}, {dtype}", timings, least / copy_bandwidth(), "bytes at copy bandwidth")
