"""Losses against torch.nn.functional, finite differences and direct minimisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gcfast import ConvexLoss
from gcfast.losses import (
    MSE,
    BCEWithLogits,
    CrossEntropy,
    Huber,
    check_convex,
    infimum_with_copies,
    resolve_loss,
)

N, C = 23, 4


def _case(name):
    g = torch.Generator().manual_seed(3)
    z = 3 * torch.randn((N, C), generator=g, dtype=torch.float64)
    real = 2 * torch.randn((N, C), generator=g, dtype=torch.float64)
    labels = torch.randint(0, C, (N,), generator=g)
    soft = torch.softmax(real, 1)
    return {
        "hard": (CrossEntropy(), z, labels, F.cross_entropy),
        "soft": (CrossEntropy(), z, soft, F.cross_entropy),
        "smoothed": (CrossEntropy(0.1), z, labels, lambda a, b: F.cross_entropy(a, b, label_smoothing=0.1)),
        "mse": (resolve_loss("mse"), z, real, F.mse_loss),
        "bce": (BCEWithLogits(), z, soft, F.binary_cross_entropy_with_logits),
        "bce_hard": (BCEWithLogits(), z, F.one_hot(labels, C).double(), F.binary_cross_entropy_with_logits),
        "huber": (Huber(0.7), z, real, lambda a, b: F.huber_loss(a, b, delta=0.7)),
    }[name]


NAMES = ["hard", "soft", "smoothed", "mse", "bce", "bce_hard", "huber"]


@pytest.mark.parametrize("name", NAMES)
def test_value_residual_and_curvature(name):
    loss, z, targets, torch_loss = _case(name)
    y = loss.prepare(targets, N, C)
    assert math.isclose(float(loss.value(z, y).mean()), float(torch_loss(z, targets)), rel_tol=1e-12)
    plain = ConvexLoss.residual(loss, z, y)  # by automatic differentiation of the value
    torch.testing.assert_close(loss.residual(z, y), plain, rtol=1e-9, atol=1e-12)
    v = torch.randn((N, C), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step = 1e-6
    numeric = (loss.residual(z + step * v, y) - loss.residual(z - step * v, y)) / (2 * step)
    inside = torch.ones_like(z, dtype=torch.bool)
    if name == "huber":  # away from the kinks of its residual
        inside = ((z - y).abs() - 0.7).abs() > 1e-4
    torch.testing.assert_close(loss.curvature_product(z, y, v)[inside], numeric[inside], rtol=1e-6, atol=1e-8)
    diagonal = torch.stack(
        [loss.curvature_product(z, y, torch.eye(C, dtype=z.dtype)[c].expand_as(z))[:, c] for c in range(C)], 1
    )
    torch.testing.assert_close(loss.curvature_diagonal(z, y), diagonal)
    assert float(loss.curvature_diagonal(z, y).max()) <= loss.smoothness(C) + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_fenchel_equality_and_inequality(name):
    loss, z, targets, _ = _case(name)
    y = loss.prepare(targets, N, C)
    value, residual, conjugate = loss.terms(z, y)
    torch.testing.assert_close(value + conjugate, (residual * z).sum(1), rtol=1e-10, atol=1e-10)
    other = z + torch.randn_like(z)  # Fenchel and Young: loss(other) >= <r, other> - loss*(r)
    assert bool((loss.value(other, y) >= (residual * other).sum(1) - conjugate - 1e-10).all())


@pytest.mark.parametrize("name", NAMES)
def test_infimum_is_approached_and_never_beaten(name):
    loss, z, targets, _ = _case(name)
    y = loss.prepare(targets, N, C)
    assert bool((loss.value(z, y) >= loss.infimum(y) - 1e-12).all())
    near = loss.reachable(z, y, 1e-7)
    assert near is not None
    assert float((loss.value(near, y) - loss.infimum(y)).max()) <= 1.001e-7


@pytest.mark.parametrize("name", [*NAMES, "own"])
def test_infimum_with_copies_is_that_of_group_after_group(name):
    if name == "own":
        loss, y = _Bare(), torch.rand(N, C, dtype=torch.float64)
    else:
        loss, _, targets, _ = _case(name)
        y = loss.prepare(targets, N, C)
    members = torch.randperm(N).tolist()
    copies = sorted(sorted(group) for group in (members[:2], members[2:7], members[7:9]))
    expected = loss.infimum(y).double()
    for group in copies:
        expected[group] = 0.0
        expected[group[0]] = loss.group_infimum(y[group], torch.zeros(len(group), dtype=torch.long), 1)[0]
    assert infimum_with_copies(loss, y, copies) == pytest.approx(float(expected.mean()), rel=1e-14)
    assert infimum_with_copies(loss, y, []) == pytest.approx(float(loss.infimum(y).double().mean()))


class _Bare(ConvexLoss):
    """Nothing but what must be given."""

    def value(self, z, y):
        return (z - y).pow(4).mean(1) + 0.5 * y[:, 0]

    def infimum(self, y):
        return 0.5 * y[:, 0].float()


@pytest.mark.parametrize("loss", [CrossEntropy(), MSE(), BCEWithLogits(), Huber(0.3), _Bare()], ids=repr)
def test_infimum_of_many_groups_is_one_call(loss, monkeypatch):
    n, c = 40_000, 1000 if isinstance(loss, CrossEntropy) else 2
    y = torch.randint(c, (n,)) if isinstance(loss, CrossEntropy) else torch.rand(n, c, dtype=torch.float64)
    calls = []
    one = type(loss).group_infimum
    monkeypatch.setattr(type(loss), "group_infimum", lambda *args: calls.append(1) or one(*args))
    copies = [[i, i + n // 2] for i in range(n // 2)]
    total = infimum_with_copies(loss, y, copies)
    assert len(calls) == 1
    a, b = y[: n // 2], y[n // 2 :]
    if isinstance(loss, CrossEntropy):
        assert total == pytest.approx(2 * math.log(2) * float((a != b).double().sum()) / n)
    elif isinstance(loss, MSE):
        assert total == pytest.approx(float(((a - b) ** 2 / 2).mean()) / 2)


@pytest.mark.parametrize("delta", [1e-3, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_huber_infimum_of_groups_with_outliers(delta, scale):
    """Where Newton's steps go wrong: few members inside delta, flat pieces, heavy tails."""
    loss = Huber(delta)
    groups, size = 50, 9
    y = scale * torch.randn(groups * size, 2, dtype=torch.float64) ** 5
    y[::size] *= 1e3
    y[: 4 * size] = y[: 4 * size].sign() * scale  # two places: a flat piece where scale > delta
    group = torch.arange(groups).repeat_interleave(size)
    got = loss.group_infimum(y, group, groups)
    values = y.unflatten(0, (groups, size))
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    for _ in range(200):  # the slope increases
        middle = 0.5 * (low + high)
        left = (middle - values).clamp(-delta, delta).sum(1, keepdim=True) < 0
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    got -= loss.value(high.expand_as(values).flatten(0, 1), y).unflatten(0, (groups, size)).sum(1)
    bound = loss.value(torch.zeros_like(y), y).sum()
    assert float(got.abs().max()) <= 1e-13 * float(bound)


