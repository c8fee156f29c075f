"""What float64 hides of a loss, against 80 digits: values, residuals, infima, and outputs that are off."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
import torch
from heads_exact import DIGITS, ExactLoss, rows_of

from gcfast.losses import (
    MSE,
    BCEWithLogits,
    ConvexLoss,
    CrossEntropy,
    Huber,
    bounds_at,
    gap_above,
    infimum_with_copies,
    mean_above,
)

N = 40
LOSSES = {
    "hard": (CrossEntropy(), ExactLoss("cross_entropy")),
    "soft": (CrossEntropy(), ExactLoss("cross_entropy")),
    "one-hot": (CrossEntropy(), ExactLoss("cross_entropy")),
    "smoothed": (CrossEntropy(0.1), ExactLoss("cross_entropy", label_smoothing=0.1)),
    "mse": (MSE(), ExactLoss("mse")),
    "bce": (BCEWithLogits(), ExactLoss("bce_with_logits")),
    "huber": (Huber(0.7), ExactLoss("huber", delta=0.7)),
}


def _case(name, seed, c):
    """Outputs and targets at one scale a row, next to the target as well as far from it."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.choice([-300, -150, -20, -8, -1, 0, 1, 2, 3, 15], (N, 1))
    z = rng.standard_normal((N, c)) * scale
    if name in ("hard", "smoothed"):
        y = rng.integers(0, c, N)
        z[::3, 0] += 40.0
    elif name in ("soft", "one-hot"):
        y = (
            rng.dirichlet(rng.choice([0.05, 1.0], c), N)
            if name == "soft"
            else np.eye(c)[rng.integers(0, c, N)]
        )
    elif name == "bce":
        y = rng.choice([0.0, 1e-300, 1e-17, 0.3, 0.5, 1 - 2.0**-53, 1.0], (N, c))
    else:
        y = rng.standard_normal((N, c)) * 10.0 ** rng.choice([-200, -8, 0, 8, 15], (N, 1))
        z[::2] = y[::2] * (1 + 10.0 ** rng.integers(-16, 0, (N, c)))[::2]
    return torch.from_numpy(z), torch.from_numpy(np.asarray(y))


@pytest.mark.parametrize("c", [1, 3, 70])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_residuals_are_as_near_to_the_truth_as_is_said(name, c):
    loss, exact = LOSSES[name]
    c = max(c, 2) if isinstance(loss, CrossEntropy) else c
    z, targets = _case(name, c, c)
    y = loss.prepare(targets, N, c)
    at = bounds_at(loss, z, y, torch.zeros_like(z))
    of_value, _ = loss.rounding(z, y, at.computed, at.residual)
    with mp.workdps(DIGITS):
        for i, (a, b) in enumerate(zip(rows_of(z), exact.targets(targets, c), strict=True)):
            value, slope = exact.value(a, b), exact.slope(a, b)
            assert abs(mp.mpf(float(at.computed[i])) - value) <= float(of_value[i]), (i, a, b)
            assert float(at.value[i]) >= value
            for k in range(c):
                off = abs(mp.mpf(float(at.residual[i, k])) - slope[k])
                assert off <= float(at.residual_error[i, k]), (i, k, a, b)
    assert bool((of_value <= 1e-12 * at.computed.abs() + 1e-290).all())  # and it says something
    assert bool((at.residual_error <= 1e-11 * (1 + at.residual.abs())).all())


@pytest.mark.parametrize("name", LOSSES)
def test_no_outputs_within_the_error_have_a_larger_loss(name):
    loss, exact = LOSSES[name]
    c = 3
    z, targets = _case(name, 5, c)
    y = loss.prepare(targets, N, c)
    rng = np.random.default_rng(0)
    error = torch.from_numpy(np.abs(rng.standard_normal((N, c))) * 10.0 ** rng.integers(-12, 3, (N, 1)))
    error[::7] = 0.0
    at = bounds_at(loss, z, y, error)
    with mp.workdps(DIGITS):
        rows = zip(rows_of(z), exact.targets(targets, c), rows_of(error), strict=True)
        for i, (a, b, e) in enumerate(rows):
            value, slope = exact.value(a, b), exact.slope(a, b)
            for signs in itertools.product((-1, 0, 1), repeat=c):  # a convex function is largest at a corner
                d = [s * x for s, x in zip(signs, e, strict=True)]
                there = exact.value([x + s for x, s in zip(a, d, strict=True)], b)
                assert there <= mp.mpf(float(at.value[i])), (i, signs)
                assert there - value - mp.fdot(slope, d) <= mp.mpf(float(at.excess[i])), (i, signs)


