"""Certified rank of one matrix of features beside torch.linalg.matrix_rank, which proves nothing."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, matmul_peak, show
from _mnist import head_problem

from gcfast._rank_proof import prove_full_rank


def _ones(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype, device=h.device)], 1)


def bench_table(benchmark, device):
    """n = 4096, m = 4505 and the ones column, float64."""
    n, m = 4096, 4505
    h = torch.nn.functional.softplus(torch.randn(n, 128) @ torch.randn(128, m) / 128**0.5)
    h = h.to(device).double()
    h1 = _ones(h)
    assert prove_full_rank(h, sharp=False).proved and int(torch.linalg.matrix_rank(h1)) == n
    candidates = {
        "matrix_rank float64": lambda: torch.linalg.matrix_rank(h1),
        "proof": lambda: prove_full_rank(h, sharp=False),
        "proof, sharp sigma": lambda: prove_full_rank(h, sharp=True),
    }
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=3, warmup=0, device=device), rounds=1)
    # Gram, X H1 and its Gram at half a product each, the last in float32; Cholesky and inverse n^3/3 each
    double = 2 * n * n * (m + 1) + 2 * n**3 / 3
    limit = double / matmul_peak(torch.float64) + n * n * (m + 1) / matmul_peak(torch.float32)
    show(
        f"certified rank, {n} x {m + 1}, float64",
        timings,
        limit,
        "products and factorisations at matmul peak",
    )


@pytest.mark.parametrize("n", [4000, 8000])
def bench_mnist_features(benchmark, device, n):
    """Features of a trained wide layer: what float32 matrix_rank says, and the proof."""
    p = head_problem(n, 11 * n // 10, device=device.type)
    proof = benchmark.pedantic(prove_full_rank, args=(p.features,), rounds=1)
    assert proof.proved, proof.reason
    line = f"\nMNIST features, n = {n}: rank {n} proved, sigma_min >= {proof.sigma_min_lower:.3e}"
    if n <= 4000:
        line += f"; float32 matrix_rank says {int(torch.linalg.matrix_rank(_ones(p.features).float()))}"
    print(line)
