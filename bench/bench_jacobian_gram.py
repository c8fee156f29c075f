"""The Gram of a Jacobian from its factors: composed of torch's products, the kernel, a product alone."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, matmul_peak, on_backend, show, sized
from _fma import fma_peak

from gcfast import ops

# n, C, T and the layers' ends: an MLP, a late convolution of a ResNet, the tokens of a transformer
SHAPES = sized(
    {
        "MLP": (512, 10, 1, (512, 1024, 1034)),
        "convolution": (8, 10, 16, (512,)),
        "tokens": (16, 10, 65, (64,)),
    },
    smallest={"MLP": (4, 3, 1, (8, 16, 17)), "convolution": (2, 3, 4, (8,)), "tokens": (2, 3, 5, (8,))},
)


def composed(out, g, h, scale, ends):
    """In plain torch, by positions of g: a product with all of h, its scales repeated, a sum."""
    (n, c, t, _), (n2, c2, t2, _) = g.shape, h.shape
    for layer, begin, end in zip(scale, (0, *ends), ends):
        for p in range(t):
            part = g[:, :, p, begin:end].flatten(0, 1) @ h[..., begin:end].flatten(0, 2).mT
            part = part.view(n, c, n2 * c2, t2)
            part *= layer[p::t].view(n, n2, t2).repeat_interleave(c2, 1).unsqueeze(1)
            out += (part.sum(-1) if t2 > 1 else part).view(out.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_table(benchmark, device, shape, dtype):
    n, c, t, ends = SHAPES[shape]
    if device.type == "cpu" and shape == "MLP" and dtype == torch.float64:
        n //= 2
    g, h = (torch.randn(n, c, t, ends[-1], dtype=dtype, device=device) for _ in range(2))
    scale = torch.randn(len(ends), n * t, n * t, dtype=dtype, device=device)
    out, want = (torch.zeros(n * c, n * c, dtype=dtype, device=device) for _ in range(2))
    args = (g, h, scale)
    ops.jacobian_gram(out, *args, ends=ends, lower=True)
    composed(want, *args, ends)
    eps = torch.finfo(dtype).eps
    size = (ends[-1] * t * t) ** 0.5
    torch.testing.assert_close(out, want.tril(), rtol=0, atol=(100 + 10 * t) * eps * size)
    ours = ops.last_backend("jacobian_gram")
    assert ours == ("cpu" if device.type == "cpu" else "triton")
    candidates = {
        "torch": lambda: composed(want, *args, ends),
        "reference": on_backend("reference", lambda: ops.jacobian_gram(out, *args, ends=ends, lower=True)),
        ours: lambda: ops.jacobian_gram(out, *args, ends=ends, lower=True),
    }
    if t == 1:  # as many products in one call, of all of out
        product = torch.empty_like(out)
        candidates["torch.mm"] = lambda: torch.mm(g.flatten(0, 2), h.flatten(0, 2).mT, out=product)
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=7, warmup=1), rounds=1)
    products = len(out) * (len(out) + 1) // 2 * ends[-1] * t * t
    peak, why = fma_peak(dtype) if device.type == "cpu" else (matmul_peak(dtype), "products at matmul peak")
    size = f"{shape}, {n} x {c}, {t} positions, {len(ends)} layers of {ends[-1]}"
    show(f"jacobian_gram, {size}, {dtype}", timings, 2 * products / peak, why)
