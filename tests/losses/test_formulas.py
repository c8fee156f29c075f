"""Each bound is what its proof states, no less and hardly more: transcriptions, where each term counts."""

from __future__ import annotations

import math
import sys

import mpmath as mp
import pytest
import torch
from heads_exact import DIGITS, ExactLoss

from gcfast import ConvexLoss
from gcfast.losses import (
    MSE,
    BCEWithLogits,
    CrossEntropy,
    Huber,
    bounds_at,
    gap_above,
    infimum_with_copies,
    mean_above,
    rounding,
)
from gcfast.losses.base import group_sum, log_excess

F64 = torch.float64
U, TINY = mp.mpf(2) ** -53, mp.mpf(2) * mp.mpf(sys.float_info.min)


def _t(*rows):
    return torch.tensor(rows, dtype=F64)


def _tight(found, stated, more=4e-6):
    """No less than what is stated, and no more than what SPARE and TINY add to it."""
    assert math.isfinite(found) and stated <= found <= stated * (1 + mp.mpf(more)) + 5 * TINY, (found, stated)


class _Fixed(ConvexLoss):
    """Gives what it was made with, whatever the outputs."""

    def __init__(self, **given):
        self.given = given

    def value(self, z, y):
        return self.given["value"]

    def infimum(self, y):
        return self.given["infimum"]

    def terms(self, z, y):
        return self.given["value"], self.given["residual"], None

    def rounding(self, z, y, value, residual):
        return self.given["rounding"]

    def excess(self, z, y, error, value, residual):
        return self.given["excess"]

    def smoothness(self, c):
        return self.given["smoothness"]

    def dominance(self, c):
        return self.given["dominance"]


class _Quadratic(ConvexLoss):
    """(1/2) sum_c a_c z_c^2 with rounding by the base class's assumption."""

    a = torch.tensor([0.25, 4.0, 9.0], dtype=F64)

    def value(self, z, y):
        return 0.5 * (self.a.to(z) * z * z).sum(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=F64)


class _Absolute(ConvexLoss):
    """sum_c a_c |z_c|, exact, of which no smoothness is known; its rounding is chosen."""

    a = torch.tensor([1.0, 4.0], dtype=F64)

    def __init__(self, off):
        self.off = off

    def value(self, z, y):
        return (self.a * z.abs()).sum(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=F64)

    def residual(self, z, y):
        return self.a * z.sign()

    def rounding(self, z, y, value, residual):
        return torch.full_like(value, self.off), torch.full_like(residual, 2 * self.off)


def test_the_constants():
    finfo = torch.finfo(F64)
    assert finfo.eps / 2 == rounding.UNIT
    assert 2 * finfo.tiny == rounding.TINY
    assert finfo.tiny * 2.0**62 == rounding.LEAST_MASS  # 2^-60 of it is normal, and a quarter too
    with mp.workdps(DIGITS):  # what 2^32 roundings take away, and not more than twice as many
        assert 2**32 * mp.log1p(U) <= mp.log(rounding.SPARE) <= 2**33 * mp.log1p(U)


def test_sums_and_means_outward():
    """By two floats, or not at all where nothing can have been rounded."""
    up = lambda x: math.nextafter(math.nextafter(x, math.inf), math.inf)  # noqa: E731
    for values, n, mean in (
        ([3.0], None, 3.0),
        ([1.0, 4.0], None, 2.5),
        ([1.0, 4.0], 1, 5.0),
        ([-1.0, -4.0, 0.0], 2, -2.5),
        ([1.0, 1e100, -1e100], 1, 1.0),
    ):
        assert rounding.mean_above(torch.tensor(values, dtype=F64), n) == up(mean)
        assert rounding.mean_below(-torch.tensor(values, dtype=F64), n) == -up(mean)
    for n in (None, 0, 3):
        assert mean_above(torch.zeros(0)) == rounding.mean_below(torch.zeros(2), n) == 0.0
    assert [gap_above(3.0, x) for x in (0.0, 1.0, -1.0)] == [3.0, up(2.0), up(4.0)]
    assert gap_above(1.0, 1.0) == 0.0
    nan, inf = math.nan, math.inf
    assert rounding.nan_is_inf(_t(nan, -inf, 1.0)).tolist() == [inf, -inf, 1.0]
    assert rounding.positive(_t(nan, inf, -inf, -0.5, 0.25, 0.0, 4.0)).tolist() == [0, 0, 0, 0, 0.25, 0, 4]
    for c in (1, 2, 3):  # exact but for the factor, which is a float
        assert rounding.row_means_below(torch.ones(5, c, dtype=F64)).tolist() == [1 - (c + 1) * 2.0**-53] * 5


