"""The wide layer: plain PyTorch, which stores the features, beside tiles that live between two products."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, matmul_peak, only_smallest, show, sized, with_compiled
from _fma import fma_peak

import gcfast
from gcfast import ops

SIZES = sized(  # n, d, m, C
    {"cpu": (8_000, 128, 8_800, 10), "cuda": (50_000, 512, 55_000, 10)},
    smallest=dict.fromkeys(("cpu", "cuda"), (64, 16, 72, 10)),
)
DTYPES = [torch.float32, torch.float64]
ids = [str(d).removeprefix("torch.") for d in DTYPES]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # F.softplus itself is off by 2e-9


def layer(device: torch.device, dtype: torch.dtype, sizes=None):
    n, d, m, c = sizes or SIZES[device.type]
    shapes = [(n, d), (m, d), (m,), (c, m), (c,), (n, c)]
    args = [torch.randn(s, dtype=dtype, device=device) for s in shapes]
    args[1] /= d**0.5
    args[3] /= m**0.5
    return args, (n, d, m, c)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def limit(flop: float, device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Seconds for `flop`: out of registers on a CPU, where a library's product may know less than we do."""
    if device.type == "cpu":
        peak, what = fma_peak(dtype)
        return flop / peak, what
    return flop / matmul_peak(dtype), "products at measured matmul peak"


def peak_bytes(code: str, sizes: tuple[int, ...]) -> int:
    """Memory that a call takes beyond its inputs, in a process of its own: `code` defines call(n)."""
    n, d, m, c = sizes
    program = f"""
import torch, torch.nn as nn, torch.nn.functional as F, gcfast
from gcfast import ops
def peak(): return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
n, d, m, c = {n}, {d}, {m}, {c}
z, r = torch.randn(n, d), torch.randn(n, c)
{code}
call(8)
before = peak()
call(n)
print(peak() - before)
"""
    command = [sys.executable, "-c", program]
    with tempfile.TemporaryDirectory() as folder:  # the source tree would shadow the installed package
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return int(done.stdout)


def with_memory(codes: dict[str, str], sizes: tuple[int, ...], device: torch.device, results: int = 0):
    """Bytes that each candidate takes beside its inputs and `results` bytes of results, printed as well."""
    if device.type != "cpu":
        return {}
    n, _, m, _ = sizes
    codes = {"gcfast": codes["gcfast"]} if only_smallest() else codes  # a process each
    found = {name: max(0, peak_bytes(code, sizes) - results) for name, code in codes.items()}
    for name, value in found.items():
        share = value / (4 * n * m)
        print(f"  {name}: {value / 2**20:.1f} MB beside inputs and results, {share:.1%} of the features")
    return {name: {"memory": value} for name, value in found.items()}


def check_backend(op: str, device: torch.device) -> None:
    """What ran must have been a kernel."""
    ran = ops.last_backend(op)
    assert ran in (("cpu",) if device.type == "cpu" else ("triton", "cuda"))


# -- K r, the inner step of matrix-free solves


def eager_gram_product(z, w, b, r):
    phi = F.softplus(F.linear(z, w, b))
    return phi @ (phi.mT @ r)


def blocked_gram_product(z, w, b, r, block=256):
    out = torch.zeros_like(r)
    for j in range(0, len(w), block):
        phi = F.softplus(F.linear(z, w[j : j + block], b[j : j + block]))
        out.addmm_(phi, phi.mT @ r)
    return out


GRAM_CODE = """
w, b = torch.randn(m, d) / d**0.5, torch.randn(m)
def call(n): return {}
"""
EAGER_PHI = "(lambda phi: phi @ (phi.mT @ r[:n]))(F.softplus(F.linear(z[:n], w, b)))"


@pytest.mark.parametrize("precision", ["ieee", "bf16", None], ids=["float32", "bf16", "float64"])
def bench_gram_product_table(benchmark, device, precision):
    """None: float64. With bf16 allowed eager stays in float32: its own bf16 would round Phi as well."""
    dtype = torch.float64 if precision is None else torch.float32
    (z, w, b, _, _, r), sizes = layer(device, dtype)
    n, d, m, c = sizes
    call = {"eager": lambda: eager_gram_product(z, w, b, r)}
    if device.type == "cuda":
        call = with_compiled(call, eager_gram_product, lambda f: lambda: f(z, w, b, r))
    if precision != "bf16":
        call["eager, by blocks"] = lambda: blocked_gram_product(z, w, b, r)
    call["gcfast"] = lambda: ops.wide_gram_product(z, w, b, r, precision=precision)
    call["gcfast"]()
    check_backend("wide_gram_product", device)
    timings = benchmark.pedantic(lambda: compare(call, repeats=9, warmup=1), rounds=1)
    least, what = limit(2 * n * m * (d + 2 * c), device, dtype)
    if precision == "bf16":
        skinny, _ = limit(2 * n * m * 2 * c, device, dtype)
        least, what = (
            2 * n * m * d / matmul_peak(torch.bfloat16) + skinny,
            "bf16 products at measured matmul peak",
        )
    op = f"wide_gram_product{' with bf16 products' if precision == 'bf16' else ''}"
    extra: dict[str, dict[str, float]] = {}
    if precision is not None:
        product = f"ops.wide_gram_product(z[:n], w, b, r[:n], precision={precision!r})"
        codes = {"eager": GRAM_CODE.format(EAGER_PHI), "gcfast": GRAM_CODE.format(product)}
        extra = with_memory(codes, sizes, device)
    if precision is not None and device.type == "cpu":  # float64 features would not fit beside the GPU's
        want = eager_gram_product(*(t.double() for t in (z, w, b, r)))
        for name, f in call.items():
            extra.setdefault(name, {})["error"] = value = error(f(), want)
            print(f"  {name}: error {value:.1e} of the largest entry")
    show(f"{op}, n={n} d={d} m={m} C={c}, {dtype}", timings, least, what, extra=extra)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def bench_two_calls_table(benchmark, device, dtype):
    """Outputs, then the gradient of the head for a residual: eager keeps the features in between."""
    (z, w, b, h, hb, r), (n, d, m, c) = layer(device, dtype)

    def eager():
        phi = F.softplus(F.linear(z, w, b))
        return F.linear(phi, h, hb), r.mT @ phi

    def ours():
        return ops.wide_forward(z, w, b, h, hb), ops.wide_head_grad(z, w, b, r)

    for got, want in zip(ours(), eager()):
        torch.testing.assert_close(
            got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(want.abs().max())
        )
    check_backend("wide_head_grad", device)
    call = {"eager": eager, "gcfast": ours}
    timings = benchmark.pedantic(lambda: compare(call, repeats=9, warmup=1), rounds=1)
    title = f"wide_forward and wide_head_grad, n={n} d={d} m={m} C={c}, {dtype}"
    show(title, timings, *limit(2 * n * m * (2 * d + 2 * c), device, dtype))


