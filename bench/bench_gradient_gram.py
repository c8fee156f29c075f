"""The Gram of samples' gradients in a weight: torch.bmm and products by blocks of J, the kernel."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, matmul_peak, on_backend, show, sized
from _fma import fma_peak

from gcfast import ops

# n, C, T, R, S, and how g and a lie: tokens as (C, n, T, R) and (n, T, S), pictures (C, n, R, T), (n, S, T)
SHAPES = sized(
    {
        "ViT feed-forward 1": (16, 10, 65, 512, 128, "tokens"),
        "ViT feed-forward 2": (16, 10, 65, 128, 512, "tokens"),
        "ViT attention": (16, 10, 65, 384, 128, "tokens"),
        "ResNet layer 1": (8, 10, 1024, 64, 576, "pictures"),
        "ResNet layer 2": (8, 10, 256, 128, 1152, "pictures"),
        "ResNet layer 3, downsampling": (8, 10, 64, 256, 128, "pictures"),
    },
    smallest={"ViT": (2, 3, 5, 16, 8, "tokens"), "ResNet": (2, 3, 4, 16, 8, "pictures")},
)


def composed(out, g, a):
    """Blocks of J of 8 MB: a torch.bmm an output, then a sliced product; rows in the order (c, i)."""
    (n, c, _, r), s = g.shape, a.shape[2]
    step = max(1, (8 << 20) // (n * c * s * g.element_size()))
    for r0 in range(0, r, step):
        block = g.new_empty(c, n, min(step, r - r0), s)
        for e in range(c):
            torch.bmm(g[:, e, :, r0 : r0 + step].mT, a, out=block[e])
        rows = block.view(n * c, -1)
        ops.add_product(out, rows, rows.mT, inner=1024, lower=True)


def batched(out, g, a):
    """The same with one torch.bmm of a copy of g."""
    (n, c, t, r), s = g.shape, a.shape[2]
    step = max(1, (8 << 20) // (n * c * s * g.element_size()))
    for r0 in range(0, r, step):
        rows = torch.bmm(g[..., r0 : r0 + step].transpose(2, 3).reshape(n, -1, t), a).view(n * c, -1)
        ops.add_product(out, rows, rows.mT, inner=1024, lower=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_table(benchmark, device, shape, dtype):
    n, c, t, r, s, kind = SHAPES[shape]
    if kind == "tokens":
        g = torch.randn(c, n, t, r, dtype=dtype, device=device).transpose(0, 1)
        a = torch.randn(n, t, s, dtype=dtype, device=device)
    else:
        g = torch.randn(c, n, r, t, dtype=dtype, device=device).permute(1, 0, 3, 2)
        a = torch.randn(n, s, t, dtype=dtype, device=device).mT
    out, want = (torch.zeros(n * c, n * c, dtype=dtype, device=device) for _ in range(2))
    ops.gradient_gram(out, g, a)
    ours = ops.last_backend("gradient_gram")
    assert ours == ("cpu" if device.type == "cpu" else "reference")  # no kernel of its own on the GPU
    batched(want, g, a)
    largest = t * r * s  # a gradient's squared norm, about
    torch.testing.assert_close(out, want, rtol=0, atol=10 * torch.finfo(dtype).eps * largest)
    candidates = {
        "torch": lambda: composed(want, g, a),
        "torch, one bmm": lambda: batched(want, g, a),
        "reference": on_backend("reference", lambda: ops.gradient_gram(out, g, a)),
    }
    if ours == "cpu":
        candidates["cpu"] = lambda: ops.gradient_gram(out, g, a)
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=7, warmup=1), rounds=1)
    products = r * s * n * c * (t + (n * c + 1) / 2)
    peak, why = fma_peak(dtype) if device.type == "cpu" else (matmul_peak(dtype), "products at matmul peak")
    show(f"gradient_gram, {shape}, {n} x {c}, {t} of {r} x {s}, {dtype}", timings, 2 * products / peak, why)
