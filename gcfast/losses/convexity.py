"""Counterexamples to what a user's loss says of itself, sought at the outputs that it meets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcfast.errors import as_real, came
from gcfast.losses.base import ConvexLoss
from gcfast.losses.resolve import OWN
from gcfast.losses.rounding import TINY

SCALES = (0.1, 1.0, 10.0, 1e4)  # how far from the outputs met
NEAR = 10.0  # beyond, a loss may overflow
STEPS = 5  # down to the infimum that the loss states
EPS = 1e-3  # for which reachable outputs are asked
BLOCK = 1 << 18  # outputs looked at together

Point = tuple[Tensor, Tensor, Tensor, Tensor]  # outputs, and there value, residual and conjugate


def check_convex(loss: ConvexLoss, z: Tensor, y: Tensor, seen: Tensor | None = None) -> None:
    """Raise ValueError where a user's loss is seen to break its protocol at outputs z (n, C).

    All samples are looked at, there, along random chords of several lengths, and down towards their infimum;
    given outputs that were ``seen`` before, along the chord to these alone.
    Refused is a value that is not finite, not convex, below its infimum, or not of one sample alone; a
    residual, curvature or conjugate that is not the value's; a smoothness, dominance, gap_bound, reachable or
    group_infimum that promises too much. This finds counterexamples and proves nothing. gcfast's own losses
    are taken as they are.
    """
    if type(loss) in OWN:
        return
    z = z.detach().to(torch.float64)
    n, c = z.shape
    if not isinstance(y, Tensor) or y.dim() == 0 or len(y) != n:
        raise ValueError(f"loss: {loss!r}.prepare must give a tensor of {n} rows, one per sample")
    rows = min(n, max(1, BLOCK // c))
    directions = None
    if seen is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
        shape = (len(SCALES), rows, c)
        directions = torch.randn(shape, generator=generator, dtype=z.dtype, device="cpu").to(z.device)
    whole = _Rows(loss, z, y).value(z)
    if n > 1:  # each in another place, among fewer
        few = torch.arange(n - 1, 0, -2, device=z.device)
        _Rows(loss, z[few], y[few]).must_be(whole[few])
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        some = _Rows(loss, z[part], y[part], start)
        if directions is not None:
            some.check(directions[:, : some.n])
        elif seen is not None:
            some.compare(seen[part])


class _Rows:
    """Some samples: their outputs z, their prepared targets y, and the number of the first of them."""

    def __init__(self, loss: ConvexLoss, z: Tensor, y: Tensor, first: int = 0):
        self.loss, self.z, self.y, self.first = loss, z, y, first
        self.n, self.c = z.shape
        # what rounding of values and of slopes is measured by where the loss is nearly 0
        self.unit, self.slope = z.new_zeros(self.n), math.nan

    def check(self, directions: Tensor) -> None:
        """``directions``: one (n, C) for each of the scales."""
        here, infimum = self._begin()
        points = [here]
        for way, scale in zip(directions, SCALES, strict=True):
            points.append(self._chord(here, self.z + scale * way, infimum, scale <= NEAR))
        low = here
        for _ in range(STEPS):  # Polyak's, which go below an infimum that is too high
            step = 1.9 * (low[1] - infimum) / low[2].square().sum(1).clamp(min=TINY)
            z = low[0] - step[:, None] * low[2]
            low = (z, *self.terms(z))
            self._above(infimum, low[1])
            points.append(low)
        if self._gives("terms", "residual", "curvature_product", "curvature_diagonal"):
            self._derivatives(points[SCALES.index(1.0) + 1], directions[0])
        if self._gives("smoothness", "dominance", "gap_bound", "reachable"):
            self._promises(points, infimum)
        if self._gives("rounding", "excess"):
            self._bounds(here)
        if self.n > 1 and self._gives("group_infimum"):
            self._groups()

    def compare(self, seen: Tensor) -> None:
        """As :meth:`check`, with the chord to other outputs alone."""
        here, infimum = self._begin()
        self._chord(here, seen, infimum, near=True)

    def _begin(self) -> tuple[Point, Tensor]:
        """What is at z, and the infimum."""
        z, value = self.z, self.value(self.z)
        infimum = self._numbers("infimum", (self.n,), self.y)
        self._refuse(~infimum.isfinite(), "has the infimum {:.6g}, which is not finite", infimum)
        self._finite(value)
        # the loss shows its size and slope far away, on one side or the other, where it is nearly 0 at z
        size = z.abs().amax(1).clamp(min=1)
        way = NEAR * size[:, None].expand_as(z)
        way[:, 1::2].neg_()
        sides = torch.stack([value, self.value(z + way), self.value(z - way)]).abs()
        sides = sides.nan_to_num(nan=0.0, posinf=0.0)
        # some terms of the value may be as large as z, and so their rounding
        self.unit = sides.amax().clamp(max=1) * (1 + 1e-4 * size)
        self.slope = float((sides / size).amax())
        here = (z, *self.terms(z))
        self._finite(*here)
        self._above(infimum, here[1])
        return here, infimum

    def _chord(self, here: Point, end: Tensor, infimum: Tensor, near: bool) -> Point:
        """The end of a chord; convex along it, above the tangents of both ends, and above the infimum."""
        there, middle = (end, *self.terms(end)), self.value(0.5 * (here[0] + end))
        if near:
            self._finite(*there, middle)
        mean = 0.5 * (here[1] + there[1])
        self._refuse(
            middle > mean + self._slack(here[1], there[1]),
            "is not convex: the value {:.6g} in the middle of a chord lies above the mean {:.6g} of its "
            "ends; the guarantee needs a loss convex in the outputs",
            middle,
            mean,
        )
        self._tangent(here, there)
        self._tangent(there, here)
        self._above(infimum, there[1])
        return there

    def _gives(self, *methods: str) -> bool:
        """Whether the loss has one of these methods of its own."""
        own = vars(self.loss)
        return any(m in own or getattr(type(self.loss), m) is not getattr(ConvexLoss, m) for m in methods)

    def must_be(self, among_others: Tensor) -> None:
        """The value is that of a sample alone, whatever else there is."""
        wrong = self._differ(self.value(self.z), among_others)
        self._refuse(wrong, "is no function of one sample: others change its value")

    def value(self, z: Tensor) -> Tensor:
        return self._numbers("value", (self.n,), z, self.y)

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(value, residual, conjugate) at z, which belong together."""
        y, shape = self.y, (self.n, self.c)
        if not self._gives("terms", "residual"):
            with torch.enable_grad():  # one look for both
                z = z.detach().requires_grad_()
                total = self._called("value", self.loss.value, z, y)
                value = self._tensor("value", total, shape[:1])
                slope = self._called("residual", torch.autograd.grad, total.sum(), z)[0]
            residual = self._tensor("residual", slope, shape)
            return value, residual, (residual * z.detach()).sum(1) - value
        value, residual = self.value(z), self._numbers("residual", shape, z, y)
        pairing = residual * z
        if not self._gives("terms"):
            return value, residual, pairing.sum(1) - value
        found = self._called("terms", self.loss.terms, z, y)
        own, slope, conjugate = (
            self._tensor("terms", one, like)
            for one, like in zip(found, (shape[:1], shape, shape[:1]), strict=True)
        )
        self._refuse(self._differ(own, value), "has another value in terms() than in value()")
        self._refuse(self._differ(slope, residual), "has another residual in terms() than in residual()")
        wrong = (own + conjugate - pairing.sum(1)).abs() > self._slack(own, pairing.abs().sum(1))
        self._refuse(wrong, "has a conjugate in terms() that is not <residual, z> - value")
        return own, slope, conjugate

    def _finite(self, *numbers: Tensor) -> None:
        for found in numbers:
            self._refuse(~found.isfinite().reshape(self.n, -1).all(1), "is not finite at finite outputs")

    def _above(self, infimum: Tensor, value: Tensor) -> None:
        words = "falls below its own infimum: {:.9g} below {:.9g}"
        self._refuse(value < infimum - self._slack(value, infimum), words, value, infimum)

    def _tangent(self, point: Point, other: Point) -> None:
        """A convex value lies above its tangents: this holds the residual to it, kinks or not."""
        rise = point[2] * (other[0] - point[0])
        reached = point[1] + rise.sum(1)
        # a slope of differences of numbers as large as z
        noise = 1e-15 * self.slope * point[0].abs().amax(1) * (other[0] - point[0]).abs().amax(1)
        self._refuse(
            other[1] < reached - self._slack(point[1], other[1], rise.abs().sum(1)) - noise,
            "has a residual that is no gradient of a convex value: its tangent reaches {:.9g} where the "
            "value is {:.9g}",
            reached,
            other[1],
        )

    def _derivatives(self, point: Point, v: Tensor) -> None:
        """What the loss gives in closed form is what automatic differentiation of its value gives."""
        loss, y, (z, _, residual, _), shape = self.loss, self.y, point, (self.n, self.c)
        every = torch.arange(self.n, device=z.device)
        pick = (every, every % self.c)
        unit = torch.zeros_like(z)
        unit[pick] = 1.0
        product, column = (self._numbers("curvature_product", shape, z, y, u) for u in (v, unit))
        diagonal = self._numbers("curvature_diagonal", shape, z, y)[pick]
        wrong = self._differ(diagonal, column[pick])
        self._refuse(wrong, "has a curvature_diagonal that is not of its curvature_product")
        try:
            plain = ConvexLoss.residual(loss, z, y), ConvexLoss.curvature_product(loss, z, y, v)
        except RuntimeError:
            return  # autograd does not follow the value; its tangents have been looked at
        for name, given, found in zip(
            ("residual", "curvature_product"), (residual, product), plain, strict=True
        ):
            self._refuse(self._differ(given, found), f"has a {name} that is not the derivative of its value")

    def _promises(self, points: list[Point], infimum: Tensor) -> None:
        """smoothness, dominance, gap_bound and reachable, by the points seen and the lowest values there."""
        loss, y, c, (z, _, slope, _) = self.loss, self.y, self.c, points[0]
        lowest = torch.stack([point[1] for point in points]).nan_to_num(nan=math.inf).amin(0)
        smooth, kappa = self._bound("smoothness", c), self._bound("dominance", c)
        for a, value, residual, _ in points:
            turn, way = (residual - slope).norm(dim=1), (a - z).norm(dim=1)
            self._refuse(
                turn > smooth * way * (1 + 1e-9) + self._slack(residual.norm(dim=1)),
                f"has a residual that turns faster than its smoothness({c}) = {smooth:.6g} allows",
            )
            excess = value - lowest - self._slack(value, lowest)
            self._refuse(
                residual.square().sum(1) < kappa * excess,
                f"has a smaller residual than its dominance({c}) = {kappa:.6g} allows",
            )
            norm, mean = float(residual.norm()) * (1 + 1e-12), float(excess.mean())
            if math.isfinite(norm) and (bound := self._bound("gap_bound", y, c, norm)) < mean:
                raise ValueError(
                    f"loss: {loss!r}.gap_bound gives {bound:.6g} where the excess is {mean:.6g} (samples "
                    f"{self.first} to {self.first + self.n - 1})"
                )
        goal = self._called("reachable", loss.reachable, z, y, EPS)
        if goal is not None:
            value = self.value(self._tensor("reachable", goal, (self.n, c)))
            self._refuse(
                value > infimum + EPS + self._slack(value, infimum),
                f"has reachable outputs of value {{:.9g}}, not within {EPS} of the infimum {{:.9g}}",
                value,
                infimum,
            )

    def _bounds(self, here: Point) -> None:
        """rounding and excess are no less than 0, and excess no less than what it bounds at two outputs."""
        z, value, slope, _ = here
        found = self._called("rounding", self.loss.rounding, z, self.y, value, slope)
        pair = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        for one, shape in zip(pair, ((self.n,), (self.n, self.c)), strict=True):
            below = self._tensor("rounding", one, shape).reshape(self.n, -1) < 0
            self._refuse(below.any(1), "has a rounding below 0")
        error = torch.full_like(z, EPS)
        found = self._called("excess", self.loss.excess, z, self.y, error, value, slope)
        excess = self._tensor("excess", found, (self.n,))
        self._refuse(excess < 0, "has an excess below 0")
        for step in (error, -error):
            there, along = self.value(z + step), (slope * step).sum(1)
            wrong = there - value - along > excess * (1 + 1e-6) + self._slack(there, value, along)
            self._refuse(wrong, "has an excess that is less than what it bounds")

    def _bound(self, method: str, *args: Any) -> float:
        found = self._called(method, getattr(self.loss, method), *args)
        number = float(found) if isinstance(found, Tensor) and found.numel() == 1 else as_real(found)
        if not number >= 0:
            raise ValueError(f"loss: {self.loss!r}.{method} must give a number >= 0; got {came(found)}")
        return number

    def _groups(self) -> None:
        """group_infimum, for pairs of neighbours that share the output of one of them, or the mean."""
        groups = self.n // 2
        y, z = self.y[: 2 * groups], self.z[: 2 * groups].unflatten(0, (groups, 2))
        group = torch.arange(groups, device=z.device).repeat_interleave(2)
        bound = self._numbers("group_infimum", (groups,), y, group, groups)
        for shared in (z[:, 0], z[:, 1], z.mean(1)):
            value = self.loss.value(shared.repeat_interleave(2, 0), y).detach().unflatten(0, (groups, 2))
            slack = 1e-9 * (value.abs().sum(1) + self.unit[: 2 * groups : 2])
            wrong = (value.sum(1) < bound - slack).repeat_interleave(2)
            self._refuse(wrong, "falls below its group_infimum where it shares an output with the next")

    def _refuse(self, bad: Tensor, words: str, *shown: Tensor) -> None:
        """ValueError for the first sample in ``bad`` (n,), with its ``shown`` numbers in the words."""
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            said = words.format(*(float(v[i]) for v in shown)) if shown else words
            raise ValueError(f"loss: {self.loss!r} {said} (at sample {self.first + i})")

    def _called(self, method: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except (RuntimeError, IndexError, TypeError) as error:
            shape = (self.n, self.c)
            raise ValueError(f"loss: {self.loss!r}.{method} failed at outputs {shape}: {error}") from error

    def _numbers(self, method: str, shape: tuple[int, ...], *args: Any) -> Tensor:
        return self._tensor(method, self._called(method, getattr(self.loss, method), *args), shape)

    def _tensor(self, method: str, found: Any, shape: tuple[int, ...]) -> Tensor:
        got = type(found).__name__
        if isinstance(found, Tensor):
            if tuple(found.shape) == shape and (found.dtype == self.z.dtype or method.endswith("infimum")):
                return found.detach().to(torch.float64)
            got = f"{tuple(found.shape)}, {found.dtype}"
        raise ValueError(
            f"loss: {self.loss!r}.{method} must give numbers of shape {shape}, one row per sample, and "
            f"{self.z.dtype} for outputs that are so; got {got}"
        )

    def _slack(self, *values: Tensor) -> Tensor:
        """Rounding errors of values of this size, generously."""
        return 1e-9 * (torch.stack([v.abs() for v in values]).sum(0) + self.unit)

    def _differ(self, a: Tensor, b: Tensor) -> Tensor:
        """Samples where a and b are finite and not the same but for rounding."""
        a, b = a.reshape(self.n, -1), b.reshape(self.n, -1)
        return (a - b).abs().amax(1) > 1e-6 * (a.abs() + b.abs()).amax(1) + 1e-9 * self.unit
