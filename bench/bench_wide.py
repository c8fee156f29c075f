"""The wide layer with its head: features stored whole by plain PyTorch beside row chunks that never are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, matmul_peak, show, with_compiled

from gcfast import ops

SIZES = {"cpu": (8_000, 128, 4_400, 10), "cuda": (20_000, 512, 22_000, 10)}  # n, d, m, C
DTYPES = [torch.float32, torch.float64]
ids = [str(d).removeprefix("torch.") for d in DTYPES]


def plain(z, weight, bias, head_weight, head_bias):
    return F.linear(F.softplus(F.linear(z, weight, bias)), head_weight, head_bias)


def problem(device: torch.device, dtype: torch.dtype, grad: bool):
    n, d, m, c = SIZES[device.type]
    shapes = [(n, d), (m, d), (m,), (c, m), (c,)]
    args = [torch.randn(s, dtype=dtype, device=device) for s in shapes]
    args[1] /= d**0.5
    args[3] /= m**0.5
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8  # F.softplus itself is off by 2e-9
    torch.testing.assert_close(ops.wide_forward(*args), plain(*args), rtol=tolerance, atol=tolerance)
    ours = ops.last_backend("wide_forward")
    assert ours in (("cpu",) if device.type == "cpu" else ("triton", "cuda"))
    if grad:
        args = [a.requires_grad_() for a in args]
    g = torch.randn(n, c, dtype=dtype, device=device)

    def step(f):
        return lambda: torch.autograd.grad(f(*args), args, g) if grad else f(*args)

    if grad:
        for got, want in zip(step(ops.wide_forward)(), step(plain)()):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    candidates = {"plain torch": step(plain)}
    if device.type == "cuda":
        candidates = with_compiled(candidates, plain, step)
    return {**candidates, ours: step(ops.wide_forward)}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with-gradients"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def bench_table(benchmark, device, dtype, grad):
    n, d, m, c = SIZES[device.type]
    candidates = problem(device, dtype, grad)
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=7, warmup=1), rounds=1)
    # products with weight and head: one each forward; the gradients need two more of each
    flop = (3 if grad else 1) * 2 * n * m * (d + c)
    title = f"wide_forward{' and gradients' if grad else ''}, n={n} d={d} m={m} C={c}, {dtype}"
    show(title, timings, flop / matmul_peak(dtype), "products at measured matmul peak")
