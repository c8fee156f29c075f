"""Certified rank of one matrix of features beside torch.linalg.matrix_rank, which proves nothing."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, matmul_peak, show
from _mnist import head_problem

from gcfast.features.stacked_ones import StackedOnes
from gcfast.proofs.full_rank import prove_full_rank
from gcfast.proofs.rounding import exact_products, gamma, gram


def _ones(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype, device=h.device)], 1)


def _lapack_form(h: torch.Tensor) -> bool:
    """The same argument with LAPACK's own Cholesky trusted, here for its time only.

    It succeeds on G - s I, so lambda_min(G) >= s - gamma_(n+2) / (1 - gamma_(n+2)) trace(G) (Rump, BIT 2006).
    """
    n = len(h)
    with exact_products():
        g = gram(StackedOnes(h))
        factor = gamma(n + 2)
        g.diagonal().sub_(4 * factor / (1 - factor) * float(g.diagonal().sum()))
        return int(torch.linalg.cholesky_ex(g)[1]) == 0


def bench_table(benchmark, device):
    """n = 4096, m = 4505 and the ones column, float64."""
    n, m = 4096, 4505
    h = torch.nn.functional.softplus(torch.randn(n, 128) @ torch.randn(128, m) / 128**0.5)
    h = h.to(device).double()
    h1 = _ones(h)
    assert prove_full_rank(h, sharp=False).route == "shift" and int(torch.linalg.matrix_rank(h1)) == n
    candidates = {
        "matrix_rank float64": lambda: torch.linalg.matrix_rank(h1),
        "proof": lambda: prove_full_rank(h, sharp=False),
        "proof, sharp sigma": lambda: prove_full_rank(h, sharp=True),
        "LAPACK trusted": lambda: _lapack_form(h),
    }
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=3, warmup=0, device=device), rounds=1)
    # the lower triangle of the Gram, and a Cholesky factor: the residual's products are those of the factor
    limit = (n * n * (m + 1) + n**3 / 3) / matmul_peak(torch.float64)
    show(
        f"certified rank, {n} x {m + 1}, float64",
        timings,
        limit,
        "half a Gram and one Cholesky factor at matmul peak; the sharp bound takes a second factor",
    )


def bench_ill_conditioned(benchmark, device):
    """n = 2000, condition number 1e10: whitening, where the Gram itself is singular to working precision."""
    n, m = 2000, 2200
    u, v = (torch.linalg.qr(torch.randn((k, n), dtype=torch.float64))[0] for k in (n, m))
    h = ((u * torch.logspace(0, -10, n, dtype=torch.float64)) @ v.T).to(device)
    assert prove_full_rank(h, ones=False, sharp=False).route == "whitening"
    candidates = {
        "matrix_rank float64": lambda: torch.linalg.matrix_rank(h),
        "proof": lambda: prove_full_rank(h, ones=False, sharp=False),
        "proof, sharp sigma": lambda: prove_full_rank(h, ones=False, sharp=True),
    }
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=3, warmup=0, device=device), rounds=1)
    # three Grams and two times X H1 by half a product each, the second of these doubled; five or six n^3/3
    limit = (7 * n * n * m + 2 * n**3) / matmul_peak(torch.float64)
    show(
        f"certified rank of condition 1e10, {n} x {m}, float64",
        timings,
        limit,
        "two passes of whitening at matmul peak",
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