HUGE = sys.float_info.max
OUTPUTS = {  # z and targets: labels, probabilities, real
    "zero": ([0.0, 0.0, 0.0], 1, [0.25, 0.25, 0.5], [0.0, 0.0, 0.0]),
    "zero, far": ([0.0, 0.0, 0.0], 0, [1.0, 0.0, 0.0], [1e150, -1e-300, 3.0]),
    "some": ([1.0, -2.0, 0.5], 2, [0.5, 0.125, 0.375 + 2.0**-50], [0.5, -2.0, 1e5]),
    "at the top": ([1.0, 3.0, -2.0], 1, [0.0625, 0.875, 0.0625], [0.9, 3.5, -2.0]),
    "tie": ([2.0, 2.0, -1.0], 1, [0.5, 0.5, 0.0], [1.0, 1.0, 1.0]),
    "sure": ([60.0, 0.0, -30.0], 0, [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    "sure and wrong": ([-900.0, 40.0, 0.0], 0, [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]),
    "huge": ([1e200, -1e200, 3.0], 1, [0.0, 0.5, 0.5], [1e200, -1e200, 0.0]),
    "huge, wide": ([HUGE, -HUGE, 0.0], 0, [1.0, 0.0, 0.0], [HUGE, -1e-300, 0.0]),
}


def _cases():
    for name, (z, label, q, real) in OUTPUTS.items():
        for c in (1, 2, 3):
            if c > 1:
                at = label if label < c else 0
                yield f"labels {name}", CrossEntropy(), z[:c], torch.tensor([at])
                yield f"soft {name}", CrossEntropy(), z[:c], _t([*q[: c - 1], sum(q[c - 1 :])])
            yield f"bce {name}", BCEWithLogits(), z[:c], _t(q[:c])
            if "wide" not in name:
                yield f"mse {name}", MSE(), z[:c], _t(real[:c])
            yield f"huber {name}", Huber(0.5), z[:c], _t(real[:c])


def _stated_rounding(loss, z, y, value, residual):
    c = len(z)
    if not isinstance(loss, CrossEntropy):
        if isinstance(loss, BCEWithLogits):
            sigmoid = lambda x: 1 / (1 + mp.exp(-mp.mpf(x)))  # noqa: E731
            parts = [
                ((1 - mp.mpf(q)) * sigmoid(x) + mp.mpf(q) * sigmoid(-x)) / c
                for x, q in zip(z, y, strict=True)
            ]
        else:
            parts = [abs(mp.mpf(r)) for r in residual]
        return (c + 24) * U * abs(mp.mpf(value)), [16 * U * part for part in parts]
    k = max(range(c), key=lambda j: z[j])
    a = [abs(mp.mpf(x) - mp.mpf(z[k])) for x in z]
    p = [mp.exp(-x) / mp.fsum(mp.exp(-x) for x in a) for x in a]
    others = [j for j in range(c) if j != k]
    spread, missing = mp.fsum(p[j] * a[j] for j in others), mp.fsum(p[j] for j in others)
    tops = [j for j in range(c) if math.exp(z[j] - z[k]) == 1.0]
    of = [
        ((2 * c + 32) * missing + spread if j == k else p[j] * (2 * c + 32 + a[j] + spread))
        + 2 * abs(residual[j])
        for j in range(c)
    ]
    total = mp.mpf(1)
    if isinstance(y, int):  # the exact 1 of the label is added at a maximum that is not the label's
        of = [x + (j in tops and k != y) for j, x in enumerate(of)]
    else:  # each probability is known to (C + 4) u, and the gradient is Q p - q, Q within (C + 4) u of 1
        total = mp.fsum(y)
        off = abs(total - 1) / U + 2 * c + 8
        of = [
            x + off * ((1 if j == k else p[j]) + y[j]) + (j in tops) * (1 - mp.mpf(y[k]))
            for j, x in enumerate(of)
        ]
    return ((3 * c + 48) * abs(mp.mpf(value)) + 2 * total * spread) * U, [x * U for x in of]


def test_rounding_is_what_is_stated():
    with mp.workdps(50):
        for name, loss, z, y in _cases():
            at = _t(z)
            value, residual, _ = loss.terms(at, y)
            found = loss.rounding(at, y, value, residual)
            targets = y.tolist()[0]
            stated = _stated_rounding(loss, z, targets, float(value), residual[0].tolist())
            try:
                _tight(float(found[0]), stated[0])
                for one, like in zip(found[1][0].tolist(), stated[1], strict=True):
                    _tight(one, like)
            except AssertionError as error:
                raise AssertionError(name, loss, z, y) from error


def test_rounding_of_a_users_loss_is_the_base_classes_assumption():
    z = _t([1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [1e-3, 3.0, 1e8], [1e-170, 1e-170, 0.0])
    loss = _Quadratic()
    for dtype, unit in ((F64, 2.0**-53), (torch.float32, 2.0**-24)):
        value, residual, conjugate = loss.terms(z.to(dtype), z)
        assert conjugate.tolist() == ((residual * z.to(dtype)).sum(1) - value).tolist()
        found = loss.rounding(z.to(dtype), z, value, residual)
        root = [math.sqrt(a) for a in loss.a.tolist()]
        for i, row in enumerate(z.to(dtype).tolist()):
            slope = [a * x for a, x in zip(loss.a.tolist(), row, strict=True)]
            size = sum(abs(r * x) for r, x in zip(slope, row, strict=True))
            moved = sum(r * abs(x) for r, x in zip(root, row, strict=True))
            _tight(float(found[0][i]) * (1 + 1e-7), 64 * unit * 1.5 * size, 6e-6)
            for k in range(3):
                stated = 64 * unit * (abs(slope[k]) + root[k] * moved)
                _tight(float(found[1][i, k]) * (1 + 1e-7), stated, 6e-6)
    # a curvature that rounding has made negative is none
    loss.curvature_diagonal = lambda z, y: torch.full_like(z, -1.0)
    value, residual, _ = loss.terms(z, z)
    _tight(float(loss.rounding(z, z, value, residual)[1][0, 0]), 64 * U / 4)


ERRORS = {
    "none": [0.0, 0.0, 0.0],
    "tiny": [1e-170, 0.0, 0.0],
    "small": [0.25, 0.5, 0.125],
    "large": [3.0, 64.0, 20.0],
}
ERRORS["first"] = [8.0, 0.0, 0.0]


@pytest.mark.parametrize("e", ERRORS.values(), ids=ERRORS)
def test_excess_is_what_is_stated(e):
    mean = lambda terms: mp.fsum(terms) / len(terms)  # noqa: E731
    for c in (1, 2, 3):
        errors = [mp.mpf(x) for x in e[:c]]
        z, label, most = torch.zeros(2, c, dtype=F64), torch.zeros(2, dtype=torch.int64), max(errors)
        soft = torch.full((2, c), 1 / c, dtype=F64)
        for loss, y, stated in (
            (CrossEntropy(), label, min(most**2 / 2, 2 * most)),
            (CrossEntropy(), soft, min(most**2 / 2, 2 * most) * mp.fsum(soft[0].tolist())),
            (MSE(), z, mean([x * x for x in errors])),
            (BCEWithLogits(), z, mean([min(x * x / 8, x) for x in errors])),
            (Huber(0.25), z, mean([min(x * x / 2, x / 2) for x in errors])),
            (_Fixed(smoothness=3.0), z, 1.5 * mp.fsum(x * x for x in errors)),
        ):
            if isinstance(loss, _Fixed):
                found = ConvexLoss.excess(loss, z, y, _t(e[:c], e[:c]), z[:, 0], z) * rounding.SPARE
            else:
                found = bounds_at(loss, z, y, _t(e[:c], e[:c])).excess
            for one in found.tolist():
                _tight(one, stated)
    if not any(e):
        assert bounds_at(CrossEntropy(), z, label, torch.zeros_like(z)).excess.tolist() == [0.0, 0.0]


@mp.workdps(50)
def test_excess_without_smoothness_is_by_the_values_around():
    for z, e, off in (
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.5, 0.0], [0.0, 0.0], 0.0),  # what it takes to be sure of a float beyond
        ([0.0, 1.5], [0.0, 0.0], 0.0),
        ([3.0, -1.0], [0.5, 0.25], 0.0),
        ([-1.0, 3.0], [0.5, 0.25], 0.0),
        ([3.0, 1.0], [0.5, 0.0], 0.0),
        ([3.0, 1.0], [0.0, 0.5], 1e-3),
        ([0.0, 0.0], [0.5, 0.25], 1e-3),
        ([0.0, 0.0], [0.5, 0.25], 0.0),
        ([1.5, 0.0], [12 * 2.0**-53, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 1e-3),
    ):
        loss, still = _Absolute(off), [0.0, 0.0]
        at = _t(z, still, still)
        value, residual, _ = loss.terms(at, at)
        found = loss.excess(at, at, _t(e, still, still), value, residual)
        a = [mp.mpf(x) for x in loss.a.tolist()]
        for one, x, d in zip(found.tolist(), (z, still, still), (e, still, still), strict=True):
            here = mp.fdot(a, [abs(v) for v in x])
            far = [2 * mp.mpf(d[k]) + 4 * U * abs(x[k]) for k in range(2)]
            ahead = [here + a[k] * (abs(x[k] + s * far[k]) - abs(x[k])) for k in range(2) for s in (-1, 1)]
            highest = max(ahead) + off
            along = mp.fsum((a[k] * (x[k] != 0) + 2 * off) * mp.mpf(d[k]) for k in range(2))
            _tight(one, highest - here + off + along + 4 * U * (highest + here), 3e-5)


def test_excess_sees_a_kink_just_before_the_farthest_output():
    class Hinge(_Absolute):
        def value(self, z, y):
            return (z.abs().sum(1) - (1 - 1e-7)).clamp(min=0)

    z = torch.zeros((1, 2), dtype=F64)
    found = Hinge(0.0).excess(z, z, _t([0.5, 0.25]), z[:, 0], z)
    assert 1e-7 <= float(found) <= 2e-6


def test_bounds_add_up():
    """Each term of the sum is the largest once."""
    for value, residual, of_value, of_residual, excess, error in (
        (0.0, [0.0, 0.0], 0.0, [0.0, 0.0], 0.0, [0.0, 0.0]),
        (1.5, [0.0, 0.0], 0.0, [0.0, 0.0], 0.0, [0.0, 0.0]),
        (-1.5, [0.0, 0.0], 0.0, [0.0, 0.0], 0.0, [0.0, 0.0]),
        (0.0, [0.0, 0.0], 3.0, [0.0, 0.0], 0.0, [0.0, 0.0]),
        (0.0, [0.0, 0.0], 0.0, [0.0, 0.0], 3.0, [0.0, 0.0]),
        (0.0, [-3.0, 5.0], 0.0, [0.0, 0.0], 0.0, [0.5, 0.25]),
        (0.0, [0.0, 0.0], 0.0, [3.0, 5.0], 0.0, [0.5, 0.25]),
        (2.0, [-3.0, 5.0], 0.5, [3.0, 5.0], 0.25, [0.5, 0.25]),
    ):
        given = {"value": _t(value)[:, None].expand(1, 2)[:, 0].repeat(2), "residual": _t(residual, residual)}
        given |= {
            "rounding": (_t(of_value).repeat(2), _t(of_residual, of_residual)),
            "excess": _t(excess).repeat(2),
        }
        at = bounds_at(_Fixed(**given), _t([0.0, 0.0], [0.0, 0.0]), _t(0.0), _t(error, error))
        along = mp.fsum((abs(r) + o) * e for r, o, e in zip(residual, of_residual, error, strict=True))
        stated = mp.mpf(of_value) + along + mp.mpf(excess) + 4 * U * abs(value)
        for found in at.value.tolist():
            _tight(found - value, stated, 3e-5)
        for found in at.excess.tolist():
            _tight(found, mp.mpf(excess))


def _k(u):
    """(-log(1 - u) - u) / u^2, and 1/2 + u/2 where u is below 1/1000."""
    u = mp.mpf(u)
    return mp.inf if u >= 1 else (-mp.log1p(-u) - u) / u**2 if u >= 1e-3 else (1 + u) / 2


def _stated_gap(loss, y, c, norm):
    n, norm = len(y), mp.mpf(norm)
    if isinstance(loss, MSE):
        return norm**2 * c / 4 / n
    if isinstance(loss, Huber):
        return c * norm**2 / 2 / n if c * norm < loss.delta else mp.inf
    if isinstance(loss, BCEWithLogits):
        flat = [mp.mpf(x) for x in y.flatten().tolist()]
        hard = [x in (0, 1) for x in flat]
        least = min(mp.mpf(1) if h else min(x, 1 - x) for x, h in zip(flat, hard, strict=True))
        weight = max(mp.mpf(1) if h else 1 / (x * (1 - x)) for x, h in zip(flat, hard, strict=True))
        return (mp.sqrt(sum(hard)) * c * norm + _k(c * norm / least) * weight * (c * norm) ** 2) / (n * c)
    rows = [[mp.mpf(k == x) for k in range(c)] for x in y.tolist()] if y.dim() == 1 else y.tolist()
    share = mp.mpf(c - 1) / c
    support = [[mp.mpf(x) for x in row if x] for row in rows]
    weight = max((share if len(row) == 1 else 1) / min(row) for row in support)
    outside = mp.sqrt(mp.fsum(mp.mpf(c - len(row)) * len(row) / c for row in support)) * norm
    u = mp.sqrt(share) * norm / min(min(row) for row in support)
    return (outside + _k(u) * weight * norm**2) / n


def test_gap_bounds_are_what_is_stated():
    cases = [(CrossEntropy(), torch.arange(n) % c, c) for n, c in ((1, 2), (3, 2), (5, 4))]
    cases += [
        (CrossEntropy(), y, y.shape[1])
        for y in (
            _t([0.5, 0.5]),
            _t([0.25, 0.75], [0.5, 0.5]),
            _t([1.0, 0.0, 0.0]),
            _t([1.0, 0.0, 0.0], [0.25, 0.5, 0.25]),
            _t([0.0, 0.125, 0.875], [0.25, 0.5, 0.25]),
            _t([0.0, 0.125, 0.875, 0.0], [0.0, 1.0, 0.0, 0.0]),
        )
    ]
    bce = [
        _t([1.0]),
        _t([0.0]),
        _t([0.25]),
        _t([0.5, 0.75]),
        _t([1.0, 0.0], [0.0, 0.125]),
        _t([0.0, 0.0], [1.0, 1.0]),
    ]
    cases += [(BCEWithLogits(), y, y.shape[1]) for y in bce]
    cases += [
        (loss, y, y.shape[1]) for loss in (MSE(), Huber(0.5)) for y in (_t([0.0]), _t([0, 1, 0], [5, 3, 1]))
    ]
    with mp.workdps(30):
        for loss, y, c in cases:
            for norm in (
                0.0,
                1e-170,
                1e-9,
                1e-5,
                7e-5,
                1.5e-4,
                1e-3,
                0.03,
                0.1,
                0.3,
                0.49,
                0.7,
                0.99,
                1.2,
                30.0,
            ):
                found, stated = loss.gap_bound(y, c, norm), _stated_gap(loss, y, c, norm)
                above = _stated_gap(loss, y, c, norm * (1 + 2e-6))  # k grows fast next to 1
                assert stated <= found <= above * (1 + mp.mpf(4e-6)) + 3 * TINY, (loss, y, norm)
        for norm in (
            0.1,
            0.3,
            0.7,
            1.1,
            1e100,
        ):  # kappa = 4/3, norm^2, the divisor and the quotient are rounded
            least = mp.mpf(norm) ** 2 * 3 / 4 / 5
            assert least <= MSE().gap_bound(_t(*[[0.0] * 3] * 5), 3, norm) <= least * (1 + 12 * U)
            assert _Fixed(dominance=0.5).gap_bound(_t(0.0), 1, norm) == 2 * norm * norm * (1 + 6 * 2.0**-53)
    assert _Fixed(dominance=0.0).gap_bound(_t(0.0), 1, 2.0) == math.inf
    for loss, y in ((MSE(), _t([0.0])), (BCEWithLogits(), _t([5e-324])), (CrossEntropy(), _t([5e-324, 1.0]))):
        assert loss.gap_bound(y, y.shape[1], 1e300) == math.inf
    assert BCEWithLogits().gap_bound(_t([5e-324]), 1, 0.0) == math.inf  # 0 inf is no bound
    # all |t| are below delta, or nothing is known; with what the norm may have been rounded by
    delta = 0.75 * rounding.SPARE
    assert Huber(delta).gap_bound(_t([0.0]), 1, 0.75) == math.inf
    _tight(Huber(math.nextafter(delta, 1)).gap_bound(_t([0.0]), 1, 0.75), mp.mpf(0.75) ** 2 / 2)


def test_log_excess_is_no_less_than_all_below_it():
    with mp.workdps(50):
        for u in (1e-300, 1e-20, 1e-9, 1e-4, 4.9e-4, 7e-4, 9.9e-4):
            assert log_excess(u) == 0.5 + 0.5 * u
            assert log_excess(u) * rounding.SPARE >= (-mp.log1p(-mp.mpf(u)) - u) / mp.mpf(u) ** 2
        for u in (1e-3, 1.5e-3, 0.01, 0.3, 0.5, 0.9, 0.999, 1 - 2.0**-53):
            exact = (-mp.log1p(-mp.mpf(u)) - u) / mp.mpf(u) ** 2
            assert abs(log_excess(u) / exact - 1) <= 1e-12
    assert log_excess(0.0) == 0.5 and log_excess(1.0) == log_excess(1.5) == math.inf


def _near(found, stated, units=1.2):
    """Right to a rounding or two of the last place."""
    assert abs(mp.mpf(found) - stated) <= units * U * abs(stated), (found, mp.nstr(stated, 20))


def test_infima_are_lowered_by_what_is_stated():
    """With masses that are equal: the entropies are logarithms of whole numbers."""
    half, two = _t([0.5, 0.5]), mp.log(2)
    pair = torch.zeros(2, dtype=torch.int64)
    with mp.workdps(50):
        for known in (0.0, 2.0**-40, 0.01):
            e = lambda terms: 1 - 4 * (mp.mpf(known) + terms * U)  # noqa: B023, E731
            _near(float(rounding.entropy_below(half, known)[0]), two * e(10))
            _near(
                float(rounding.entropy_below(2.0**-960 * _t([1.0, 1.0]), known)[0]),
                2 * two * e(10) * mp.mpf(2) ** -960,
            )
            assert rounding.entropy_below(_t([1.0]), known).tolist() == [0.0]
        for mass in (
            _t([0.3, 0.9, 0.0]),
            _t([1.0, 1e-20, 1e-3]),
            _t([0.4, 0.3, 0.3]),
            torch.ones(1, 40, dtype=F64),
        ):
            for scale in (2.0**-940, 1.0, 1e9):
                found = float(rounding.entropy_below(scale * mass, 0.125)[0])
                parts = [mp.mpf(x) for x in (scale * mass)[0].tolist() if x]
                exact = mp.fsum(-x * mp.log(x / mp.fsum(parts)) for x in parts)
                _near(found, exact * (mp.mpf(0.5) - 4 * (mass.shape[1] + 8) * U), 40)
        stacked = rounding.entropy_below(torch.stack([half, 4 * half, half]).mT.expand(3, 2, 5).mT, 0.0)
        assert stacked.shape == (3, 5)
        for one in stacked[:2].mT.tolist():
            _near(one[0], two * (1 - 40 * U))
            _near(one[1], 4 * two * (1 - 40 * U))
        nan, inf, least = math.nan, math.inf, 2.0**-960
        for row in (
            [0.0, 0.0],
            [nan, 1.0],
            [inf, 1.0],
            [1.0, math.nextafter(least, 0)],
            [1.0, 0.0],
            [5e-324, 2.0],
        ):
            assert rounding.entropy_below(_t(row), 0.0).tolist() == [0.0]
        _near(float(rounding.entropy_below(_t([1.0, least]), 0.0)[0]), least * (1 + 960 * two), 60)

        _near(float(CrossEntropy().infimum(half)[0]), two * (1 - 4 * (6 + 10) * U))
        _near(float(BCEWithLogits().infimum(half)[0]), two * (1 - 4 * (1 + 10) * U) * (1 - 3 * U), 2)
        _near(
            float(CrossEntropy().group_infimum(half.repeat(2, 1), pair, 1)[0]),
            2 * two * (1 - 4 * (8 + 10) * U),
        )
        bce = BCEWithLogits().group_infimum(half.repeat(2, 1), pair, 1)
        _near(float(bce[0]), 2 * two * (1 - 4 * (6 + 10) * U) * (1 - 3 * U), 2)


def test_infima_of_groups_are_lowered_by_what_is_stated():
    """In plain float64, where sums of two numbers have one order."""
    u, tiny = rounding.UNIT, rounding.TINY
    tinier = 2.0**-511
    for t in ([1.0, -1.0], [0.3, 0.7], [1.0, 1 + 2.0**-52], [2 * tinier, -2 * tinier], [tinier, 0.0], [5.0]):
        members, terms = len(t), (len(t) + 8) * u
        mean = sum(t) / members
        d = [x - mean for x in t]
        off = abs(sum(d)) + terms * sum(map(abs, d))
        least = sum(x * x for x in d) * (1 - 2 * terms) - off * off / members * (1 + 2 * terms)
        stated = max(least - tiny, 0.0) * (1 - 2 * u)
        y, group = torch.tensor([*t, *t], dtype=F64)[:, None], torch.arange(2).repeat_interleave(members)
        assert MSE().group_infimum(y, group, 2).tolist() == [stated, stated]
    for labels in ([0, 1], [5, 5, 0], [3, 0, 3, 3, 1], [2, 2, 2], [0, 4, 4, 4, 4, 9], [1, 2, 3, 4, 5, 6]):
        times = torch.tensor(labels).bincount()[sorted(set(labels))].double()
        total = 0.0
        for x in (times * torch.log1p((len(labels) - times) / times)).tolist():
            total += x
        y = torch.tensor([*labels, 1, *labels])  # a group in between, of a single sample
        group = torch.tensor([0] * len(labels) + [1] + [2] * len(labels))
        stated = total * (1 - (max(labels) + 9) * u)
        assert CrossEntropy().group_infimum(y, group, 3).tolist() == [stated, 0.0, stated]


def test_infimum_of_groups_where_huber_is_a_parabola():
    """Of y and -y, 2 (y^2/2): q is 0, and what the tangent takes away is of second order."""
    u = rounding.UNIT
    y, group = _t([0.5, 1.0], [-0.5, -1.0], [3.0, 3.0]), torch.tensor([1, 1, 0])
    stated = [(part * (1 - 26 * u) + 4 * part * (1 - 26 * u)) / 2 * (1 - 3 * u) for part in (0.25,)]
    assert Huber(2.0).group_infimum(y, group, 2).tolist() == [0.0, *stated]


@pytest.mark.parametrize(
    ("t", "delta", "q", "reach"),
    [
        ([-5.0, -2.0, 1.0, 2.0], 2.0**-30, -1.0, 4.0),  # no member is near the mean
        ([16.0, 0.0, -10.0, -10.0], 1.0, -1.0, 9.0),  # one is delta away: the slope is certain on one side
    ],
)
@mp.workdps(50)
def test_infimum_of_groups_where_huber_is_flat(t, delta, q, reach):
    """What rounding hides of a slope of 0 counts along the whole flat piece, on which the minimum may lie."""
    y, group = torch.tensor(t, dtype=F64)[:, None], torch.zeros(4, dtype=torch.int64)
    terms, delta_ = 28 * U, mp.mpf(delta)
    sizes = [min(abs(q - x), delta_) * (abs(q - x) - min(abs(q - x), delta_) / 2) for x in t]
    stated = (mp.fsum(sizes) * (1 - terms) - terms * 4 * delta_ * reach) * (1 - 2 * U)
    _near(float(Huber(delta).group_infimum(y, group, 1)[0]), stated)


def test_newton_finds_the_infimum_of_a_group_in_few_steps(monkeypatch):
    """From the mean, 23/8, it leaves the bracket; from the middle, 23/16, it goes to 7/6, the minimum."""
    calls = []
    monkeypatch.setattr("gcfast.losses.elementwise.group_sum", lambda *a: calls.append(1) or group_sum(*a))
    y, group = _t([0.0], [0.5], [1.0], [10.0]), torch.zeros(4, dtype=torch.int64)
    Huber(2.0).group_infimum(y, group, 1)
    assert len(calls) == 3 * (3 + 1 + 2) + 1  # the last one for the values


@mp.workdps(50)
def test_infimum_of_groups_where_huber_has_its_minimum_between_two_floats():
    """The bound is the tangent at one of them, and the zero of the slope no farther away than the next."""
    loss, exact = Huber(64.0), ExactLoss("huber", delta=64.0)
    big = 2.0**50
    t = [0.0, 40.0, -41.0, 0.75, 3.0, 90.0, -100.0]
    y = torch.tensor(t, dtype=F64)[:, None] + big
    found = float(loss.group_infimum(y, torch.zeros(len(t), dtype=torch.int64), 1)[0])
    values = [mp.mpf(x) for x in y[:, 0].tolist()]
    true = exact.infimum([[x] for x in values])
    stated = []
    for k in range(-8, 9):
        q, step = big + mp.mpf(k) / 4, 0.25
        slope = mp.fsum(max(-64, min(64, q - x)) for x in values)
        stated.append(mp.fsum(exact.value([q], [x]) for x in values) - abs(slope) * step * rounding.SPARE**2)
    assert min(abs(found - x) for x in stated) <= 1e-14 * found < found <= true


EXACT = {  # of t = z - y, dyadic: value, slope and curvature of one output
    "mse": (MSE(), lambda t: (t * t, 2 * t, 2.0)),
    "huber": (
        Huber(0.5),
        lambda t: (
            (t * t / 2, t, 1.0) if abs(t) <= 0.5 else (0.5 * (abs(t) - 0.25), math.copysign(0.5, t), 0.0)
        ),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_values_and_derivatives_are_exact_where_floats_are(name):
    loss, one = EXACT[name]
    for c in (1, 2, 4):
        z = torch.tensor([[0.0, 0.25, -0.25, 8.0], [-0.5, 0.5, 0.75, -3.0]], dtype=F64)[:, :c]
        y = torch.tensor([[0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.25, 1.0]], dtype=F64)[:, :c]
        value, residual, conjugate = loss.terms(z, y)
        for i in range(2):
            parts = [one(float(t)) for t in z[i] - y[i]]
            assert float(value[i]) == sum(p[0] for p in parts) / c == float(loss.value(z, y)[i])
            assert residual[i].tolist() == [p[1] / c for p in parts] == loss.residual(z, y)[i].tolist()
            assert float(conjugate[i]) == float((residual[i] * z[i]).sum() - value[i])
            for found in (loss.curvature_diagonal(z, y), loss.curvature_product(z, y, torch.ones_like(z))):
                assert found[i].tolist() == [p[2] / c for p in parts]
            assert loss.curvature_product(z, y, 4 * z)[i].tolist() == [
                4 * float(x) * p[2] / c for x, p in zip(z[i], parts, strict=True)
            ]
        assert loss.infimum(y).tolist() == [0.0, 0.0]


def test_derivatives_of_a_users_loss_are_those_of_its_value():
    loss, z = _Quadratic(), _t([1.0, -2.0, 0.5], [0.0, 4.0, 8.0])
    assert loss.residual(z, z).tolist() == (loss.a * z).tolist()
    assert loss.curvature_product(z, z, 4 * z).tolist() == (loss.a * 4 * z).tolist()
    assert loss.curvature_diagonal(z, z).tolist() == [loss.a.tolist()] * 2


def test_what_is_said_of_all_outputs():
    for c in (1, 2, 5):
        assert [loss.smoothness(c) for loss in (MSE(), BCEWithLogits(), Huber(2.0))] == [
            2 / c,
            0.25 / c,
            1 / c,
        ]
        assert CrossEntropy().smoothness(c) == (0.5 if c > 1 else 0.0)
        assert MSE().dominance(c) == 4 / c
        assert [loss.dominance(c) for loss in (CrossEntropy(), BCEWithLogits(), Huber(2.0))] == [0.0] * 3
    inside, edge, ones = _t([0.5, 0.25, 0.25]), _t([0.5, 0.0, 0.5]), _t([0.5, 1.0, 0.5])
    assert [BCEWithLogits().attained(y) for y in (inside, edge, ones)] == [True, False, False]
    assert [CrossEntropy().attained(y) for y in (inside, edge, torch.tensor([0]))] == [True, False, False]
    assert MSE().attained(edge) and Huber().attained(edge) and not ConvexLoss.attained(MSE(), edge)


def test_reachable_outputs_have_the_loss_that_was_asked():
    """Moved as little as that takes; what is there already stays."""
    z, hard = _t([3.0, -1.0, 0.5], [0.0, 0.0, 0.0], [50.0, 0.0, 0.0]), torch.tensor([1, 2, 0])
    for eps in (1e-3, 0.5):
        loss = CrossEntropy()
        near = loss.reachable(z, hard, eps)
        assert near[2].tolist() == z[2].tolist() and near[0, 0] == 3.0 and near[1, 0] == 0.0
        torch.testing.assert_close(
            loss.value(near, hard)[:2], torch.full((2,), eps, dtype=F64), rtol=1e-12, atol=0
        )
        loss, y = BCEWithLogits(), _t([1.0, 0.0, 0.25], [1.0, 0.0, 0.75], [1.0, 0.0, 0.5])
        near = loss.reachable(z, y, eps)
        assert near[2].tolist() == [50.0, near[1, 1], 0.0] and near[0, 0] == max(3.0, -float(near[1, 1]))
        assert float(loss.value(near[1:2, :1], y[1:2, :1])) == pytest.approx(eps, rel=1e-12)
        assert float(loss.value(near[1:2, 1:2], y[1:2, 1:2])) == pytest.approx(eps, rel=1e-12)
    soft = _t([0.25, 0.5, 0.25], [0.125, 0.125, 0.75], [0.5, 0.25, 0.25])
    near = CrossEntropy().reachable(z, soft, 1e-3)
    torch.testing.assert_close(torch.softmax(near, 1), soft, rtol=1e-13, atol=0)
    torch.testing.assert_close(near.mean(1), z.mean(1), rtol=1e-13, atol=1e-13)


def test_infima_are_of_the_samples_asked():
    y = torch.arange(4.0)
    for found in (1.0, torch.zeros(3), torch.zeros(4, 1), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"infimum must give one number a sample, \(4,\)"):
            infimum_with_copies(_Fixed(infimum=found), y, [])

    class Assumed(_Fixed):
        rounding = ConvexLoss.rounding

    # the base class assumes 64 u, and the mean is rounded outward by two floats
    for value in (1.0, -1.0, 3.0):
        lowered = value - 64 * 2.0**-53 * abs(value)
        stated = -math.nextafter(math.nextafter(-lowered, math.inf), math.inf)
        assert infimum_with_copies(Assumed(infimum=torch.full((4,), value)), y, []) == stated
    # [0, 2] share an output: the sum of their infima is then a bound, too
    given = _t(1.0, 2.0, 4.0, 8.0)
    loss = _Fixed(infimum=given)
    loss.group_infimum = lambda y, group, groups: _t(*([100.0] * groups))
    for copies, total in (([], 15.0), ([[0, 2]], 110.0), ([[0, 2], [3, 1]], 200.0), ([[1, 2, 3]], 101.0)):
        assert infimum_with_copies(loss, y, copies) == pytest.approx(total / 4, rel=1e-15)
    bare = ConvexLoss.group_infimum(_Fixed(infimum=given), y, torch.tensor([1, 0, 1, 0]), 2)
    assert bare.tolist() == [10.0, 5.0]


def test_masses_too_small_to_share():
    """Their share of a sum is no float, and its logarithm was -inf."""
    tiny = 5e-324
    for loss, y in ((CrossEntropy(), _t([tiny, 1.0], [0.0, 1.0])), (BCEWithLogits(), _t([tiny], [0.0]))):
        found = infimum_with_copies(loss, loss.prepare(y, 2, y.shape[1]), [[0, 1]])
        assert found == 0.0
