"""Where a loss of a user's is looked at, and by how much it may be off: each border from both sides."""

from __future__ import annotations

import math

import pytest
import torch

from gcfast import ConvexLoss
from gcfast.losses import check_convex
from gcfast.losses.convexity import _Rows

F64 = torch.float64
N, C, FIRST = 5, 2, 7
Z = torch.tensor([[0.5, -0.25], [3.0, 30.0], [-2.0, 0.0], [1e4, 1.0], [0.0, 0.125]], dtype=F64)
UNIT = torch.tensor([1.0, 3.0, 0.0, 2.0, 5.0], dtype=F64)
ROWS, ZERO = torch.zeros(N, C, dtype=F64), torch.zeros(N, dtype=F64)


class _Script(ConvexLoss):
    """Gives values one after the other, whatever the outputs, which it keeps; its methods are given."""

    def __init__(self, *values, **methods):
        self.values, self.seen = list(values), []
        for name, method in methods.items():
            setattr(self, name, method)

    def value(self, z, y):
        self.seen.append(z.detach().clone())
        return self.values.pop(0).clone()

    def infimum(self, y):
        return ZERO


def _flat(z, y):
    return torch.zeros_like(z)


def _rows(loss, unit=UNIT):
    rows = _Rows(loss, Z, ROWS, FIRST)
    rows.unit, rows.slope = unit, 0.0
    return rows


def _border(call, at=None):
    """``call`` with an excess of f times what is let pass; one sample, or each of them, is off."""
    for i in range(N) if at is None else [at]:
        off = ZERO.clone()
        for f in (0.999, 1.001):
            off[i] = f
            if f < 1:
                call(off)
            else:
                with pytest.raises(ValueError, match=rf"at sample {FIRST + i}\)"):
                    call(off)


class _Bowl(ConvexLoss):
    """1 + |z - y|^2 / 2, said to be no less than 1/4."""

    def __init__(self):
        self.seen = []

    def value(self, z, y):
        self.seen.append(z.detach().clone())
        return 1 + 0.5 * (z - y).square().sum(1)

    def infimum(self, y):
        return torch.full((len(y),), 0.25, dtype=F64)


