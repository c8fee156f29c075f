"""Losses that are sums over outputs: squared error, binary cross-entropy with logits, Huber."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from gcfast import ops
from gcfast.losses.base import ConvexLoss, finite, group_mean, group_sum, log_excess, number, real_targets
from gcfast.losses.rounding import SPARE, TINY, UNIT, entropy_below, positive, row_means_below


class Elementwise(ConvexLoss):
    """Losses that are a mean of one-dimensional losses; y (n, C) float64, or (n,) where C = 1."""

    separable = True

    def prepare(self, y: Tensor, n: int, c: int) -> Tensor:
        y = real_targets(y)
        given = tuple(y.shape)
        if y.dim() == 1 and c == 1:
            y = y.unsqueeze(1)
        elif y.dim() > 2:  # outputs of more axes come as rows as well
            y = y.flatten(1)
        if tuple(y.shape) != (n, c):
            raise ValueError(f"targets: expected shape ({n}, {c}); got {given}")
        y = y.to(torch.float64)
        finite(y)
        return y

    def output_count(self, y: Tensor) -> int:
        return y.shape[1] if real_targets(y).dim() > 1 else 1

    def rounding(self, z: Tensor, y: Tensor, value: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """A mean of terms of one sign, made of z - y, or of 1 - y and functions of z, by a few roundings.

        The value is right to (C + 24) u of itself, a residual to 16 u of its positive and negative part.
        """
        c = z.shape[1]
        of_value = value.abs() * ((c + 24) * UNIT * SPARE) + TINY
        return of_value, self._parts(z, y, residual) * (16 * UNIT * SPARE) + TINY

    def _parts(self, z: Tensor, y: Tensor, residual: Tensor) -> Tensor:
        """The residual's positive part plus the size of its negative one, (n, C)."""
        return residual.abs()


