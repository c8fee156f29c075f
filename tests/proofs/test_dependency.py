"""Witnesses of dependent rows, and the rank that is left: found, confirmed exactly, proved."""

from __future__ import annotations

import math

import pytest
import torch

from gcfast.features import FeaturesWithOnes, StoredFeatures
from gcfast.proofs import dependency
from gcfast.proofs.dependency import near_dependency, prove_rank_of_basis
from gcfast.proofs.rank_proof import RankProof


def test_dependencies_are_found_and_verified_exactly():
    g = torch.Generator().manual_seed(0)
    h = torch.randint(-50, 50, (40, 60), generator=g).double()
    h[9] = h[1] + h[2] - h[30]
    found = near_dependency(h)
    assert found is not None and found.exact
    assert sorted(found.samples) == [1, 2, 9, 30]
    assert near_dependency(torch.randn((40, 60), dtype=torch.float64)) is None
    # coefficients that no simple fraction gives; exact arithmetic still decides
    h = (
        torch.randint(-50, 50, (40, 7), generator=g).double()
        @ torch.randint(-50, 50, (7, 60), generator=g).double()
    )
    found = near_dependency(h, ones=False)
    assert found.exact and len(found.samples) == 8
    residual = torch.tensor(found.coefficients, dtype=torch.float64) @ h[found.samples]
    assert float(residual.abs().amax()) <= 1e-9


def test_an_exact_dependency_is_preferred_to_a_shorter_near_one():
    h = torch.randint(-50, 50, (40, 60), generator=torch.Generator().manual_seed(0)).double()
    h[3] = h[5] * (1 + 2.0**-52)  # not a copy of a multiple: rounded
    h[3, 0] = torch.nextafter(h[3, 0], torch.tensor(math.inf, dtype=torch.float64))
    h[9] = h[1] + h[2] - h[30]
    found = near_dependency(h, ones=False)
    assert found.exact and found.samples == [1, 2, 9, 30]


@pytest.mark.parametrize(("n", "rank"), [(40, 39), (300, 290), (300, 150), (300, 3)])
@pytest.mark.parametrize("whole", [True, False])
def test_the_rank_of_a_deficient_matrix_is_proved_from_below(n, rank, whole):
    g = torch.Generator().manual_seed(n + rank)
    draw = (lambda *s: torch.randint(-9, 10, s, generator=g).double()) if whole else torch.randn
    h = draw(n, rank).double() @ draw(rank, n + 20).double()
    lower, proof = prove_rank_of_basis(h, ones=False)
    assert lower == rank and proof.proved  # rounded factors have full rank, but beyond every bound
    found = near_dependency(h, ones=False)
    assert found.residual <= 1e-13 and len(found.samples) <= rank + 1


def test_rows_that_cannot_be_proved_independent_are_not_counted(monkeypatch):
    monkeypatch.setattr(dependency, "first_tolerance", lambda h1: 1e-19)  # noise passes for a pivot
    g = torch.Generator().manual_seed(0)
    h = torch.randn((300, 200), generator=g).double() @ torch.randn((200, 320), generator=g).double()
    noisy = dependency.row_basis(dependency.lower_gram(FeaturesWithOnes(h, ones=False)), 1e-19)
    assert 200 < len(noisy.kept) < 300
    assert prove_rank_of_basis(h, ones=False)[0] == 200


def test_rows_of_a_basis_are_those_with_pivots_above_the_tolerance():
    def kept(rows, tolerance):
        return dependency.row_basis(torch.tensor(rows, dtype=torch.float64).tril(), tolerance).kept.tolist()

    # the second pivot is 3 - 2^2 / 4, two thirds of its row's square
    assert kept([[4, 2], [2, 3]], 0.66) == [0, 1] and kept([[4, 2], [2, 3]], 0.67) == [0]
    assert kept([[4, 2, 2], [2, 3, 1], [2, 1, 9]], 0.8) == [0, 2]
    assert kept([[4, 2], [2, 2]], 0.5) == [0]  # above, not at it
    assert kept([[2.0**-1022, 0], [0, 2.0**-1022]], 0.7) == [0, 1] and kept([[0, 0], [0, 1]], 0.7) == [1]
    h1 = FeaturesWithOnes(torch.zeros((3, 4), dtype=torch.float64))
    assert dependency.first_tolerance(h1) == 10.0 * (3 + 5) * 2.0**-53


def test_as_many_dependencies_are_tried_and_as_large_ones_as_said():
    draw = lambda *s: torch.randint(-9, 10, s, generator=torch.Generator().manual_seed(1)).double()  # noqa: E731
    for others, exact in ((31, True), (32, False)):  # beside the sum of them: 32 rows and 33
        h = draw(others + 1, 60)
        h[others] = h[:others].sum(0)
        found = near_dependency(h, ones=False)
        assert len(found.samples) == others + 1 and found.exact == exact
    for pairs, exact in ((7, True), (8, False)):  # nearly equal ones, and after them three rows that add up
        h = draw(2 * pairs + 3, 60)
        h[pairs : 2 * pairs] = h[:pairs] * (1 + 2.0**-50)
        h[pairs : 2 * pairs, 0] = h[:pairs, 0]
        h[-1] = h[-2] + h[-3]
        found = near_dependency(h, ones=False)
        assert found.exact == exact and len(found.samples) == (3 if exact else 2)