def _looked_at(z, y, rows):
    """The outputs at which the value is taken."""
    n = len(z)
    yield z
    if n > 1:
        yield z.flip(0)[::2][: n // 2]
    directions = torch.randn((4, rows, z.shape[1]), generator=torch.Generator().manual_seed(0), dtype=F64)
    for start in range(0, n, rows):
        at, goal = z[start : start + rows], y[start : start + rows]
        way = 10 * at.abs().amax(1, keepdim=True).clamp(min=1) * torch.tensor([1.0, -1.0, 1.0])[: z.shape[1]]
        yield from (at, at + way, at - way, at)
        for scale, direction in zip((0.1, 1.0, 10.0, 1e4), directions, strict=True):
            end = at + scale * direction[: len(at)]
            yield from (end, (at + end) / 2)
        for _ in range(5):
            t = at - goal
            square = t.square().sum(1, keepdim=True)
            at = at - 1.9 * (0.75 + square / 2) / square * t
            yield at


@pytest.mark.parametrize(
    ("n", "c", "block"), [(1, 1, 9), (1, 3, 9), (2, 2, 9), (5, 3, 9), (4, 3, 2), (5, 3, 6)]
)
def test_where_a_loss_is_looked_at(n, c, block, monkeypatch):
    monkeypatch.setattr("gcfast.losses.convexity.BLOCK", block)
    loss, g = _Bowl(), torch.Generator().manual_seed(1)
    z, y = (3 * torch.randn((n, c), generator=g, dtype=F64) for _ in range(2))
    check_convex(loss, z, y)
    expected = list(_looked_at(z, y, min(n, max(1, block // c))))
    assert [a.shape for a in loss.seen] == [a.shape for a in expected]
    for found, like in zip(loss.seen, expected, strict=True):
        torch.testing.assert_close(found, like, rtol=1e-12, atol=1e-12)
    loss.seen.clear()
    check_convex(loss, z, y, seen=z + 2)
    chords = [a for a in loss.seen if float((a - z[: len(a)]).mean()) == pytest.approx(1)]
    assert len(chords) == (1 if block // c >= n else 0) or block < n * c


def test_outputs_are_looked_at_in_blocks_of_two_mebibytes():
    loss = _Bowl()
    z = torch.ones((65, 4096), dtype=F64)
    check_convex(loss, z, torch.zeros_like(z), seen=z)
    assert [len(a) for a in loss.seen][2::6] == [64, 1]


def test_size_and_slope_of_a_loss():
    """By three values a sample, of which some may overflow: 1 at most, and more where outputs are large."""
    nan, inf = math.nan, math.inf
    size = torch.tensor([1.0, 30.0, 2.0, 1e4, 1.0], dtype=F64)
    for here, ahead, back, most, slope in (
        ([0.0, 0.5, 0.0, 0.0, 0.0], [0.0] * 5, [0.0] * 5, 0.5, 0.5 / 30),
        ([0.0] * 5, [0.25, -0.75, nan, inf, 0.0], [0.0, 0.5, 0.125, 0.0, 0.0], 0.75, 0.25),
        ([0.0] * 5, [0.0] * 5, [0.0, 0.0, -3.0, 0.0, -inf], 1.0, 1.5),
        ([0.0] * 5, [0.0] * 5, [0.0] * 5, 0.0, 0.0),
        ([0.0] * 5, [nan, inf, nan, inf, inf], [0.0] * 5, 0.0, 0.0),
    ):
        values = [torch.tensor(v, dtype=F64) for v in (here, ahead, back, here)]
        rows = _Rows(_Script(*values, residual=_flat, infimum=lambda y: ZERO - 9), Z, ROWS, FIRST)
        rows._begin()
        torch.testing.assert_close(rows.unit, most * (1 + 1e-4 * size), rtol=1e-12, atol=0)
        assert rows.slope == pytest.approx(slope, rel=1e-12)


def test_what_counts_as_rounding():
    a, b = 3 * torch.ones(N, dtype=F64), torch.tensor([5.0, -5.0, 0.0, 1.0, 2.0], dtype=F64)
    rows = _rows(_Script())
    torch.testing.assert_close(rows._slack(a, -b), 1e-9 * (3 + b.abs() + UNIT), rtol=1e-12, atol=0)
    torch.testing.assert_close(rows._slack(-a), 1e-9 * (3 + UNIT), rtol=1e-12, atol=0)
    one = torch.tensor([[0.0, 3.0]] * N, dtype=F64)
    for unit in (1e3, 0.0):
        rows = _rows(_Script(), torch.full((N,), unit, dtype=F64))
        for f in (0.999, 1.001):
            two = one + torch.tensor([0.0, f * (6e-6 + 1e-9 * unit)], dtype=F64)
            for a, b in ((one, two), (two, one), (-one, -two), (one[:, 1], two[:, 1])):
                assert rows._differ(a, b).tolist() == [f > 1] * N
        assert rows._differ(one, -one).all() and not rows._differ(one, one).any()


def test_borders_of_values():
    infimum = torch.tensor([2.0, 0.0, -3.0, 1.0, 0.5], dtype=F64)
    rows = _rows(_Script())
    slack = lambda *values: 1e-9 * (sum(v.abs() for v in values) + UNIT)  # noqa: E731
    _border(lambda off: rows._above(infimum, infimum - off * slack(infimum, infimum)), 0)
    _border(lambda off: rows._above(infimum, infimum - off * slack(infimum, infimum)), 3)

    def middle(off):
        """A chord from Z to an end of the same value."""
        value = infimum + 4
        mean, end = value + off * slack(value, value), Z + 1
        script = _Script(value, mean, residual=_flat)
        _rows(script)._chord((Z, value, ROWS, value), end, ZERO - 9, True)
        assert [x.tolist() for x in script.seen] == [end.tolist(), (Z + 0.5).tolist()]

    _border(middle)

    def conjugate(off):
        slope = torch.tensor([[0.5, -2.0]] * N, dtype=F64)
        own = infimum + 1
        size = own.abs() + (slope * Z).abs().sum(1)
        wrong = (slope * Z).sum(1) - own - off * 1e-9 * (size + UNIT)
        script = _Script(own, own, own, residual=lambda z, y: slope, terms=lambda z, y: (own, slope, wrong))
        value, residual, found = _rows(script).terms(Z)
        assert torch.equal(value, own) and torch.equal(residual, slope) and torch.equal(found, wrong)

    _border(conjugate)
    value, residual, found = _rows(_Bowl()).terms(Z)  # by automatic differentiation
    assert residual.tolist() == Z.tolist() and found.tolist() == ((Z * Z).sum(1) - value).tolist()
    script = _Script(infimum, residual=lambda z, y: 2 * z)
    assert _rows(script).terms(Z)[2].tolist() == ((2 * Z * Z).sum(1) - infimum).tolist()


def test_border_of_tangents():
    """Below them by rounding of the values, of the rise, and of a slope of differences of large numbers."""
    slope = torch.tensor([[0.5, -2.0], [0.0, 1.0], [3.0, 3.0], [-1.0, 0.5], [1.0, -1.0]], dtype=F64)
    other = Z + torch.tensor([2.0, -3.0], dtype=F64)
    value = torch.tensor([1.0, -2.0, 3.0, 0.25, 0.0], dtype=F64)
    rise = slope * torch.tensor([2.0, -3.0], dtype=F64)
    reached = value + rise.sum(1)
    for steep in (0.0, 1e6):
        rows = _rows(_Script())
        rows.slope = steep
        noise = 1e-15 * steep * Z.abs().amax(1) * 3.0

        def call(off, rows=rows, noise=noise):
            most = 1e-9 * (value.abs() + reached.abs() + rise.abs().sum(1) + UNIT) + noise
            rows._tangent((Z, value, slope, None), (other, reached - off * most, None, None))

        _border(call)


def test_borders_of_promises():
    way, value = Z + torch.tensor([3.0, 4.0], dtype=F64), 2 * torch.ones(N, dtype=F64)
    slope = torch.tensor([[0.5, 0.0]] * N, dtype=F64)
    here = (Z, value, slope, None)
    given = {"smoothness": lambda c: math.inf, "reachable": lambda z, y, eps: None}

    def turn(off):
        far = slope.clone()
        # |far| is 10.5 but for what is to be seen
        far[:, 0] += 10 + off * (1e-8 + 1e-9 * (10.5 + UNIT))
        loss = _Script(**(given | {"smoothness": lambda c: float(c)}))
        _rows(loss)._promises([here, (way, value, far, None)], ZERO)

    _border(turn)

    def dominated(off):
        low, high = value - 1.5, value + 1
        excess = high - low - off * 1e-9 * (high + low + UNIT)
        far = torch.stack([0 * excess, (3 * excess).sqrt()], 1)
        points = [(Z, v, 9 + slope, None) for v in (value, low, math.nan * value)]
        loss = _Script(**given, dominance=lambda c: 1.5 * c)
        _rows(loss)._promises([*points, (way, high, far, None)], ZERO)

    _border(dominated)

    seen = []

    def gap(factor):
        low = value - 1
        excess = value - low - 1e-9 * (value + low + UNIT)

        def gap_bound(y, c, norm):
            seen.append(norm)
            return factor * float(excess.mean())

        overflown = (way, low, math.inf * (1 + slope), None)
        _rows(_Script(**given, gap_bound=gap_bound))._promises([here, overflown], ZERO)

    gap(1.0)
    assert seen == pytest.approx([math.sqrt(N) / 2 * (1 + 1e-12)], rel=1e-14, abs=0)
    with pytest.raises(ValueError, match=rf"gap_bound gives .* \(samples {FIRST} to {FIRST + N - 1}\)"):
        gap(1 - 1e-12)

    infimum, asked = value - 1, []

    def reached(off):
        def reachable(z, y, eps):
            asked.append(eps)
            return way

        most = 1e-9 * (infimum + 1e-3 + infimum + UNIT)
        script = _Script(infimum + 1e-3 + off * most, smoothness=given["smoothness"], reachable=reachable)
        _rows(script)._promises([here], infimum)
        assert script.seen[0].tolist() == way.tolist()

    _border(reached)
    assert set(asked) == {1e-3}


@pytest.mark.parametrize("which", range(3))
def test_border_of_groups(which):
    """Pairs of neighbours share the output of one, of the other, or the mean; the last of five is alone."""
    pairs = Z[:4].reshape(2, 2, C)
    shared = [pairs[:, 0], pairs[:, 1], (pairs[:, 0] + pairs[:, 1]) / 2][which].repeat_interleave(2, 0)
    values = torch.tensor([1.0, -3.0, 0.5, 2.0], dtype=F64)
    sizes = torch.tensor([4.0, 2.5], dtype=F64) + UNIT[[0, 2]]

    def call(off):
        asked = []

        def group_infimum(y, group, groups):
            asked.append((y.shape, group.tolist(), groups))
            return values.reshape(2, 2).sum(1) + off[[0, 2]] * 1e-9 * sizes

        given = [torch.full((4,), 9.0, dtype=F64)] * 3
        given[which] = values
        script = _Script(*given, group_infimum=group_infimum)
        try:
            _rows(script)._groups()
        finally:
            assert asked == [((4, C), [0, 0, 1, 1], 2)]
            assert script.seen[which].tolist() == shared.tolist()

    _border(call, 0)
    _border(call, 2)


class _Nothing(ConvexLoss):
    """The loss that is 0 everywhere: every bound is met with equality, and none is broken."""

    def __init__(self):
        self.asked, self.grouped = [], []

    def value(self, z, y):
        return 0.0 * z.sum(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=F64)

    def residual(self, z, y):
        return torch.zeros_like(z)

    def curvature_product(self, z, y, v):
        self.asked.append((z, v))
        return torch.zeros_like(z)

    def curvature_diagonal(self, z, y):
        return torch.zeros_like(z)

    def terms(self, z, y):
        return self.value(z, y), self.residual(z, y), self.infimum(y)

    def smoothness(self, c):
        return 0.0

    def dominance(self, c):
        return 1.0

    def gap_bound(self, y, c, norm):
        return 0.0

    def group_infimum(self, y, group, groups):
        self.grouped.append(groups)
        return torch.zeros(groups, dtype=F64)


@pytest.mark.parametrize("n", range(1, N + 1))
def test_what_is_met_with_equality_is_not_broken(n):
    loss = _Nothing()
    check_convex(loss, Z[:n], ROWS[:n])
    assert loss.grouped == ([n // 2] if n > 1 else [])
    # derivatives at the end of the chord of scale 1, along the shortest one, and along each output in turn
    directions = torch.randn((4, n, C), generator=torch.Generator().manual_seed(0), dtype=F64)
    for found, along in zip(
        loss.asked, (directions[0], torch.eye(C, dtype=F64).repeat(n, 1)[:n]), strict=True
    ):
        assert [a.tolist() for a in found] == [(Z[:n] + directions[1]).tolist(), along.tolist()]
    check_convex(loss, Z[:n], ROWS[:n], seen=1 - Z[:n])


def test_a_loss_may_overflow_far_away_alone():
    directions = torch.randn((4, 1, 1), generator=torch.Generator().manual_seed(0), dtype=F64)
    near, far = 10 * float(directions[2].abs()), 1e4 * float(directions[3].abs())

    class Walled(_Bowl):
        def value(self, z, y):
            return torch.where(z[:, 0].abs() < self.wall, super().value(z, y), math.inf)

    loss, here = Walled(), torch.zeros((1, 1), dtype=F64)
    loss.wall = near * 1.001
    assert loss.wall < far
    check_convex(loss, here, here)
    loss.wall = near * 0.999
    with pytest.raises(ValueError, match="is not finite at finite outputs"):
        check_convex(loss, here, here)


def test_a_value_that_others_change():
    """Seen by the first half alone, whose samples count from 0."""

    class Mixed(_Nothing):
        def value(self, z, y):
            return z[:, 0] + z.mean()

    with pytest.raises(ValueError, match=r"others change its value \(at sample 0\)"):
        check_convex(Mixed(), Z, ROWS)


@pytest.mark.parametrize("y", [torch.tensor(1.0), torch.zeros(N - 1), torch.zeros(N + 1, C), [0.0] * N])
def test_prepared_targets_are_a_row_a_sample(y):
    with pytest.raises(ValueError, match=rf"\.prepare must give a tensor of {N} rows"):
        check_convex(_Nothing(), Z, y)