class MSE(Elementwise):
    """(1/C) |z - y|^2, as ``F.mse_loss``."""

    name = "mse"

    def attained(self, y: Tensor) -> bool:
        return True

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return ((z - y) ** 2).mean(1)

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y) * (2.0 / z.shape[1])

    def curvature_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v * (2.0 / z.shape[1])

    def curvature_diagonal(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(z, 2.0 / z.shape[1])

    def terms(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = self.residual(z, y)
        return self.value(z, y), r, (r * y + r * r * (z.shape[1] / 4.0)).sum(1)

    def infimum(self, y: Tensor) -> Tensor:
        return torch.zeros(len(y), dtype=torch.float64, device=y.device)

    def smoothness(self, c: int) -> float:
        return 2.0 / c

    def dominance(self, c: int) -> float:
        return 4.0 / c  # |2 t / C|^2 over t^2 / C

    def excess(self, z: Tensor, y: Tensor, error: Tensor, value: Tensor, residual: Tensor) -> Tensor:
        return (error**2).mean(1) + TINY

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        """sum_i (y_i - mean)^2 = sum_i t_i^2 - (sum_i t_i)^2 / count for t = y - q, with q near the mean."""
        q, count = group_mean(y, group, groups)
        t = y - q[group]
        terms = (count[:, None] + 8) * UNIT  # roundings of a sum over a group
        square, size = group_sum(t * t, group, groups), group_sum(t.abs(), group, groups)
        off = group_sum(t, group, groups).abs() + terms * size
        least = square * (1 - 2 * terms) - off * off / count[:, None] * (1 + 2 * terms)
        return row_means_below(positive(least - TINY))

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        return y


class BCEWithLogits(Elementwise):
    """Mean of log(1 + e^z) - y z, as ``F.binary_cross_entropy_with_logits``; y in [0, 1]."""

    name = "bce_with_logits"

    def prepare(self, y: Tensor, n: int, c: int) -> Tensor:
        y = super().prepare(y, n, c)
        bad = ((y < 0) | (y > 1)).nonzero()
        if len(bad):
            i, j = bad[0].tolist()
            raise ValueError(
                f"targets: expected numbers in [0, 1]; got {float(y[i, j]):.6g} at sample {i}, output {j}"
            )
        return y

    def attained(self, y: Tensor) -> bool:
        return bool(((y > 0) & (y < 1)).all())

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        # (1 - y) softplus(z) + y softplus(-z): small relative error for either label
        return ((1 - y) * ops.activation(z) + y * ops.activation(-z)).mean(1)

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        return ((1 - y) * torch.sigmoid(z) - y * torch.sigmoid(-z)) / z.shape[1]

    def curvature_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.curvature_diagonal(z, y) * v

    def curvature_diagonal(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z) / z.shape[1]

    def majorant(self, z: Tensor, y: Tensor) -> Tensor:
        """tanh(z/2) / 2z (Jaakkola and Jordan, 2000); at most 1/4, which it is near zero."""
        far = z.abs().clamp(min=1e-4)
        return torch.tanh(0.5 * far) / (2 * far * z.shape[1])

    def terms(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        conjugate = -(p * ops.activation(-z) + q * ops.activation(z)).mean(1)  # p log p + q log q
        return self.value(z, y), self.residual(z, y), conjugate

    def infimum(self, y: Tensor) -> Tensor:
        return self._entropy(y, 1 - y, UNIT)

    def _entropy(self, ones: Tensor, zeros: Tensor, known: float) -> Tensor:
        """Of sums of y and of 1 - y, each within a factor 1 +- known."""
        return row_means_below(entropy_below(torch.stack([ones, zeros], -1), known))

    def _parts(self, z: Tensor, y: Tensor, residual: Tensor) -> Tensor:
        return ((1 - y) * torch.sigmoid(z) + y * torch.sigmoid(-z)) / z.shape[1]

    def excess(self, z: Tensor, y: Tensor, error: Tensor, value: Tensor, residual: Tensor) -> Tensor:
        """softplus has slopes in [0, 1] and a curvature of at most 1/4."""
        return torch.minimum(0.125 * error**2, error).mean(1) + TINY

    def smoothness(self, c: int) -> float:
        return 0.25 / c

    def gap_bound(self, y: Tensor, c: int, residual_norm: float) -> float:
        """As the base class; finite where the norm is too small for any probability to reach zero or one.

        An output is cross-entropy with two classes, d = y - p = -C residual: for y in {0, 1} its excess is
        at most |d| + k(u) d^2, otherwise k(u) d^2 / (y (1 - y)), over C; see :meth:`CrossEntropy.gap_bound`.
        """
        hard = (y == 0) | (y == 1)
        least = float(torch.where(hard, 1.0, torch.minimum(y, 1 - y)).amin())
        weight = float(torch.where(hard, 1.0, 1 / (y * (1 - y))).amax())
        norm = c * residual_norm
        curved = log_excess(norm / least * SPARE) * weight
        if not math.isfinite(curved):
            return math.inf
        return (math.sqrt(int(hard.sum())) * norm + curved * norm**2) / y.numel() * SPARE + TINY

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        ones, zeros = group_sum(y, group, groups), group_sum(1 - y, group, groups)
        return self._entropy(ones, zeros, (int(group.bincount().amax()) + 4) * UNIT)

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        far = -math.log(math.expm1(eps))
        return torch.where(y == 1, z.clamp(min=far), torch.where(y == 0, z.clamp(max=-far), torch.logit(y)))


class Huber(Elementwise):
    """Mean of t^2/2 for |t| <= delta, delta (|t| - delta/2) beyond; t = z - y; as ``F.huber_loss``."""

    name = "huber"

    def __init__(self, delta: float = 1.0):
        self.delta = number("delta", delta, 5e-324, sys.float_info.max, "a positive finite number")

    def attained(self, y: Tensor) -> bool:
        return True

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return self._of((z - y).abs()).mean(1)

    def _of(self, a: Tensor) -> Tensor:
        slope = a.clamp(max=self.delta)
        return slope * (a - 0.5 * slope)

    def excess(self, z: Tensor, y: Tensor, error: Tensor, value: Tensor, residual: Tensor) -> Tensor:
        """Slopes lie in [-delta, delta], the curvature in [0, 1]."""
        return torch.minimum(0.5 * error**2, 2 * self.delta * error).mean(1) + TINY

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).clamp(-self.delta, self.delta) / z.shape[1]

    def curvature_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.curvature_diagonal(z, y) * v

    def curvature_diagonal(self, z: Tensor, y: Tensor) -> Tensor:
        return ((z - y).abs() <= self.delta).to(z.dtype) / z.shape[1]

    def majorant(self, z: Tensor, y: Tensor) -> Tensor:
        """The parabola about y that touches the loss at z."""
        return self.delta / ((z - y).abs().clamp(min=self.delta) * z.shape[1])

    def terms(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = self.residual(z, y)
        return self.value(z, y), r, (r * y + r * r * (0.5 * z.shape[1])).sum(1)

    def infimum(self, y: Tensor) -> Tensor:
        return torch.zeros(len(y), dtype=torch.float64, device=y.device)

    def smoothness(self, c: int) -> float:
        return 1.0 / c

    def gap_bound(self, y: Tensor, c: int, residual_norm: float) -> float:
        """As the base class: all |t| = C |residual| < delta, where the loss is t^2/2, or inf."""
        norm = c * residual_norm * SPARE
        return 0.5 * norm * residual_norm / len(y) * SPARE + TINY if norm < self.delta else math.inf

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        return y

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        # The slope in each output is increasing and piecewise linear: Newton for its zero, in all groups and
        # outputs at once, from their means, and bisection where Newton leaves what is known to hold the zero,
        # as it does where the curvature is 0.
        q, count = group_mean(y, group, groups)
        index = group[:, None].expand_as(y)
        low = torch.zeros_like(q).scatter_reduce(0, index, y, "amin", include_self=False)
        high = torch.zeros_like(q).scatter_reduce(0, index, y, "amax", include_self=False)
        terms = (count[:, None] + 24) * UNIT  # roundings of a sum over a group

        def slope_at(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The slope, what rounding may have hidden of it, and the curvature."""
            t = q[group] - y
            part = t.clamp(-self.delta, self.delta)
            inside = group_sum((t.abs() <= self.delta).to(q.dtype), group, groups)
            hidden = terms * group_sum(part.abs(), group, groups)  # sums of denormals are exact
            return group_sum(part, group, groups), hidden, inside

        for _ in range(100):
            slope, hidden, inside = slope_at(q)
            low, high = torch.where(slope < -hidden, q, low), torch.where(slope > hidden, q, high)
            newton, middle = q - slope / inside, 0.5 * (low + high)
            step = torch.where((newton > low) & (newton < high), newton, middle)
            last, q = q, torch.where(slope.abs() > hidden, step, q)
            if torch.equal(last, q):
                break
        slope, hidden, inside = slope_at(q)
        near = 8 * (hidden / inside + UNIT * q.abs())
        for side in (q - near, q + near):
            at, unsure, _ = slope_at(side)
            low = torch.where(at < -unsure, torch.maximum(low, side), low)
            high = torch.where(at > unsure, torch.minimum(high, side), high)
        # the zero lies between low and high, where by convexity the sum is no less than the tangent at q
        reach = torch.maximum(high - q, q - low) * SPARE
        below = group_sum(self._of((q[group] - y).abs()), group, groups) * (1 - terms)
        return row_means_below(positive(below - (slope.abs() + hidden) * reach * SPARE - TINY))
