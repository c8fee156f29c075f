"""The wide layer with its head: features stored whole by plain PyTorch beside row chunks that never are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, matmul_peak, show

from gcfast import ops

N, D, M, C = 8_000, 128, 4_400, 10
DTYPES = [torch.float32, torch.float64]
ids = [str(d).removeprefix("torch.") for d in DTYPES]


def plain(z, weight, bias, head_weight, head_bias):
    return F.linear(F.softplus(F.linear(z, weight, bias)), head_weight, head_bias)


def problem(dtype: torch.dtype, grad: bool):
    shapes = [(N, D), (M, D), (M,), (C, M), (C,)]
    args = [torch.randn(s, dtype=dtype) for s in shapes]
    args[1] /= D**0.5
    args[3] /= M**0.5
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8  # F.softplus itself is off by 2e-9
    torch.testing.assert_close(ops.wide_forward(*args), plain(*args), rtol=tolerance, atol=tolerance)
    assert ops.last_backend("wide_forward") == "cpu"
    if not grad:
        return {"plain torch": lambda: plain(*args), "cpu": lambda: ops.wide_forward(*args)}
    args = [a.requires_grad_() for a in args]
    g = torch.randn(N, C, dtype=dtype)

    def step(f):
        return lambda: torch.autograd.grad(f(*args), args, g)

    for got, want in zip(step(ops.wide_forward)(), step(plain)()):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    return {"plain torch": step(plain), "cpu": step(ops.wide_forward)}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with-gradients"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def bench_table(benchmark, dtype, grad):
    candidates = problem(dtype, grad)
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=7, warmup=1), rounds=1)
    # products with weight and head: one each forward; the gradients need two more of each
    flop = (3 if grad else 1) * 2 * N * M * (D + C)
    title = f"wide_forward{' and gradients' if grad else ''}, n={N} d={D} m={M} C={C}, {dtype}"
    show(title, timings, flop / matmul_peak(dtype), "products at measured matmul peak")
