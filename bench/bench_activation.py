"""Softplus and its kin: PyTorch, eager and compiled, beside the kernels. Correctness first, then time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, copy_bandwidth, show

from gcfast import ops, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 1 << (26 if DEVICE.type == "cuda" else 20)
DTYPES = [torch.float32, torch.float64] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
ids = [str(d).removeprefix("torch.") for d in DTYPES]
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}
PLAIN = {
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


def kernels(dtype: torch.dtype) -> list[str]:
    """The backends with a kernel that serves the benchmark's device and dtype."""
    if DEVICE.type == "cpu":
        return ["cpu"]
    usable = [b for b in ("triton", "cuda") if ops.backends().usable("activation", b)]
    return [b for b in usable if b == "triton" or dtype != torch.bfloat16]


def inputs(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(N, device=DEVICE) * 4).to(dtype)


def on(backend: str, x: torch.Tensor, name: str, out: torch.Tensor | None = None) -> Callable[[], object]:
    def call() -> object:
        with ops.backend(backend):
            return ops.activation(x, activation=name, out=out)

    return call


def check(x: torch.Tensor, name: str) -> None:
    want = reference.activation(x.double(), activation=name)
    tolerance = TOLERANCES[x.dtype]
    for backend in kernels(x.dtype):
        got = on(backend, x, name)().double()
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert ops.last_backend("activation") == backend


def candidates(x: torch.Tensor, name: str) -> dict[str, Callable[[], object]]:
    out = torch.empty_like(x)
    plain = {
        "softplus": lambda: torch._C._nn.softplus(x, out=out),
        "tanh": lambda: torch.tanh(x, out=out),
        "sigmoid": lambda: torch.sigmoid(x, out=out),
        "gelu": lambda: torch._C._nn.gelu(x, out=out),
        "silu": lambda: torch._C._nn.silu(x, out=out),
    }[name]
    timed = {f"torch {name}": plain}
    if DEVICE.type == "cuda":
        compiled = torch.compile(PLAIN[name], dynamic=False)
        timed["torch.compile"] = lambda: compiled(x)
    timed["reference"] = on("reference", x, name, out)
    return timed | {backend: on(backend, x, name, out) for backend in kernels(x.dtype)}


def gradients(x: torch.Tensor, name: str) -> dict[str, Callable[[], object]]:
    """grad * act'(x + bias) for rows of a wide layer, which torch does in two or three passes."""
    rows = x.view(-1, 1024)
    bias, upstream = torch.randn(1024, device=DEVICE).to(x.dtype), torch.randn_like(rows)
    leaves = rows.clone().requires_grad_(), bias.clone().requires_grad_()

    def step(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(leaves[0], leaves[1]), leaves, upstream)

    def plain(z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return PLAIN[name](z + b)

    def ours(backend: str) -> Callable[[], object]:
        def call() -> object:
            with ops.backend(backend):
                return step(lambda z, b: ops.activation(z, b, activation=name))()

        return call

    timed = {f"torch {name}": step(plain)}
    if DEVICE.type == "cuda":
        timed["torch.compile"] = step(torch.compile(plain, dynamic=False))
    return timed | {backend: ours(backend) for backend in kernels(x.dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", ["torch softplus", "reference", "kernel"])
def bench_softplus(benchmark, dtype, which):
    x = inputs(dtype)
    check(x, "softplus")
    f = candidates(x, "softplus")[kernels(dtype)[0] if which == "kernel" else which]

    def call():
        f()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"softplus {dtype}"
    benchmark(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", list(PLAIN))
def bench_table(benchmark, dtype, name):
    x = inputs(dtype)
    check(x, name)
    timings = benchmark.pedantic(lambda: compare(candidates(x, name), repeats=15), rounds=1)
    limit = 2 * N * x.element_size() / copy_bandwidth()
    show(f"{name}, {N} elements, {dtype}", timings, limit, "bytes at copy bandwidth")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", ["softplus", "gelu"])
def bench_gradients(benchmark, dtype, name):
    x = inputs(dtype)
    check(x, name)
    timings = benchmark.pedantic(lambda: compare(gradients(x, name), repeats=15), rounds=1)
    # forward reads x and writes y; backward reads x and the gradient, writes dx, and reads it for the bias
    limit = 6 * N * x.element_size() / copy_bandwidth()
    show(f"{name} and gradients, {N} elements, {dtype}", timings, limit, "bytes at copy bandwidth")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def bench_allocating(benchmark, dtype):
    """As users call it: the result is a fresh tensor, whose pages the system must provide."""
    x = inputs(dtype)
    check(x, "softplus")
    pair = {"F.softplus": lambda: F.softplus(x), "ops.activation": lambda: ops.activation(x)}
    show(f"softplus into a fresh tensor, {dtype}", benchmark.pedantic(lambda: compare(pair), rounds=1))
