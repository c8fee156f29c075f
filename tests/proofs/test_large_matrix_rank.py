"""One large matrix: counts of eigenvalues by a verified LDL^T, whatever LAPACK proposes, and their use."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from gcfast import matrix_rank
from gcfast.proofs import eigenvalue_counts, large_matrix_rank
from gcfast.proofs.eigenvalue_counts import count_above
from gcfast.proofs.large_matrix_rank import rank_of_large

from rank_cases import Spectrum, flint, needs_flint  # isort: skip


def symmetric(kind: str, n: int) -> torch.Tensor:
    a = torch.randn(n, n, dtype=torch.float64)
    if kind == "indefinite":
        return a + a.T
    if kind == "semidefinite":
        b = torch.randn(n, (n + 1) // 2, dtype=torch.float64)
        return b @ b.T
    if kind == "hollow":  # a zero diagonal: pivots of two rows, and interchanges
        return (a + a.T).fill_diagonal_(0.0)
    if kind == "path":
        return torch.diag(torch.ones(n - 1).double(), 1) + torch.diag(torch.ones(n - 1).double(), -1)
    assert kind == "graded"
    scale = torch.logspace(0, -8, n, dtype=torch.float64)
    return (a + a.T) * scale.outer(scale)


KINDS = ["indefinite", "semidefinite", "hollow", "path", "graded"]


def exact_above(s: torch.Tensor, shift: Fraction) -> int:
    """How many eigenvalues are above the shift: Descartes's rule of signs, exact where all roots are real."""
    needs_flint()
    rows = [
        [Fraction(v) - (shift if i == j else 0) for j, v in enumerate(r)] for i, r in enumerate(s.tolist())
    ]
    matrix = flint.fmpq_mat([[flint.fmpq(x.numerator, x.denominator) for x in row] for row in rows])
    signs = [c > 0 for c in matrix.charpoly().coeffs() if c != 0]
    return sum(x != y for x, y in itertools.pairwise(signs))


