"""The judge of solved heads: loss, infimum and regularised minimum in 80 digits, from the numbers as stored.

It shares no code with the package that it judges: logits are sums of exact products, infima come from closed
forms (Huber's from its sorted breakpoints), and the regularised minimum is bracketed by its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import flint
import mpmath as mp
import numpy as np
import torch
from torch import Tensor

from gcfast.losses import MSE, BCEWithLogits, ConvexLoss, CrossEntropy, Huber

DIGITS = 80
Rows = Sequence[Sequence[mp.mpf]]


def rows_of(t: Tensor) -> Rows:
    """A matrix, or a column for a vector, as exact numbers."""
    t = t.detach().double().cpu()
    return [[mp.mpf(x) for x in row] for row in (t if t.dim() == 2 else t[:, None]).tolist()]


def _dots(a: Rows, b: Rows) -> Rows:
    """Of each row of a with each of b, rounded once: so many bits hold every sum of products of floats."""
    with flint.ctx.workprec(1 << 13):
        left, right = (flint.arb_mat([[flint.arb(x) for x in row] for row in rows]) for rows in (a, b))
        return [[+mp.mpf(x) for x in row] for row in (left * right.transpose()).tolist()]


def _softmax(z: Sequence[mp.mpf]) -> tuple[mp.mpf, list[mp.mpf]]:
    """log sum exp(z_c - max z), which keeps the digits that 1 + 1e-200 would lose, and z_c - max z."""
    k = max(range(len(z)), key=lambda c: z[c])
    a = [x - z[k] for x in z]
    return mp.log1p(mp.fsum(mp.exp(x) for c, x in enumerate(a) if c != k)), a


def _softplus(x: mp.mpf) -> mp.mpf:
    return mp.log1p(mp.exp(x)) if x < 0 else x + mp.log1p(mp.exp(-x))


def _sigmoid(x: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-x)) if x >= 0 else mp.exp(x) / (1 + mp.exp(x))


class ExactLoss:
    """A loss by its name, of one sample: ``value`` and ``slope`` at outputs z, ``infimum`` of some samples.

    name: "cross_entropy" (targets are labels or probabilities), "mse", "bce_with_logits" or "huber".
    """

    def __init__(self, name: str, *, label_smoothing: float = 0.0, delta: float = 1.0):
        self.name, self.smoothing, self.delta = name, mp.mpf(label_smoothing), mp.mpf(delta)

    def targets(self, y: Tensor, c: int) -> Rows:
        if self.name != "cross_entropy":
            return rows_of(y)
        if y.is_floating_point():
            q = rows_of(y)
        else:
            q = [[mp.mpf(int(label == k)) for k in range(c)] for label in y.flatten().tolist()]
        return [[(1 - self.smoothing) * x + self.smoothing / c for x in row] for row in q]

    def value(self, z: Sequence[mp.mpf], y: Sequence[mp.mpf]) -> mp.mpf:
        if self.name == "cross_entropy":
            log_sum, a = _softmax(z)
            return mp.fsum(q * (log_sum - x) for q, x in zip(y, a, strict=True))
        return mp.fsum(self._one(x, q) for x, q in zip(z, y, strict=True)) / len(z)

    def _one(self, z: mp.mpf, y: mp.mpf) -> mp.mpf:
        if self.name == "bce_with_logits":
            return (1 - y) * _softplus(z) + y * _softplus(-z)
        t = abs(z - y)
        if self.name == "mse":
            return t * t
        return t * t / 2 if t <= self.delta else self.delta * (t - self.delta / 2)

    def slope(self, z: Sequence[mp.mpf], y: Sequence[mp.mpf]) -> list[mp.mpf]:
        c = len(z)
        if self.name == "cross_entropy":
            (log_sum, a), total = _softmax(z), mp.fsum(y)
            p, k = [total * mp.exp(x - log_sum) for x in a], max(range(c), key=lambda c: z[c])
            slope = [x - q for x, q in zip(p, y, strict=True)]
            slope[k] = mp.fsum(q - x for j, (x, q) in enumerate(zip(p, y, strict=True)) if j != k)  # sum: 0
            return slope
        if self.name == "bce_with_logits":
            return [((1 - q) * _sigmoid(x) - q * _sigmoid(-x)) / c for x, q in zip(z, y, strict=True)]
        if self.name == "mse":
            return [2 * (x - q) / c for x, q in zip(z, y, strict=True)]
        return [max(-self.delta, min(self.delta, x - q)) / c for x, q in zip(z, y, strict=True)]

    def curvature(self, z: Sequence[mp.mpf], y: Sequence[mp.mpf]) -> np.ndarray:
        """(C, C), in float64: it serves steps, not statements."""
        c = len(z)
        if self.name == "cross_entropy":
            (log_sum, a), total = _softmax(z), float(mp.fsum(y))
            p = np.array([float(mp.exp(x - log_sum)) for x in a])
            return total * (np.diag(p) - np.outer(p, p))
        if self.name == "bce_with_logits":
            return np.diag([float(_sigmoid(x) * _sigmoid(-x)) / c for x in z])
        if self.name == "mse":
            return np.eye(c) * 2 / c
        return np.diag([float(abs(x - q) <= self.delta) / c for x, q in zip(z, y, strict=True)])

    def infimum(self, y: Rows) -> mp.mpf:
        """inf over one output q of the sum over these samples."""
        c = len(y[0])
        if self.name == "cross_entropy":
            total = [mp.fsum(row[k] for row in y) for k in range(c)]
            k = max(range(c), key=lambda k: total[k])
            rest, whole = mp.fsum(x for j, x in enumerate(total) if j != k), mp.fsum(total)
            others = mp.fsum(-x * mp.log(x / whole) for j, x in enumerate(total) if j != k and x)
            return others - total[k] * mp.log1p(-rest / whole)
        return mp.fsum(self._infimum([row[k] for row in y]) for k in range(c)) / c

    def _infimum(self, y: list[mp.mpf]) -> mp.mpf:
        n, mean = len(y), mp.fsum(y) / len(y)
        if self.name == "bce_with_logits":
            pair = (mean, 1 - mean), (1 - mean, mean)
            return -n * sum(x * mp.log(x) if x < 0.5 else x * mp.log1p(-o) for x, o in pair if x)
        if self.name == "mse":
            return mp.fsum((x - mean) ** 2 for x in y)
        # the slope is piecewise linear: between the breakpoints where its sign changes its zero is a line's
        points = sorted({x + s * self.delta for x in y for s in (-1, 1)})
        slope = lambda q: mp.fsum(max(-self.delta, min(self.delta, q - x)) for x in y)  # noqa: E731
        low, high = 0, len(points) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if slope(points[middle]) <= 0 else (low, middle)
        a, b = points[low], points[high]
        at_a, at_b = slope(a), slope(b)
        q = a if at_a == at_b else a - at_a * (b - a) / (at_b - at_a)
        return mp.fsum(self._one(q, x) for x in y)


class ExactHeads:
    """Heads of features (n, m) with these targets, judged in 80 digits."""

    def __init__(self, features: Tensor, targets: Tensor, loss: ExactLoss, c: int):
        with mp.workdps(DIGITS):
            self.loss, self.c, self.y = loss, c, loss.targets(targets, c)
        self.h = features.detach().double().tolist()  # as exact, and quicker
        self.n, self.m = features.shape

    def logits(self, weight: Rows, bias: Rows | None) -> Rows:
        shift = [mp.mpf(0)] * self.c if bias is None else [row[0] for row in bias]
        return [[z + b for z, b in zip(row, shift, strict=True)] for row in _dots(self.h, weight)]

    def mean(self, z: Rows) -> mp.mpf:
        return mp.fsum(self.loss.value(a, b) for a, b in zip(z, self.y, strict=True)) / self.n

    def value(self, weight: Tensor, bias: Tensor | None) -> mp.mpf:
        """L of the head as stored."""
        with mp.workdps(DIGITS):
            return self.mean(self.logits(rows_of(weight), None if bias is None else rows_of(bias)))

    def infimum(self) -> mp.mpf:
        """L*: equal rows of features share an output."""
        with mp.workdps(DIGITS):
            groups: dict[tuple[float, ...], list[int]] = {}
            for i, row in enumerate(self.h):
                groups.setdefault(tuple(row), []).append(i)
            return mp.fsum(self.loss.infimum([self.y[i] for i in g]) for g in groups.values()) / self.n

    def regularised(
        self,
        weight: Tensor,
        bias: Tensor | None,
        center: tuple[Tensor, Tensor | None] | None,
        lam: float,
        steps: int = 12,
    ) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
        """(P(V) - P*, |V - V*|, |V - center|) for P = L + (lam/2) |V - center|^2, the first two from below.

        Newton's steps in float64 from V, kept where they go down in 80 digits: P at any head is no less than
        P*, and with g the gradient there V* lies within |g| / lam of it. center: zeros by default.
        """
        with mp.workdps(DIGITS):
            ones = bias is not None
            h1 = [[*row, 1.0] if ones else row for row in self.h]
            stack = lambda w, b: [  # noqa: E731
                [*row, *last]
                for row, last in zip(rows_of(w), rows_of(b) if ones else [[]] * self.c, strict=True)
            ]
            v = stack(weight, bias)
            origin = [[mp.mpf(0)] * len(v[0])] * self.c if center is None else stack(*center)
            lam_ = mp.mpf(lam)

            def objective(v: Rows) -> tuple[mp.mpf, Rows]:
                z = _dots(h1, v)
                return self.mean(z) + lam_ / 2 * _square(v, origin), z

            first, z = objective(v)
            best, at, size = first, v, len(v[0])
            features = np.array(h1)
            for _ in range(steps):
                g = self._gradient(h1, at, origin, z, lam_)
                hessian = np.zeros((self.c, size, self.c, size))
                for h, a, b in zip(features, z, self.y, strict=True):
                    hessian += np.einsum("cd,j,k->cjdk", self.loss.curvature(a, b), h, h) / self.n
                hessian = hessian.reshape(self.c * size, -1)
                hessian[np.diag_indices(len(hessian))] += lam
                scale = 1 / np.sqrt(hessian.diagonal())
                top = max((abs(x) for row in g for x in row), default=mp.mpf(0))
                if not top or not np.isfinite(hessian).all():
                    break
                right = np.array([float(x / top) for row in g for x in row])
                step = scale * np.linalg.lstsq(hessian * np.outer(scale, scale), scale * right, rcond=None)[0]
                t = mp.mpf(1)
                while t > 1e-6:
                    new = [
                        [x - t * top * mp.mpf(float(s)) for x, s in zip(row, part, strict=True)]
                        for row, part in zip(at, step.reshape(self.c, size), strict=True)
                    ]
                    value, ahead = objective(new)
                    if value < best:
                        break
                    t /= 4
                else:
                    break
                best, at, z = value, new, ahead
            g = self._gradient(h1, at, origin, z, lam_)
            near = mp.sqrt(mp.fsum(x * x for row in g for x in row)) / lam_
            distance = max(mp.sqrt(_square(v, at)) - near, mp.mpf(0))
            return first - best, distance, mp.sqrt(_square(v, origin))

    def _gradient(self, h1: Rows, v: Rows, origin: Rows, z: Rows, lam: mp.mpf) -> Rows:
        slopes = [self.loss.slope(a, b) for a, b in zip(z, self.y, strict=True)]
        total = _dots(list(zip(*slopes, strict=True)), list(zip(*h1, strict=True)))
        return [
            [t / self.n + lam * (x - o) for t, x, o in zip(*rows, strict=True)]
            for rows in zip(total, v, origin, strict=True)
        ]


def _square(a: Rows, b: Rows) -> mp.mpf:
    return mp.fsum((x - y) ** 2 for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def holds(bound: float, true: mp.mpf) -> bool:
    """Whether the float is at least the exact number; never where it is no number."""
    return not math.isnan(bound) and (bound == math.inf or mp.mpf(bound) >= true)


@dataclass(frozen=True)
class Drawn:
    """A problem at random, at any scale, and a head that need not solve it."""

    features: Tensor
    targets: Tensor
    loss: ConvexLoss
    exact: ExactHeads
    start: tuple[Tensor, Tensor | None]
    head: tuple[Tensor, Tensor | None]


def draw(seed: int, *, ordinary: bool = False, most: int = 24) -> Drawn:
    """Features, targets, start and head whose scales reach from 1e-300 to 1e15, or all about 1.

    Samples repeat, classes are absent, targets lie next to 0 and 1 or are one-hot as probabilities; features
    in float32 or float64, heads with a bias or without.
    """
    rng = np.random.default_rng(seed)
    n, m, c = int(rng.integers(1, most)), int(rng.integers(1, most + 6)), int(rng.integers(1, 6))
    dtype = torch.float32 if rng.random() < 0.4 else torch.float64
    low = -37.0 if dtype == torch.float32 else -300.0  # what float32 holds

    def scale() -> float:
        if ordinary or rng.random() < 0.3:
            return 1.0
        return 10.0 ** float(rng.uniform(-8, 15) if rng.random() < 0.8 else rng.uniform(low, 0))

    h = rng.standard_normal((n, m)) * scale()
    if not ordinary and rng.random() < 0.3:
        h[:, : 1 + m // 4] *= scale()
    if rng.random() < 0.3:
        h[rng.integers(0, n, n // 2)] = h[rng.integers(0, n, n // 2)]
    features = torch.from_numpy(h).to(dtype)
    name = str(rng.choice(["cross_entropy", "mse", "bce_with_logits", "huber"]))
    smoothing, delta, y = 0.0, 1.0, rng.standard_normal((n, c))
    if name == "cross_entropy":
        c = max(c, 2)
        y = rng.integers(0, max(1, c - int(rng.random() < 0.3)), n)
        kind, smoothing = rng.random(), float(rng.choice([0.0, 0.1, 1e-9]))
        if kind < 0.5:
            logits = torch.from_numpy(rng.standard_normal((n, c)) * rng.choice([1.0, 30.0, 500.0]))
            y = torch.softmax(logits, 1).numpy() if kind < 0.4 else np.eye(c)[y]
        loss: ConvexLoss = CrossEntropy(smoothing)
    elif name == "bce_with_logits":
        far = rng.choice([1e-20, 1e-12, 1.0], (n, c))
        y = np.where(rng.random((n, c)) < 0.5, far * rng.random((n, c)), 1 - far * rng.random((n, c)))
        y = np.where(rng.random((n, c)) < 0.2, np.round(y), y)
        loss = BCEWithLogits()
    else:
        y = y * scale()
        if name == "huber":
            delta = float(rng.choice([1.0, 1e-3, 1e6]))
        loss = MSE() if name == "mse" else Huber(delta)
    targets = torch.from_numpy(y)
    bias = bool(rng.random() < 0.8)

    def part(size: float) -> tuple[Tensor, Tensor | None]:
        w = torch.from_numpy(rng.standard_normal((c, m)) * size)
        return w, torch.from_numpy(rng.standard_normal(c) * size) if bias else None

    start, step = part(scale() * float(rng.random() < 0.7)), part(scale())
    head = (start[0] + step[0], None if start[1] is None or step[1] is None else start[1] + step[1])
    exact = ExactHeads(features, targets, ExactLoss(name, label_smoothing=smoothing, delta=delta), c)
    return Drawn(features, targets, loss, exact, start, head)
