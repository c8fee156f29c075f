"""Softplus and its kin: plain PyTorch beside the C++ kernel. Correctness first, then time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, copy_bandwidth, show

from gcfast import ops, reference

N = 1 << 20
DTYPES = [torch.float32, torch.float64]
ids = [str(d).removeprefix("torch.") for d in DTYPES]


def check(x: torch.Tensor, name: str) -> None:
    want = reference.activation(x.double(), activation=name)
    tolerance = 2e-6 if x.dtype == torch.float32 else 1e-14
    torch.testing.assert_close(
        ops.activation(x, activation=name).double(), want, rtol=tolerance, atol=tolerance
    )
    assert ops.last_backend("activation") == "cpu"


def candidates(x: torch.Tensor, name: str):
    out = torch.empty_like(x)

    def by_reference():
        with ops.backend("reference"):
            return ops.activation(x, activation=name, out=out)

    plain = {
        "softplus": lambda: torch._C._nn.softplus(x, out=out),
        "tanh": lambda: torch.tanh(x, out=out),
        "sigmoid": lambda: torch.sigmoid(x, out=out),
        "gelu": lambda: torch._C._nn.gelu(x, out=out),
        "silu": lambda: torch._C._nn.silu(x, out=out),
    }[name]
    return {
        f"torch {name}": plain,
        "reference": by_reference,
        "cpu": lambda: ops.activation(x, activation=name, out=out),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", ["torch softplus", "reference", "cpu"])
def bench_softplus(benchmark, dtype, which):
    x = torch.randn(N, dtype=dtype) * 4
    check(x, "softplus")
    benchmark.group = f"softplus {dtype}"
    benchmark(candidates(x, "softplus")[which])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", ["softplus", "sigmoid", "tanh", "gelu", "silu"])
def bench_table(benchmark, dtype, name):
    x = torch.randn(N, dtype=dtype) * 4
    check(x, name)
    timings = benchmark.pedantic(lambda: compare(candidates(x, name), repeats=15), rounds=1)
    limit = 2 * N * x.element_size() / copy_bandwidth()
    show(f"{name}, {N} elements, {dtype}", timings, limit, "bytes at copy bandwidth")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def bench_allocating(benchmark, dtype):
    """As users call it: the result is a fresh tensor, whose pages the system must provide."""
    x = torch.randn(N, dtype=dtype) * 4
    check(x, "softplus")
    pair = {"F.softplus": lambda: F.softplus(x), "ops.activation": lambda: ops.activation(x)}
    show(f"softplus into a fresh tensor, {dtype}", benchmark.pedantic(lambda: compare(pair), rounds=1))
