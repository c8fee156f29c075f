"""Witnesses of dependent rows, and the rank that is left: found, confirmed exactly, proved."""

from __future__ import annotations

import math

import pytest
import torch

from gcfast.features.stacked_ones import FeaturesWithOnes
from gcfast.proofs import dependency
from gcfast.proofs.dependency import near_dependency, prove_rank_of_basis


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


def test_the_rank_of_nothing():
    zero = torch.zeros((5, 8), dtype=torch.float64)
    assert prove_rank_of_basis(zero, ones=False) == (0, None)
    assert prove_rank_of_basis(zero)[0] == 1 and near_dependency(zero).exact