def test_the_dropped_rows_that_need_fewest_others_are_written_by_them():
    def combinations(h):
        h1 = FeaturesWithOnes(torch.tensor(h, dtype=torch.float64), ones=False)
        return dependency._combinations(h1, dependency.row_basis(dependency.lower_gram(h1), 1e-14))

    # of the largest coefficient, or of 1, what is below a thousandth does not count
    few, many = [(1, 7e-4), (8, 6e-3), (0.01, 7e-4)], [(1, 1.5e-3), (8, 1.2e-2), (0.01, 1.5e-3)]
    rows = [(1, 0), (0, 1), many[0], few[0], many[1], few[1], many[2], few[2]]
    c, dropped = combinations(rows)
    assert dropped.tolist() == [3, 5, 7, 2, 4, 6]
    torch.testing.assert_close(c, torch.tensor([*few, *many], dtype=torch.float64))
    c, dropped = combinations([(1, 0), (0, 1), *[(1, 1)] * 35, *[(0, 3)] * 2])
    assert len(c) == len(dropped) == 32 and dropped.tolist()[:2] == [37, 38]
    # rows that are nearly parallel: the Gram alone would leave four digits
    c, _ = combinations([(1, 0), (1, 1.7e-6), (5, 3.4e-6)])
    torch.testing.assert_close(c, torch.tensor([[3.0, 2.0]], dtype=torch.float64), rtol=1e-11, atol=0.0)


def test_coefficients_that_the_residual_does_not_miss_are_left_out():
    def samples(*kept):  # of coefficient and length, each in a direction of its own
        rows = torch.diag(torch.tensor([size for _, size in kept], dtype=torch.float64))
        c = torch.tensor([value for value, _ in kept], dtype=torch.float64)
        h = StoredFeatures(torch.cat([rows, (c @ rows)[None]]))
        found = dependency._sparse(h, False, c, len(kept), torch.arange(len(kept)))
        values = [-float(c[k]) for k in found.samples[:-1]]
        assert found.coefficients == [*values, 1.0] and found.samples[-1] == len(kept)
        assert found.residual < 1e-13 and not found.exact
        return found.samples[:-1]

    one, none = (1.0, 1.0), 1e-30  # a row so short that no residual misses it
    assert samples(one, (1.5e-5, none)) == [0, 1] and samples(one, (7e-6, none)) == [0]
    assert samples((8.0, 1.0), (6e-5, none)) == [0] and samples((0.5, 1.0), (1.5e-5, none)) == [0, 1]
    missed = (5e-6, 1.0)  # by the first try
    assert samples(one, missed, (1.5e-8, none)) == [0, 1, 2] and samples(one, missed, (7e-9, none)) == [0, 1]
    late = (5e-9, 1.0)  # by the second as well
    assert samples(one, late, (1e-12, none), (0.0, 1.0)) == [0, 1, 2]
    # a residual of 7e-14 is missed by none, one of 1.5e-13 is
    assert samples(one, (5e-6, 2.8e-8)) == [0] and samples(one, (5e-6, 6e-8)) == [0, 1]

    def residual(*rows, c=(1.0,)):
        h = StoredFeatures(torch.tensor(rows, dtype=torch.float64))
        kept = torch.arange(1, len(rows))
        return dependency._sparse(h, False, torch.tensor(c, dtype=torch.float64), 0, kept)

    assert residual((1, 0), (1, 2e-7)).residual == pytest.approx(1e-7, rel=1e-6)
    assert residual((0, 0), c=()).residual == 0.0
    tie = residual((1, 0, 0), (1, 2e-13, 0), (0, 0, 1e-300), c=(1.0, 5e-6))
    assert tie.residual == 1e-13 and tie.samples == [0, 1, 2]  # not below


def test_exact_arithmetic_finds_the_only_candidate():
    def exact(*rows):
        return dependency._exact_dependency(torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1))

    assert exact((0.0, 0.0)) == [1.0] and exact((0.0, 1.0)) is None
    assert exact((0.0, 0.0), (1.0, 2.0)) == [1.0, 0.0]
    assert exact((3.0, 1.0), (6.0, 2.0)) == [-1.0, 0.5] and exact((3.0, 1.0), (6.0, 2.0 + 2**-51)) is None
    assert exact((1.0, 0.0, 2.0), (0.0, 1.0, 3.0), (2.0, -4.0, -8.0)) == [-0.5, 1.0, 0.25]
    assert exact((math.inf, 1.0)) is None
    assert dependency._exact_dependency(torch.zeros((0, 3), dtype=torch.float64)) is None


def test_fewer_rows_are_tried_where_a_proof_fails(monkeypatch):
    tolerances, tried = [], []
    basis = lambda g, tolerance: tolerances.append(tolerance) or honest(g, 1e-9)  # noqa: E731
    honest = dependency.row_basis
    monkeypatch.setattr(dependency, "row_basis", basis)
    unproved = RankProof(False, 0.0, math.inf, 0.0, 0, "")
    monkeypatch.setattr(dependency, "prove_full_rank", lambda h1, **_: tried.append(h1.n) or unproved)
    h = torch.eye(4, 6, dtype=torch.float64)
    first = 10.0 * (4 + 6) * 2.0**-53
    for rows, proofs in ((h, []), (torch.cat([h[:3], h[:1]]), [3] * 4)):
        tolerances.clear()
        assert prove_rank_of_basis(rows, ones=False) == (0, None)
        assert tolerances == pytest.approx([first * 1000**k for k in range(4)], rel=1e-12) and tried == proofs


def test_the_rank_of_nothing():
    zero = torch.zeros((5, 8), dtype=torch.float64)
    assert prove_rank_of_basis(zero, ones=False) == (0, None)
    assert prove_rank_of_basis(zero)[0] == 1 and near_dependency(zero).exact
