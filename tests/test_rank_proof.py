"""Proofs of rank: never for a deficient matrix, always for a well-conditioned one, bounds below the truth."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from gcfast._dependency import near_dependency
from gcfast._rank_proof import gamma, prove_full_rank

SIZES = [(1, 1), (2, 1), (2, 2), (5, 4), (31, 40), (33, 33), (252, 300), (507, 506), (700, 900)]


def _with_condition(n, m, condition, seed=0):
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn((n, n), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn((m, n), generator=g, dtype=torch.float64))[0]
    return (u * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("sharp", [True, False])
def test_random_features_are_proved_and_bounds_hold(device, n, m, dtype, sharp):
    h = torch.randn((n, m), generator=torch.Generator().manual_seed(n), dtype=dtype)
    proof = prove_full_rank(h.to(device), sharp=sharp)
    true = torch.linalg.svdvals(torch.cat([h.double(), torch.ones(n, 1, dtype=torch.float64)], 1))
    assert proof.proved, proof.reason
    assert proof.sigma_min_lower <= float(true[-1]) * (1 + 1e-9)
    assert proof.sigma_max_upper >= float(true[0]) * (1 - 1e-9)
    if sharp:
        assert proof.sigma_min_lower >= 0.85 * float(true[-1])


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e8, 1e10])
@pytest.mark.parametrize(("n", "m"), [(40, 60), (300, 330), (600, 600)])
def test_ill_conditioned_matrices_are_proved(n, m, condition):
    proof = prove_full_rank(_with_condition(n, m, condition), ones=False)
    assert proof.proved, proof.reason
    assert 0.5 / condition <= proof.sigma_min_lower <= (1 + 1e-4) / condition


def test_layouts_give_the_same_proof():
    h = torch.randn((60, 80), dtype=torch.float64)
    plain = prove_full_rank(h)
    strided = torch.zeros((120, 240), dtype=torch.float64)[::2, ::3].copy_(h)
    assert prove_full_rank(strided) == plain
    assert prove_full_rank(h.T.contiguous().T) == plain


@pytest.mark.parametrize("seed", range(40))
def test_integer_matrices_deficient_by_construction_are_never_proved(seed):
    g = torch.Generator().manual_seed(seed)
    n, m = int(torch.randint(2, 60, (), generator=g)), int(torch.randint(60, 90, (), generator=g))
    r = int(torch.randint(1, n, (), generator=g))
    # small integers: every entry of the product is exact, so its rank is at most r < n
    a = (
        torch.randint(-9, 10, (n, r), generator=g).double()
        @ torch.randint(-9, 10, (r, m), generator=g).double()
    )
    a *= 2.0 ** int(torch.randint(-60, 60, (), generator=g))
    assert not prove_full_rank(a, ones=False).proved


@pytest.mark.parametrize("seed", range(20))
def test_exact_copies_and_exact_combinations_are_never_proved(seed):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn((50, 70), generator=g, dtype=torch.float64)
    h[7] = h[31]
    assert not prove_full_rank(h).proved
    h = torch.randint(-1000, 1000, (50, 70), generator=g).double()
    h[7] = 2 * h[31] - h[2]  # affine: dependent with the ones column too
    assert not prove_full_rank(h).proved


def test_more_rows_than_columns_is_never_proved():
    assert not prove_full_rank(torch.randn((30, 20), dtype=torch.float64)).proved


def test_a_difference_of_one_ulp_is_not_called_deficient():
    h = torch.randn((20, 30), dtype=torch.float64)
    h[3] = h[5]
    h[3, 4] = torch.nextafter(h[3, 4], torch.tensor(math.inf, dtype=torch.float64))
    proof = prove_full_rank(h)
    true = float(torch.linalg.svdvals(torch.cat([h, torch.ones(20, 1, dtype=torch.float64)], 1))[-1])
    # rank 20 in truth: either answer is sound
    assert not proof.proved or proof.sigma_min_lower <= 2 * true + 1e-16
    found = near_dependency(h)
    assert found is not None and not found.exact and sorted(found.samples) == [3, 5]


@pytest.mark.parametrize("scale", [1e-120, 1e-30, 1.0, 1e30, 1e120])
def test_scales(scale):
    h = torch.randn((40, 50), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    proof = prove_full_rank(h * scale, ones=False)
    true = float(torch.linalg.svdvals(h)[-1])
    assert proof.proved, proof.reason
    assert 0.8 * true <= proof.sigma_min_lower / scale <= true


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_over_and_underflow_are_refused_not_guessed(scale):
    h = torch.randn((10, 20), dtype=torch.float64) * scale
    proof = prove_full_rank(h, ones=False)
    assert not proof.proved and proof.reason


def test_the_bounds_are_those_of_the_products():
    # a hostile check of the heart of the proof: actual rounding errors stay below gamma_k |A||B|
    for dtype, k in [(torch.float32, 256), (torch.float64, 1024)]:
        a = torch.randn((40, k), dtype=dtype) * 10.0 ** torch.randint(-4, 4, (40, k))
        b = torch.randn((k, 30), dtype=dtype)
        computed = a @ b
        bound = gamma(k, dtype) * (a.abs().double() @ b.abs().double())
        for i, j in [(0, 0), (3, 7), (39, 29)]:
            exact = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[i], b[:, j], strict=True))
            assert abs(Fraction(float(computed[i, j])) - exact) <= Fraction(float(bound[i, j]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_error_of_whitening_is_bounded_and_enters_the_margin(dtype):
    n, m = 12, 15
    h1 = rank.StackedOnes(_with_condition(n, m, 1e9), ones=False)
    x, _ = rank._cholesky_inverse(rank.gram(h1), 1e-13)
    x = rank._lower_times(rank._cholesky_inverse(rank._whiten(h1, x, torch.float64).gram, 1e-13)[0], x)
    white = rank._whiten(h1, x, dtype)
    q = rank._lower_times(x, h1.features).to(dtype)

    def exact(t):
        return [[Fraction(v) for v in row] for row in t.double().tolist()]

    def product(a, b):
        columns = list(zip(*b, strict=True))
        return [[sum(u * v for u, v in zip(row, column, strict=True)) for column in columns] for row in a]

    def distance(a, b):
        rows = [[float(u - v) for u, v in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]
        return float(torch.linalg.matrix_norm(torch.tensor(rows, dtype=torch.float64), 2))

    q_exact = exact(q)
    assert 0 < distance(q_exact, product(exact(x), exact(h1.features))) <= white.witness_error
    transposed = [list(column) for column in zip(*q_exact, strict=True)]
    assert 0 < distance(exact(white.gram), product(q_exact, transposed)) <= white.product_error
    truth = float(torch.linalg.matrix_norm(white.gram.double() - torch.eye(n, dtype=torch.float64), 2))
    assert truth <= white.distance
    margin = math.sqrt(1 - white.distance - white.product_error) - white.witness_error
    assert math.isclose(white.margin, margin, rel_tol=1e-12) and white.witness_error > 1e-8


def test_dependencies_are_found_and_verified_exactly():
    h = torch.randint(-50, 50, (40, 60), generator=torch.Generator().manual_seed(0)).double()
    h[9] = h[1] + h[2] - h[30]
    found = near_dependency(h)
    assert found is not None and found.exact
    assert sorted(found.samples) == [1, 2, 9, 30]
    assert near_dependency(torch.randn((40, 60), dtype=torch.float64)) is None