SQUARE = sized(
    {"cpu": (4_000, 128, 4_400), "cuda": (20_000, 512, 22_000)},
    smallest=dict.fromkeys(("cpu", "cuda"), (64, 16, 72)),
)


def bench_wide_gram_table(benchmark, device):
    """K in float64 with its proved error bound, beside stored features and a product that proves nothing."""
    n, d, m = SQUARE[device.type]
    (z, w, b, *_), _ = layer(device, torch.float64, (n, d, m, 1))

    def eager():
        phi = F.softplus(F.linear(z, w, b))
        return phi @ phi.mT

    call = {"eager": eager, "gcfast": lambda: gcfast.wide_gram(z, w, b)}
    gram, bound = call["gcfast"]()
    torch.testing.assert_close(gram, eager(), rtol=1e-8, atol=1e-8 * float(gram.max()))
    print(f"\n  error bound: {bound / float(torch.linalg.matrix_norm(gram)):.1e} of the norm")
    timings = benchmark.pedantic(lambda: compare(call, repeats=5, warmup=1, device=device), rounds=1)
    flop = n * n * m + 4 * n * m * d
    peak = matmul_peak(torch.float64)
    title = f"wide_gram, n={n} d={d} m={m}, {torch.float64}"
    show(title, timings, flop / peak, "half a product and two sweeps at measured matmul peak")


# -- training


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with-gradients"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def bench_table(benchmark, device, dtype, grad):
    (*args, g), (n, d, m, c) = layer(device, dtype)
    if grad:
        args = [a.requires_grad_() for a in args]

    def plain(z, w, b, h, hb):
        return F.linear(F.softplus(F.linear(z, w, b)), h, hb)

    def step(f):
        return lambda: torch.autograd.grad(f(*args), args, g) if grad else f(*args)

    for got, want in zip(step(ops.wide_forward)(), step(plain)()):
        torch.testing.assert_close(
            got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(want.abs().max())
        )
    check_backend("wide_forward", device)
    call = {"plain torch": step(plain)}
    if device.type == "cuda":
        call = with_compiled(call, plain, step)
    call["gcfast"] = step(ops.wide_forward)
    timings = benchmark.pedantic(lambda: compare(call, repeats=7, warmup=1), rounds=1)
    # If nothing is computed again: products with weight and head, and for gradients two more of each.
    flop = (3 if grad else 1) * 2 * n * m * (d + c)
    title = f"wide_forward{' and gradients' if grad else ''}, n={n} d={d} m={m} C={c}, {dtype}"
    show(title, timings, *limit(flop, device, dtype))


STEP_CODE = """
model = {}
def call(n): model(z[:n]).mul(r[:n]).sum().backward()
"""
EAGER_MODEL = "nn.Sequential(nn.Linear(d, m), nn.Softplus(), nn.Linear(m, c))"


def bench_training_step_table(benchmark, device):
    """Forward and backward of a wide layer and its head on a batch, gradients of the input as well."""
    sizes = n, d, m, c = sized((256, 256, 8_800, 10), smallest=(16, 16, 72, 10))
    ours = gcfast.WideHead(gcfast.WideLayer(d, m), torch.nn.Linear(m, c)).to(device)
    eager = torch.nn.Sequential(torch.nn.Linear(d, m), torch.nn.Softplus(), torch.nn.Linear(m, c)).to(device)
    eager.load_state_dict(dict(zip(eager.state_dict(), ours.state_dict().values())))
    z, g = torch.randn(n, d, device=device, requires_grad=True), torch.randn(n, c, device=device)

    def step(model):
        return lambda: torch.autograd.grad(model(z), [z, *model.parameters()], g)

    for got, want in zip(step(ours)(), step(eager)()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    call = {"eager": step(eager)}
    unfused = gcfast.WideHead(*(ours.wide, ours.head))
    unfused.fused = False
    call = with_compiled(call, eager, step)
    call |= {"gcfast, features stored": step(unfused), "gcfast": step(ours)}
    timings = benchmark.pedantic(lambda: compare(call, repeats=25, warmup=3), rounds=1)
    codes = {"eager": STEP_CODE.format(EAGER_MODEL)}
    codes["gcfast"] = STEP_CODE.format("gcfast.WideHead(gcfast.WideLayer(d, m), nn.Linear(m, c))")
    title = f"WideHead training step, n={n} d={d} m={m} C={c}, {torch.float32}"
    gradients = sum(p.nbytes for p in ours.parameters())
    extra = with_memory(codes, sizes, device, gradients)
    show(title, timings, *limit(3 * 2 * n * m * (d + c), device, torch.float32), extra=extra)
