"""Losses that are sums over outputs: squared error, binary cross-entropy with logits, Huber."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from gcfast import ops
from gcfast.losses.base import ConvexLoss, finite, group_mean, log_excess, number, real_targets


class Elementwise(ConvexLoss):
    """Losses that are a mean of one-dimensional losses; y (n, C) float64, or (n,) where C = 1."""

    separable = True

    def prepare(self, y: Tensor, n: int, c: int) -> Tensor:
        y = real_targets(y)
        if y.dim() == 1 and c == 1:
            y = y.unsqueeze(1)
        if tuple(y.shape) != (n, c):
            raise ValueError(f"targets: expected shape ({n}, {c}); got {tuple(y.shape)}")
        y = y.to(torch.float64)
        finite(y)
        return y

    def output_count(self, y: Tensor) -> int:
        return y.shape[1] if real_targets(y).dim() > 1 else 1


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

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        mean, _ = group_mean(y, group, groups)
        total = torch.zeros(groups, dtype=torch.float64, device=y.device)
        return total.index_add_(0, group, ((y - mean[group]) ** 2).mean(1))

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

    def terms(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        conjugate = -(p * ops.activation(-z) + q * ops.activation(z)).mean(1)  # p log p + q log q
        return self.value(z, y), self.residual(z, y), conjugate

    def infimum(self, y: Tensor) -> Tensor:
        return -(torch.xlogy(y, y) + torch.xlogy(1 - y, 1 - y)).mean(1)

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
        excess = log_excess(norm / least)
        if excess == math.inf:
            return math.inf
        return (math.sqrt(int(hard.sum())) * norm + excess * weight * norm**2) / y.numel()

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        mean, count = group_mean(y, group, groups)
        return count * self.infimum(mean)

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
        a = (z - y).abs()
        return torch.where(a <= self.delta, 0.5 * a * a, self.delta * (a - 0.5 * self.delta)).mean(1)

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).clamp(-self.delta, self.delta) / z.shape[1]

    def curvature_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.curvature_diagonal(z, y) * v

    def curvature_diagonal(self, z: Tensor, y: Tensor) -> Tensor:
        return ((z - y).abs() <= self.delta).to(z.dtype) / z.shape[1]

    def terms(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = self.residual(z, y)
        return self.value(z, y), r, (r * y + r * r * (0.5 * z.shape[1])).sum(1)

    def infimum(self, y: Tensor) -> Tensor:
        return torch.zeros(len(y), dtype=torch.float64, device=y.device)

    def smoothness(self, c: int) -> float:
        return 1.0 / c

    def gap_bound(self, y: Tensor, c: int, residual_norm: float) -> float:
        """As the base class: all |t| = C |residual| < delta, where the loss is t^2/2, or inf."""
        return 0.5 * c * residual_norm**2 / len(y) if c * residual_norm < self.delta else math.inf

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        return y

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        # The slope in each output is increasing and piecewise linear: Newton for its zero, in all groups and
        # outputs at once, from their means, and bisection where Newton leaves what is known to hold the zero.
        q, count = group_mean(y, group, groups)
        index = group[:, None].expand_as(y)
        low = torch.zeros_like(q).scatter_reduce(0, index, y, "amin", include_self=False)
        high = torch.zeros_like(q).scatter_reduce(0, index, y, "amax", include_self=False)
        for _ in range(100):
            t = q[group] - y
            slope = torch.zeros_like(q).index_add_(0, group, t.clamp(-self.delta, self.delta))
            low, high = torch.where(slope < 0, q, low), torch.where(slope > 0, q, high)
            settled = slope.abs() <= 1e-15 * self.delta * count[:, None]
            middle = 0.5 * (low + high)
            if bool((settled | (middle <= low) | (middle >= high)).all()):
                break
            inside = torch.zeros_like(q).index_add_(0, group, (t.abs() <= self.delta).to(q.dtype))
            newton = q - slope / inside.clamp(min=1)
            step = torch.where((inside > 0) & (newton > low) & (newton < high), newton, middle)
            q = torch.where(settled, q, step)
        return torch.zeros_like(count).index_add_(0, group, self.value(q[group], y))
