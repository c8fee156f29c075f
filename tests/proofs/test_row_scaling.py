"""Numbers at the ends of float64's range: what is proved holds of the matrix as stored."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import gcfast
from gcfast.features import FeaturesWithOnes
from gcfast.proofs import Tiles, prove_full_rank, scaling
from gcfast.storage import StateFile

ENDS = [-1050, -1000, -600, -511, -350, -300, -290, -280, -271, -200, 200, 300, 400, 480, 511, 600, 900, 1000]


def _times(h: torch.Tensor, exponents: int | torch.Tensor) -> torch.Tensor:
    e = torch.as_tensor(exponents, dtype=torch.float64)
    return scaling.times_power(h, e if e.dim() == 0 else e[:, None])


def _integers(n: int, r: int, m: int, seed: int = 0) -> torch.Tensor:
    """Of rank r or less exactly: products of small integers."""
    g = torch.Generator().manual_seed(seed)
    left = torch.randint(-8, 9, (n, r), generator=g).double()
    return left @ torch.randint(-8, 9, (r, m), generator=g).double()


def _norm(h: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(h, 2))


@pytest.mark.parametrize("end", ENDS)
def test_large_deficient_matrices_at_the_ends_of_the_range(end):
    h = _integers(300, 150, 340)
    found = gcfast.matrix_rank(_times(h, end))
    assert int(found.rank) == 150 and int(found.lower) <= 150 <= int(found.upper)
    true = Fraction(_norm(h)) * Fraction(2) ** end  # exact but for the SVD's last digits
    least = Fraction(2) ** -1022
    assert true * Fraction(1 - 1e-12) <= Fraction(float(found.sigma_max_upper)) <= max(2 * true, least)
    assert not prove_full_rank(_times(h, end), ones=False).proved


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("sharp", [True, False])
def test_full_rank_is_proved_at_the_ends_of_the_range(end, sharp):
    g = torch.Generator().manual_seed(end % 7)
    h = torch.randint(-999, 1000, (50, 60), generator=g).double()
    values = torch.linalg.svdvals(h)
    proof = prove_full_rank(_times(h, end), ones=False, sharp=sharp)
    assert proof.proved, proof.reason
    low, high = (Fraction(float(v)) * Fraction(2) ** end for v in (values[-1], values[0]))
    assert Fraction(proof.sigma_min_lower) <= low * Fraction(1 + 1e-12)
    assert Fraction(proof.sigma_max_upper) >= high * Fraction(1 - 1e-12)
    if end > -1000:
        assert not sharp or Fraction(proof.sigma_min_lower) >= low * Fraction(0.8)
        assert Fraction(proof.sigma_max_upper) <= 3 * high
    large = _times(torch.randint(-99, 100, (260, 280), generator=g).double(), end)
    found = gcfast.matrix_rank(large, rtol=1e-9)
    assert int(found.lower) == 260
    assert int(gcfast.matrix_rank(large, atol=0.0, rtol=0.0).upper) == 260


def test_rows_of_every_size_are_proved_and_bounded():
    g = torch.Generator().manual_seed(5)
    h = torch.randint(-999, 1000, (40, 55), generator=g).double()
    for spread in (300, 900, 1000):
        exponents = torch.randint(-spread, spread, (40,), generator=g)
        rows = _times(h, exponents)
        for sharp in (True, False):
            proof = prove_full_rank(rows, ones=False, sharp=sharp)
            assert proof.proved, proof.reason
            # sigma_min is at most the distance of a row from the others, sigma_max no less than a norm
            i = int(exponents.argmin())
            others = torch.linalg.qr(torch.cat([h[:i], h[i + 1 :]]).mT)[0]
            distance = float((h[i] - others @ (others.mT @ h[i])).norm())
            assert Fraction(proof.sigma_min_lower) <= Fraction(distance * 1.001) * Fraction(2) ** int(
                exponents[i]
            )
            assert proof.sigma_min_lower > 0 or exponents[i] < -1000
            j = int(exponents.argmax())
            top = Fraction(float(h[j].norm())) * Fraction(2) ** int(exponents[j])
            assert proof.sigma_max_upper >= 1e308 or Fraction(proof.sigma_max_upper) >= top * Fraction(
                1 - 1e-12
            )
        # with one more dependent row nothing is proved, whatever the scales
        double = torch.cat([h, h[3:4] - 2 * h[7:8]])
        assert not prove_full_rank(_times(double, torch.cat([exponents, exponents[:1]])), ones=False).proved


def test_a_bound_of_sigma_min_from_scaled_rows_is_sharp():
    """Rows that differ in size by 2^420: sigma_min(H1) from || X D ||, not from the largest scale alone."""
    h = torch.randn((30, 50), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exponents = torch.zeros(30)
    exponents[4] = -420
    proof = prove_full_rank(_times(h, exponents), ones=False)
    others = torch.linalg.qr(torch.cat([h[:4], h[5:]]).mT)[0]
    true = float((h[4] - others @ (others.mT @ h[4])).norm()) * 2.0**-420  # but for 2^-420 of it
    assert proof.proved and 0.5 * true <= proof.sigma_min_lower <= true * 1.001


def test_rows_whose_numbers_would_lose_digits_are_refused():
    h = torch.eye(3, 5, dtype=torch.float64)
    h[0, :2] = torch.tensor([2.0**1000, 2.0**-1000], dtype=torch.float64)
    proof = prove_full_rank(h, ones=False)
    assert not proof.proved and "farther apart than float64's range" in proof.reason
    h[0, 1] = math.inf
    assert not prove_full_rank(h, ones=False).proved
    h[0, :2] = torch.tensor([2.0**1000, 2.0**-20], dtype=torch.float64)
    assert prove_full_rank(h, ones=False).proved


@pytest.mark.parametrize("shape", [(3, 3), (40, 60), (300, 320)])
def test_tolerances_at_the_ends_of_the_range(shape):
    n = shape[0]
    for end in (-1060, -500, 500, 1010):
        a = torch.zeros(shape, dtype=torch.float64)
        a.diagonal().copy_(_times(torch.tensor([1.0] * (n - 1) + [0.5], dtype=torch.float64), end))
        for share, rank in ((0.25, n), (0.75, n - 1), (2.0, 0)):
            found = gcfast.matrix_rank(a, atol=math.ldexp(share, end))
            assert int(found.lower) <= rank <= int(found.upper), (end, share)
            assert end < -1000 or int(found.rank) == rank
        if end > 0:
            assert int(gcfast.matrix_rank(a, atol=1e308).upper) == 0 or end == 1010


def test_scaling_is_exact_where_it_is_not_refused():
    g = torch.Generator().manual_seed(1)
    h = torch.randn((20, 7), generator=g, dtype=torch.float64)
    h = _times(h, torch.randint(-1020, 1000, (20,), generator=g))
    h[3] = 0.0
    h[4, 2] = 2.0**-1074
    rows = scaling.scaled_rows(FeaturesWithOnes(h, ones=False))
    assert rows is not None
    (panel,) = rows.panels()
    for i in range(20):
        assert i == 3 or 0.5 <= float(panel[i].abs().amax()) < 1.0
        for x, y in zip(h[i].tolist(), panel[i].tolist(), strict=True):
            assert Fraction(y) == Fraction(x) * Fraction(2) ** int(rows.exponents[i])


def test_powers_round_outwards():
    assert scaling.lower_power(1.5, -1000) == math.ldexp(1.5, -1000)
    assert scaling.lower_power(1.5, -1030) == 0.0 and scaling.upper_power(1.5, -1030) == 2.0**-1022
    assert scaling.lower_power(1.5, 1030) < math.inf and scaling.upper_power(1.5, 1030) == math.inf


def test_a_proof_of_scaled_rows_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Kept at every step, stopped after each, ends as if it had not been."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn((30, 30), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn((2100, 30), generator=g, dtype=torch.float64))[0]
    h = _times((u * torch.logspace(0, -9, 30, dtype=torch.float64)) @ v.mT, -400)
    want = prove_full_rank(h, ones=False)
    assert want.proved and want.route == "whitening"
    stops = 0
    while True:
        steps = 0

        def stop(step: str, fraction: float) -> None:
            nonlocal steps
            steps += 1
            if steps > 4:
                raise KeyboardInterrupt

        try:
            with StateFile(tmp_path / "state", "proof", "of h", 0.0) as keeper:
                proof = prove_full_rank(h, ones=False, checkpoint=keeper, progress=stop)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 40
    assert stops > 1 and proof == want


def test_gram_of_zero_rows():
    assert not prove_full_rank(torch.zeros((3, 5), dtype=torch.float64), ones=False).proved
    tiles = Tiles.of(torch.eye(3, dtype=torch.float64))
    scaling.scale_columns_(tiles, torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64))
    assert tiles.dense().diagonal().tolist() == [1.0, 0.5, 0.25]
