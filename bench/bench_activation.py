"""Softplus and its kin: plain PyTorch beside every backend. Correctness first, then time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, copy_bandwidth, on_backend, show, sized, with_compiled

from gcfast import ops, reference

N = sized({"cpu": 1 << 20, "cuda": 1 << 26}, smallest={"cpu": 1 << 11, "cuda": 1 << 11})
KERNELS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
ids = [str(d).removeprefix("torch.") for d in DTYPES]
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}
INTO = {  # torch's own, into a given tensor
    "softplus": torch._C._nn.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": torch._C._nn.gelu,
    "silu": torch._C._nn.silu,
}


def candidates(x: torch.Tensor, name: str) -> dict[str, Callable[[], object]]:
    out = torch.empty_like(x)

    def call(backend: str) -> Callable[[], object]:
        return on_backend(backend, lambda: ops.activation(x, activation=name, out=out))

    timed: dict[str, Callable[[], object]] = {f"torch {name}": lambda: INTO[name](x, out=out)}
    if x.device.type == "cuda":
        timed = with_compiled(timed, getattr(F, name, getattr(torch, name, None)), lambda f: lambda: f(x))
    timed["reference"] = call("reference")
    want = reference.activation(x[: 1 << 20].double(), activation=name)
    for backend in KERNELS[x.device.type]:
        if x.dtype == torch.bfloat16 and backend == "cuda":
            continue  # float32 and float64 only
        got = call(backend)()
        assert ops.last_backend("activation") == backend
        tolerance = TOLERANCES[x.dtype]
        torch.testing.assert_close(got[: 1 << 20].double(), want, rtol=tolerance, atol=tolerance)
        timed[backend] = call(backend)
    return timed


def inputs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("no bfloat16 kernel on the CPU")
    return (torch.randn(N[device.type], device=device) * 4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=ids[:2])
@pytest.mark.parametrize("which", ["torch softplus", "reference", "kernel"])
def bench_softplus(benchmark, device, dtype, which):
    timed = candidates(inputs(device, dtype), "softplus")
    call = list(timed.values())[-1] if which == "kernel" else timed[which]
    benchmark.group = f"softplus {dtype}"
    benchmark(lambda: (call(), torch.cuda.synchronize()) if device.type == "cuda" else call())


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", INTO)
def bench_table(benchmark, device, dtype, name):
    x = inputs(device, dtype)
    timed = candidates(x, name)
    timings = benchmark.pedantic(lambda: compare(timed, repeats=15), rounds=1)
    limit = 2 * x.numel() * x.element_size() / copy_bandwidth()
    show(f"{name}, {x.numel()} elements, {dtype}", timings, limit, "bytes at copy bandwidth")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", ["softplus", "gelu"])
def bench_table_gradients(benchmark, device, dtype, name):
    """grad * act'(x + bias) for rows of a wide layer, which torch does in two or three passes."""
    rows = inputs(device, dtype).view(-1, 1024)
    bias, upstream = torch.randn(1024, device=device).to(dtype), torch.randn_like(rows)
    leaves = rows.clone().requires_grad_(), bias.clone().requires_grad_()

    def step(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(*leaves), leaves, upstream)

    def plain(z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return getattr(F, name)(z + b)

    ours = step(lambda z, b: ops.activation(z, b, activation=name))
    timed = with_compiled({f"torch {name}": step(plain)}, plain, step)
    for backend in KERNELS[device.type]:
        if dtype != torch.bfloat16 or backend != "cuda":
            timed[backend] = on_backend(backend, ours)
    timings = benchmark.pedantic(lambda: compare(timed, repeats=15), rounds=1)
    # forward reads x and writes y; backward reads x and the gradient, writes dx, and reads it for the bias
    limit = 6 * rows.numel() * rows.element_size() / copy_bandwidth()
    show(f"{name} and gradients, {rows.numel()} elements, {dtype}", timings, limit, "bytes at copy bandwidth")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=ids[:2])
def bench_allocating(benchmark, device, dtype):
    """As users call it: the result is a fresh tensor, whose pages the system must provide."""
    x = inputs(device, dtype)
    pair = {"F.softplus": lambda: F.softplus(x), "ops.activation": lambda: ops.activation(x)}
    show(f"softplus into a fresh tensor, {dtype}", benchmark.pedantic(lambda: compare(pair), rounds=1))