@pytest.mark.parametrize("name", LOSSES)
def test_no_infimum_is_above_the_truth_nor_far_below_it(name):
    loss, exact = LOSSES[name]
    for seed, c in ((0, 2), (1, 3), (2, 70)):
        _, targets = _case(name, seed, c)
        if name == "mse" and seed:
            targets = 1e15 + targets.clamp(-8, 8)  # a mean that float64 does not hold
        y = loss.prepare(targets, N, c)
        with mp.workdps(DIGITS):
            rows = exact.targets(targets, c)
            for row, found in zip(rows, loss.infimum(y).tolist(), strict=True):
                assert (
                    exact.infimum([row]) * (1 - mp.mpf(1e-12)) - mp.mpf(1e-290)
                    <= found
                    <= exact.infimum([row])
                )
            for copies in ([], [[0, 3], [1, 2, 5, 9], list(range(10, 30))]):
                alone = set(range(N)) - {i for group in copies for i in group}
                groups = [[rows[i] for i in group] for group in [*copies, *([i] for i in alone)]]
                true = mp.fsum(exact.infimum(group) for group in groups) / N
                found = infimum_with_copies(loss, y, copies)
                assert found <= true, (seed, copies)
                assert found >= true * (1 - mp.mpf(1e-12)) - mp.mpf(1e-290), (seed, copies)


class _Quartic(ConvexLoss):
    """Nothing is known of its curvature."""

    name = "quartic"

    def value(self, z, y):
        return ((z - y) ** 2 + 0.1 * (z - y) ** 4).mean(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=torch.float64)


class _Smooth(_Quartic):
    name = "log cosh"

    def value(self, z, y):
        t = (z - y).abs()
        return (t + torch.log1p(torch.exp(-2 * t)) - math.log(2)).sum(1)

    def smoothness(self, c):
        return 1.0


@pytest.mark.parametrize("loss", [_Quartic(), _Smooth()], ids=repr)
def test_a_loss_of_the_users_own_is_bounded_by_convexity_or_its_smoothness(loss):
    g = torch.Generator().manual_seed(0)
    z, y = (torch.randn((N, 3), generator=g, dtype=torch.float64) for _ in range(2))
    for size in (1e-9, 1e-3, 1.0):
        error = size * torch.rand((N, 3), generator=g, dtype=torch.float64)
        at = bounds_at(loss, z, y, error)
        for signs in itertools.product((-1.0, 0.0, 1.0), repeat=3):
            d = torch.tensor(signs, dtype=torch.float64) * error
            there = loss.value(z + d, y)
            assert bool((there <= at.value).all())
            rest = there - loss.value(z, y) - (loss.residual(z, y) * d).sum(1)
            assert bool((rest <= at.excess + 1e-14).all())
        assert bool((at.value - at.computed <= 200 * size).all())  # and it says something
    assert bool(torch.isinf(bounds_at(loss, z, y, torch.full_like(z, math.inf)).value).all())


def test_means_and_gaps_are_rounded_outward():
    rng = np.random.default_rng(0)
    with mp.workdps(DIGITS):
        for _ in range(50):
            values = torch.from_numpy(rng.standard_normal(7) * 10.0 ** rng.integers(-20, 20, 7))
            true = mp.fsum(mp.mpf(x) for x in values.tolist()) / 7
            assert true <= mean_above(values) <= true + abs(true) * mp.mpf(1e-15)
            loss, infimum = values[:2].abs().tolist()
            assert mp.mpf(loss) - mp.mpf(infimum) <= gap_above(loss, infimum)
    assert gap_above(0.3, 0.0) == 0.3 and mean_above(torch.zeros(3)) == 0.0
    for bad in (math.nan, math.inf):
        assert mean_above(torch.tensor([bad, 1.0])) == math.inf
    assert (
        gap_above(math.inf, math.inf)
        == math.inf
        == mean_above(torch.full((3,), 1.7e308, dtype=torch.float64))
    )