@pytest.mark.parametrize("u", [1e-6, 1e-4, 9e-4, 1.1e-3, 0.1, 0.9])
def test_gap_bound_is_no_lower_than_a_loss_that_meets_it(u):
    """The excess over L* by log1p: a loss less its infimum would lose the digits that matter."""
    near_sure = -math.log1p(-u)  # of label 1 where 1 - u is its probability
    rare = 1e-3
    d = rare * u
    near_rare = -rare * math.log1p(-u) - (1 - rare) * math.log1p(d / (1 - rare))
    one, target = torch.ones((1, 1), dtype=torch.float64), torch.full((1, 1), rare, dtype=torch.float64)
    label = torch.zeros(1, dtype=torch.int64)
    for loss, y, c, norm, excess in (
        (BCEWithLogits(), one, 1, u, near_sure),
        (CrossEntropy(), label, 2, math.sqrt(2) * u, near_sure),
        (BCEWithLogits(), target, 1, d, near_rare),
    ):
        assert excess <= loss.gap_bound(y, c, norm * (1 + 1e-12)) <= 1.001 * excess


def test_tiny_losses_keep_their_digits():
    z = torch.zeros((1, 3), dtype=torch.float64)
    z[0, 1] = 60.0
    value, residual, _ = CrossEntropy().terms(z, torch.tensor([1]))
    exact = 2 * math.exp(-60.0)
    assert math.isclose(float(value), exact, rel_tol=1e-12)
    assert math.isclose(float(residual[0, 1]), -exact, rel_tol=1e-12)


class _Quartic(ConvexLoss):
    name = "quartic"

    def value(self, z, y):
        return ((z - y) ** 4).mean(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=torch.float64)


class _Wave(_Quartic):
    name = "wave"

    def value(self, z, y):
        return torch.sin(z - y).mean(1) + 1


class _TooHigh(_Quartic):
    name = "too high"

    def infimum(self, y):
        return torch.full((len(y),), 1e6, dtype=torch.float64)


def test_a_loss_of_the_users_own():
    z = torch.randn((N, C), dtype=torch.float64)
    y = torch.zeros_like(z)
    loss = _Quartic()
    check_convex(loss, z, y)
    torch.testing.assert_close(loss.residual(z, y), z**3)
    torch.testing.assert_close(loss.curvature_diagonal(z, y), 3 * z**2)
    with pytest.raises(ValueError, match=r"wave.*is not convex"):
        check_convex(_Wave(), z, y)
    with pytest.raises(ValueError, match="below its own infimum"):
        check_convex(_TooHigh(), z, y)
