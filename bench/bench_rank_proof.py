"""Certified rank of one matrix of features beside torch.linalg.matrix_rank, which proves nothing."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, matmul_peak, show, sized
from _mnist import head_problem

from gcfast import ops
from gcfast.proofs import prove_full_rank

N, M = sized((4096, 4506), smallest=(48, 53))
# Least operations of a proof by its passes of whitening, as multiples of n^2 m and n^3: none is the lower
# triangle of a Gram and a Cholesky factor (the residual's products are those of the factor); each pass takes
# X H1 by half a product, its Gram, a factor and an inverse; the product of a second pass is a doubled one.
LEAST = {0: (1, 1 / 3), 1: (3, 2 / 3), 2: (7, 2)}


def _ones(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype, device=h.device)], 1)


def _lapack_form(h: torch.Tensor) -> bool:
    """The same argument with LAPACK's own Cholesky trusted, here for its time only.

    It succeeds on G - s I, so lambda_min(G) >= s - gamma_(n+2) / (1 - gamma_(n+2)) trace(G) (Rump, BIT 2006).
    """
    n = len(h)
    g = h.new_zeros(n, n)
    ops.add_product(g, h, h.mT, lower=True)
    unit = (n + 2) * 2.0**-53
    gamma = unit / (1 - unit)
    g.diagonal().sub_(4 * gamma / (1 - gamma) * float(g.diagonal().sum()))
    return int(torch.linalg.cholesky_ex(g)[1]) == 0


def _table(benchmark, device, title, h, others=()):
    """The proof and torch's SVD in turn, on the same float64 matrix."""
    n, m = h.shape
    proof = prove_full_rank(h, ones=False, sharp=False)
    assert proof.proved and int(torch.linalg.matrix_rank(h)) == n, proof.reason
    candidates = {
        "matrix_rank float64": lambda: torch.linalg.matrix_rank(h),
        "proof": lambda: prove_full_rank(h, ones=False, sharp=False),
        "proof, sharp sigma": lambda: prove_full_rank(h, ones=False, sharp=True),
        **dict(others),
    }
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=3, warmup=0, device=device), rounds=1)
    triangles, cubes = LEAST[proof.passes]
    limit = (triangles * n * n * m + cubes * n**3) / matmul_peak(torch.float64)
    how = f"the proof's products by {proof.route}, {proof.passes} passes, at matmul peak"
    show(f"{title}, {n} x {m}, float64", timings, limit, f"{how}; a sharp bound takes another factor")
    return proof


def bench_table(benchmark, device):
    """Softplus features and the ones column."""
    h = torch.nn.functional.softplus(torch.randn(N, 128) @ torch.randn(128, M - 1) / 128**0.5)
    h = _ones(h.to(device).double())
    lapack = {"LAPACK trusted": lambda: _lapack_form(h)}
    assert _table(benchmark, device, "certified rank", h, lapack).route == "shift"


@pytest.mark.parametrize("digits", [6, 10])
def bench_table_condition(benchmark, device, digits):
    """Singular values from 1 down to 10^-digits: past about 1e-6 a Gram is singular to working precision."""
    left, right = (torch.linalg.qr(torch.randn(k, N, dtype=torch.float64))[0] for k in (N, M))
    values = torch.logspace(0, -digits, N, dtype=torch.float64)
    h = ((left * values) @ right.T).to(device)
    proof = _table(benchmark, device, f"certified rank of condition 1e{digits}", h)
    assert proof.sigma_min_lower <= 1.001 * 10.0**-digits


@pytest.mark.parametrize("n", sized([4000, 8000], smallest=[48]))
def bench_mnist_features(benchmark, device, n):
    """Features of a trained wide layer: what float32 matrix_rank says, and the proof."""
    p = head_problem(n, 11 * n // 10, device=device.type)
    proof = benchmark.pedantic(prove_full_rank, args=(p.features,), rounds=1)
    assert proof.proved, proof.reason
    line = f"\n{p.data} features, n = {n}: rank {n} proved, sigma_min >= {proof.sigma_min_lower:.3e}"
    if n <= 4000:
        line += f"; float32 matrix_rank says {int(torch.linalg.matrix_rank(_ones(p.features).float()))}"
    print(line)