def check_exactly(s: torch.Tensor, shift: float) -> float:
    count, error = count_above(s.tril(), shift)
    if error == math.inf:
        return error
    at_least = exact_above(s, Fraction(shift) - Fraction(error))
    at_most = exact_above(s, Fraction(shift) + Fraction(error))
    assert at_most <= count <= at_least, (count, at_most, at_least, error)
    return error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_counts_hold_exactly_and_say_something(kind, n):
    s = symmetric(kind, n)
    values = torch.linalg.eigvalsh(s)
    size = float(values.abs().amax())
    for shift in (0.0, float(values[n // 2]), float(values[-1]), 0.3 * size, -0.2 * size, 1e-9 * size):
        error = check_exactly(s, shift)
        # at an eigenvalue the last pivot may be anything, zero too
        assert (
            error < 1e-12 * (size + abs(shift) + 1e-300)
            or float((values - shift).abs().amin()) <= 1e-14 * size
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [100, 257, 600])
def test_counts_of_large_ones(kind, n):
    s = symmetric(kind, n)
    values = torch.linalg.eigvalsh(s)
    size = float(values.abs().amax())
    for shift in (0.05 * size, -0.05 * size):
        count, error = count_above(s.tril(), shift)
        assert error < 1e-9 * size
        assert int((values > shift + error).sum()) <= count <= int((values > shift - error).sum())


@pytest.mark.parametrize("spoil", ["entries", "signs", "pivots", "nonsense"])
def test_a_spoiled_factor_costs_the_bound_not_the_truth(spoil, monkeypatch):
    honest = torch.linalg.ldl_factor_ex

    def spoiled(a, **kwargs):
        factor, pivots, info = honest(a, **kwargs)
        factor = factor.clone()
        if spoil == "entries":
            factor *= 1 + 1e-3 * torch.randn_like(factor)
        elif spoil == "signs":
            factor.diagonal().neg_()
        elif spoil == "pivots":
            pivots = torch.arange(1, len(a) + 1, dtype=pivots.dtype)
        else:
            factor = torch.randn_like(factor)
        return factor, pivots, info

    monkeypatch.setattr(torch.linalg, "ldl_factor_ex", spoiled)
    informative = 0
    for n in (2, 4, 7):
        for kind in KINDS:
            s = symmetric(kind, n)
            informative += check_exactly(s, 0.1) > 1e-6
    assert informative > 0  # the spoiling was felt


def test_counts_allow_for_products_that_err_by_all_they_may(monkeypatch):
    """Pivots of two rows alone, and products whose errors hide how far the factor is from the matrix."""
    n = 128
    low, middle = torch.eye(n, dtype=torch.float64), torch.zeros((n, n), dtype=torch.float64)
    low[-1, 1::2] = 1.0
    even = torch.arange(0, n, 2)
    middle[even, even + 1] = middle[even + 1, even] = 1.0
    factor, pivots = low.clone(), (even + 2).neg().repeat_interleave(2)
    factor.fill_diagonal_(0.0)
    factor[even + 1, even] = 1.0
    error = (n - 2) * 2.0**-53 * (low @ middle @ low.mT)  # no entry is negative

    def add_product(out, a, b, inner):
        out += a @ b + (n - 2) * 2.0**-53 * (a.abs() @ b.abs())

    monkeypatch.setattr(torch.linalg, "ldl_factor_ex", lambda a: (factor, pivots, torch.tensor(0)))
    monkeypatch.setattr(eigenvalue_counts, "add_product_", add_product)
    count, bound = count_above((low @ middle @ low.mT + error).tril(), 0.0)
    assert count == n // 2 and float(torch.linalg.matrix_norm(error, 2)) <= bound < 1e-11


def test_every_way_gives_what_torch_says(monkeypatch):
    counts = []
    honest = large_matrix_rank.count_above
    monkeypatch.setattr(large_matrix_rank, "count_above", lambda *a: counts.append(honest(*a)) or counts[-1])
    n, m = 300, 280
    k = min(n, m)
    left, right = (torch.linalg.qr(torch.randn(j, k, dtype=torch.float64))[0] for j in (n, m))
    for dtype in (torch.float32, torch.float64):
        matrices = {
            "full": torch.randn(n, m).to(dtype),
            "half": (torch.randn(n, k // 2).double() @ torch.randn(k // 2, m).double()).to(dtype),
            "one less": torch.randn(n, m).to(dtype),
            "graded": ((left * torch.logspace(0, -10, k, dtype=torch.float64)) @ right.T).to(dtype),
            "none": torch.zeros(n, m, dtype=dtype),
            "tiny": 1e-30 * torch.randn(n, m).to(dtype),
        }
        matrices["one less"][:, 7] = 2 * matrices["one less"][:, 11]
        for name, a in matrices.items():
            found, want = matrix_rank(a), int(torch.linalg.matrix_rank(a))
            assert int(found.lower) <= want <= int(found.upper), name
            assert int(found.rank) == want, name
            # float64's own tolerance, squared, is beyond a Gram in float64: from below only
            certain = dtype == torch.float32 or name in ("full", "graded", "none", "tiny")
            assert bool(found.certified) or not certain, (name, str(found))
            assert int(found.lower) == want, name
            values = torch.linalg.svdvals(a.double())
            assert float(found.sigma_min_lower) <= float(values[-1]) * (1 + 1e-5)
            assert float(found.sigma_max_upper) >= float(values[0]) * (1 - 1e-12)
    assert counts  # the inertia was asked


def test_tolerances_and_exact_counts_at_them():
    n = 270
    values = torch.arange(1, n + 1).double()  # exact singular values of a scaled permutation
    a = torch.diag(values)[torch.randperm(n)][:, torch.randperm(n)]
    for atol in (0.5, 1.0, 100.0, 100.5, 269.999, 270.0, 1e9, math.inf):
        found = rank_of_large(a[None], torch.tensor([atol]).double(), torch.zeros(1).double())
        rank, lower, upper = (int(t) for t in found[:3])
        above, ties = int((values > atol).sum()), int((values == atol).sum())
        assert lower <= above <= upper and (rank == above or ties), atol
        assert (lower == upper) == (ties == 0), atol


def test_one_exactly_deficient_is_never_full():
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        a = torch.randint(-9, 10, (270, 290), generator=g).double()
        a[5] = a[17] - 2 * a[200] + a[3]
        found = matrix_rank(a, atol=0.0, rtol=0.0)
        assert int(found.lower) <= 269 and float(found.sigma_min_lower) == 0.0
        small = a[:12, :20].clone()
        small[5] = small[1] + small[2]
        g_small = small @ small.T  # exact integers
        count, error = count_above(g_small.tril(), 1e-3)
        assert count - (error > 1e-3) <= Spectrum(small).above(0.0)
