"""The protocol of a convex loss: value, residual, curvature, conjugate and infimum, sample by sample."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from gcfast import errors
from gcfast.losses.rounding import SPARE, TINY, UNIT, nan_is_inf

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # which have few operators of their own


class ConvexLoss(ABC):
    """A convex, differentiable loss of the outputs; subclass it for a loss of your own.

    :meth:`value` and :meth:`infimum` are enough: the rest is derived by automatic differentiation. What
    float64 does to them is then assumed, see :meth:`rounding`.
    """

    name = "custom"
    separable = False  # no curvature between outputs of one sample

    @abstractmethod
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """loss_i (n,) at outputs z (n, C) and prepared targets y."""

    @abstractmethod
    def infimum(self, y: Tensor) -> Tensor:
        """inf_q loss_i(q) (n,), or a lower bound of it, to 64 u relative: what no model can beat."""

    def prepare(self, y: Tensor, n: int, c: int) -> Tensor:
        """Check the targets of n samples with c outputs and bring them into the form the methods take."""
        y = real_targets(y)
        if len(y) != n:
            raise ValueError(f"targets: expected {n} rows, one per sample; got shape {tuple(y.shape)}")
        return y

    def output_count(self, y: Tensor) -> int:
        """C, where targets alone tell: columns of real targets, or the least number of outputs of labels."""
        y = real_targets(y)
        y = y if y.is_floating_point() or y.dtype == torch.bool else y.long()  # unsigned ones have no min()
        if (y.dim() > 1 and y.shape[1] > 1) or y.is_floating_point():
            return y.shape[1] if y.dim() > 1 else 1
        outside = ((y < 0) | (y >= 2**31)).reshape(-1) if y.dtype != torch.bool else y.new_zeros(0)
        if bool(outside.any()):
            i = int(outside.nonzero()[0])
            raise ValueError(
                f"targets: label {int(y.reshape(-1)[i])} of sample {i} is out of range (labels count from 0)"
            )
        return max(int(y.max()) + 1, 2) if y.numel() else 2

    def attained(self, y: Tensor) -> bool:
        """Whether every infimum is attained at finite outputs (not so for cross-entropy with hard labels)."""
        return False

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        """d loss_i / d z_i, (n, C)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self.value(z, y).sum(), z)[0]

    def curvature_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """(d^2 loss_i / d z_i^2) v_i, (n, C)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.value(z, y).sum(), z, create_graph=True)
            if not g.requires_grad:
                return torch.zeros_like(v)
            (h,) = torch.autograd.grad((g * v).sum(), z, allow_unused=True)
        return torch.zeros_like(v) if h is None else h

    def curvature_diagonal(self, z: Tensor, y: Tensor) -> Tensor:
        """Diagonals of the C x C curvature matrices, (n, C)."""
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        return torch.stack([self.curvature_product(z, y, e.expand_as(z))[:, c] for c, e in enumerate(eye)], 1)

    def majorant(self, z: Tensor, y: Tensor) -> Tensor | None:
        """d (n, C) with loss_i(z + t) <= loss_i(z) + <residual_i, t> + <t, d_i t> / 2 for all t, if known.

        It proposes steps, and nothing that is said of a head rests on it.
        """
        return None

    def terms(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss_i, residual, conjugate loss_i*(residual_i)); the last two by Fenchel and Young's equality."""
        value, residual = self.value(z, y), self.residual(z, y)
        return value, residual, (residual * z).sum(1) - value

    def rounding(self, z: Tensor, y: Tensor, value: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of |value - loss_i(z)| (n,) and |residual - gradient of loss_i at z| (n, C) in float64.

        The default is an assumption, not a proof: that both are, to 64 u relative, those of outputs within
        64 u |z| of z, u = 2^-53 (2^-24 where ``value`` gives float32). State your own where ``value`` loses
        more digits than that, say by a difference of numbers far larger than itself.
        """
        root = self.curvature_diagonal(z, y).clamp(min=0).sqrt()
        moved = root * (root * z.abs()).sum(1, keepdim=True)
        relative = 32 * torch.finfo(value.dtype).eps * SPARE
        of_value = relative * (value.abs() + (residual.abs() * z.abs()).sum(1)) + TINY
        return of_value, relative * (residual.abs() + moved) + TINY

    @property
    def assumes_rounding(self) -> bool:
        """Whether :meth:`rounding` is the assumption of the base class."""
        return type(self).rounding is ConvexLoss.rounding

    def excess(self, z: Tensor, y: Tensor, error: Tensor, value: Tensor, residual: Tensor) -> Tensor:
        """Upper bound (n,) of loss_i(z + d) - loss_i(z) - <gradient at z, d> for all |d| <= error (n, C).

        It may be exceeded by a factor within ``SPARE``, which :func:`bounds_at` adds.

        By :meth:`smoothness`; where that is unknown by convexity: z + d lies between the 2 C outputs
        z +- C error_c e_c, where the loss is evaluated.
        """
        c = z.shape[1]
        smooth = self.smoothness(c)
        if math.isfinite(smooth):
            return 0.5 * smooth * (error**2).sum(1) + TINY
        of_value, of_residual = self.rounding(z, y, value, residual)
        highest = torch.full_like(value, -math.inf)
        far = (c * error + 4 * UNIT * z.abs()) * SPARE  # so far that it is so after rounding
        for k in range(c):
            for sign in (-1.0, 1.0):
                ahead = z.clone()
                ahead[:, k] += sign * far[:, k]
                there = self.value(ahead, y).to(z)
                there = there + self.rounding(ahead, y, there, self.residual(ahead, y))[0]
                highest = torch.maximum(highest, nan_is_inf(there))
        along = ((residual.abs() + of_residual) * error).sum(1)
        return (highest - value + of_value + along + 4 * UNIT * (highest.abs() + value.abs())) * SPARE

    def smoothness(self, c: int) -> float:
        """Upper bound of the largest eigenvalue of any curvature matrix with c outputs; inf if unknown."""
        return math.inf

    def dominance(self, c: int) -> float:
        """A kappa with |residual_i|^2 >= kappa (loss_i - inf loss_i) at all outputs; 0 if none is known."""
        return 0.0

    def gap_bound(self, y: Tensor, c: int, residual_norm: float) -> float:
        """Upper bound of (1/n) sum_i (loss_i - inf loss_i) at all outputs with |residual|_F <= residual_norm.

        inf where none is known. y: prepared targets, n >= 1.
        """
        kappa = self.dominance(c)
        if not kappa > 0:
            return math.inf
        # kappa itself may be rounded, and there are four roundings here
        return residual_norm * residual_norm / (kappa * len(y)) * (1 + 6 * UNIT) + TINY

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        """Outputs near z at which every loss_i is within eps of its infimum; None if not known."""
        return None

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        """inf_q sum_{i in group} loss_i(q), (groups,), or a lower bound: samples no model can tell apart.

        y: prepared targets, n >= 1. No group is empty.
        """
        total = torch.zeros(groups, dtype=torch.float64, device=y.device)
        return total.index_add_(0, group, self.infimum(y).to(torch.float64))

    def __repr__(self) -> str:
        # with its options: a checkpoint tells problems apart by this
        options = "".join(f" {k}={v!r}" for k, v in vars(self).items() if isinstance(v, (int, float, str)))
        return f"<{type(self).__name__} {self.name}{options}>"


def group_sum(y: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums (groups, C) of y (n, C) over each group, float64."""
    total = torch.zeros((groups, y.shape[1]), dtype=torch.float64, device=y.device)
    return total.index_add_(0, group, y.to(torch.float64))


def group_mean(y: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean of y (n, C) in each group and the number of members."""
    y = y.to(torch.float64)
    count = torch.zeros(groups, dtype=torch.float64, device=y.device).index_add_(
        0, group, torch.ones_like(y[:, 0])
    )
    return group_sum(y, group, groups) / count.unsqueeze(1), count


def log_excess(u: float) -> float:
    """A k with -log(1 - v) <= v + k v^2 for all v <= u, but for a factor within ``SPARE``; inf for u >= 1.

    For (-log(1 - v) - v) / v^2 = int_0^1 (1 - s) / (1 - s v)^2 ds increases with v, k is this at u; where u
    is below 1/1000, and the difference has lost digits, 1/2 + u/2, which is no less.
    """
    if u >= 1.0:
        return math.inf
    return 0.5 + 0.5 * u if u < 1e-3 else (-math.log1p(-u) - u) / u**2


def real_targets(y: Tensor) -> Tensor:
    """``y``, detached; TypeError and ValueError where it is no dense tensor of real numbers a sample."""
    errors.is_dense("targets", y)
    if y.is_complex():
        raise TypeError(f"targets: expected real numbers; got {y.dtype}")
    if y.dim() == 0 or 0 in y.shape[1:]:
        raise ValueError(f"targets: expected one row per sample, not empty; got shape {tuple(y.shape)}")
    y = y.detach()
    if y.dtype in _UNSIGNED:
        y = y.to(torch.int64)
        if bool((y < 0).any()):
            raise ValueError("targets: expected whole numbers below 2^63")
    return y


def number(name: str, value: Any, low: float, high: float, words: str) -> float:
    """``value`` as a float; TypeError and ValueError with ``words`` where it is no number in [low, high]."""
    x = errors.as_real(value)
    if not low <= x <= high:
        kind = ValueError if x == x or isinstance(value, float) else TypeError
        raise kind(f"{name}: expected {words}; got {errors.came(value)}")
    return x


def finite(y: Tensor) -> None:
    bad = (~torch.isfinite(y)).nonzero()
    if len(bad):
        raise ValueError(
            f"targets: expected finite numbers; got {float(y[tuple(bad[0])])} at sample {int(bad[0][0])}"
        )
