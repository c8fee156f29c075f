"""Cross-entropy with labels, probabilities and label smoothing, as a convex loss."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from gcfast import ops
from gcfast.losses.base import ConvexLoss, finite, group_sum, log_excess, number, real_targets
from gcfast.losses.rounding import SPARE, TINY, UNIT, entropy_below


class CrossEntropy(ConvexLoss):
    """-sum_c q_c log softmax(z)_c; y: int64 classes (n,) or probabilities (n, C), as F.cross_entropy."""

    name = "cross_entropy"

    def __init__(self, label_smoothing: float = 0.0, ignore_index: int = -100):
        self.label_smoothing = number("label_smoothing", label_smoothing, 0.0, 1.0, "a number in [0, 1]")
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise TypeError(f"ignore_index: expected an int; got {ignore_index!r}")
        self.ignore_index = ignore_index

    def prepare(self, y: Tensor, n: int, c: int) -> Tensor:
        y = real_targets(y)
        y = self._probabilities(y, n, c) if y.is_floating_point() else self._labels(y, n, c)
        if self.label_smoothing:
            if y.dim() == 1:
                y = nn.functional.one_hot(y, c).to(torch.float64)
            y = (1 - self.label_smoothing) * y + self.label_smoothing / c
        return y

    def _probabilities(self, y: Tensor, n: int, c: int) -> Tensor:
        """Rows of sum one; torch's function does not divide by another sum, so that is not done here."""
        if tuple(y.shape) != (n, c):
            raise ValueError(
                f"targets: expected integer class labels of shape ({n},), or probabilities of shape "
                f"({n}, {c}); got {tuple(y.shape)}, {y.dtype}"
            )
        if self.ignore_index >= 0:
            raise ValueError(
                f"loss: ignore_index={self.ignore_index} is for class labels; the targets are probabilities"
            )
        # what rounding to the dtype makes of the sum, at most: of c numbers, and of the sum they came from
        rounding = min(1e-4, (c + 8) * torch.finfo(y.dtype).eps)
        y = y.to(torch.float64)
        finite(y)
        bad = ((y < 0).any(1) | ((y.sum(1) - 1).abs() > rounding)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"targets: row {i} is no probability vector (minimum {float(y[i].min()):.3g}, "
                f"sum {float(y[i].sum()):.9g}); divide each row by its sum"
            )
        return y / y.sum(1, keepdim=True)

    def _labels(self, y: Tensor, n: int, c: int) -> Tensor:
        if y.dtype == torch.bool:
            raise TypeError(f"targets: expected integer class labels or probabilities; got {y.dtype}")
        if y.dim() == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if tuple(y.shape) != (n,):
            raise ValueError(f"targets: class labels must have shape ({n},); got {tuple(y.shape)}")
        y = y.long()
        bad = ((y < 0) | (y >= c) | (y == self.ignore_index)).nonzero()
        if len(bad):
            i, label = int(bad[0]), int(y[bad[0]])
            raise ValueError(
                f"targets: label {label} of sample {i} is the loss's ignore_index: leave such samples out of "
                "the data, as the loss leaves them out of its mean"
                if label == self.ignore_index
                else f"targets: label {label} of sample {i} is out of range for {c} outputs (0..{c - 1})"
            )
        return y

    def output_count(self, y: Tensor) -> int:
        y = real_targets(y)
        if not y.is_floating_point() and bool((y == self.ignore_index).any()):
            self._labels(y, len(y), sys.maxsize)  # which names it
        return super().output_count(y)

    def attained(self, y: Tensor) -> bool:
        return y.dim() == 2 and bool((y > 0).all())

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return self.terms(z, y)[0]

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        return self.terms(z, y)[1]

    def terms(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # conjugate of log-sum-exp minus <q, .> at p - q is sum p log p
        return ops.softmax_residual(z, y.to(z.dtype) if y.dim() == 2 else y)

    def probabilities(self, residual: Tensor, y: Tensor) -> Tensor:
        """softmax(z) from the residual: exact where it is tiny."""
        if y.dim() == 2:
            return residual + y
        label = y[:, None]
        return residual.scatter_add(1, label, torch.ones_like(label, dtype=residual.dtype))

    def curvature_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return ops.softmax_curvature(z, v)

    def curvature_diagonal(self, z: Tensor, y: Tensor) -> Tensor:
        p = self.probabilities(self.residual(z, y), y)
        return p * (1 - p)

    def majorant(self, z: Tensor, y: Tensor) -> Tensor | None:
        """That of Jaakkola and Jordan in each output's distance from the middle of the two largest.

        It lies above where there are two classes; with more of them it is a guess. With labels Newton's own
        steps do better.
        """
        if z.shape[1] == 1 or y.dim() == 1:
            return None
        far = (z - z.topk(2).values.mean(1, keepdim=True)).abs().clamp(min=1e-4)
        return torch.tanh(0.5 * far) / far

    def infimum(self, y: Tensor) -> Tensor:
        if y.dim() == 1:
            return torch.zeros(len(y), dtype=torch.float64, device=y.device)
        return entropy_below(y, (y.shape[1] + 4) * UNIT)  # prepare() has rounded sum, quotient and smoothing

    def rounding(self, z: Tensor, y: Tensor, value: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """With a_c = z_c - max z <= 0, e_c = exp(a_c) and s the sum of the others' e_c the loss is
        Q log1p(s) - sum_c q_c a_c, Q = sum_c q_c: terms of one sign. e_c is known to (8 + |a_c|) u relative,
        so log1p(s) to (C + 16) u of itself and sum p_c |a_c| u. The gradient is Q p - q; it is made as p - q,
        at the maximum as (1 - q) - (1 - p): what is lost there is relative to 1 - p and 1 - q. prepare() has
        rounded probabilities, each to (C + 4) u relative: Q is 1 within ``SPARE``.
        """
        c = z.shape[1]
        top, k = z.max(1, keepdim=True)
        a = (z - top).abs()
        e = (-a).exp()
        others = e.scatter(1, k, 0.0)
        p = others / e.sum(1, keepdim=True)
        missing = p.sum(1, keepdim=True)  # 1 - p at the maximum
        spread = (p * a).nan_to_num(0.0).sum(1, keepdim=True)  # 0 inf is 0 here
        of_p = p * (2 * c + 32 + a + spread)
        of_p = of_p.nan_to_num(0.0).scatter(1, k, (2 * c + 32) * missing + spread)
        of_residual = of_p + 2 * residual.abs()
        if y.dim() == 2:
            p = p.scatter(1, k, 1.0)
            off = (y.sum(1) - 1).abs()[:, None] / UNIT + 2 * c + 8
            of_residual = of_residual + off * (p + y) + (1 - y.gather(1, k)).abs() * e.eq(1.0)
        else:
            wrong = (k[:, 0] != y).to(z.dtype)[:, None]
            of_residual = of_residual + wrong * e.eq(1.0)
        of_value = ((3 * c + 48) * value.abs() + 2 * spread[:, 0]) * UNIT
        return of_value * SPARE + c * TINY, of_residual * (UNIT * SPARE) + TINY

    def excess(self, z: Tensor, y: Tensor, error: Tensor, value: Tensor, residual: Tensor) -> Tensor:
        """For log-sum-exp at most (max d - min d)^2 / 8 (Hoeffding's lemma) and max d - min d.

        The loss has Q of that, which is within the ``SPARE`` of whoever takes it.
        """
        most = error.amax(1)
        return torch.minimum(0.5 * most**2 + TINY, 2 * most)

    def smoothness(self, c: int) -> float:
        return 0.5 if c > 1 else 0.0

    def gap_bound(self, y: Tensor, c: int, residual_norm: float) -> float:
        """As the base class; finite where the norm is too small for any probability to reach zero.

        With d = y - p = -residual_i the excess is KL(y || p) = sum_(y_c > 0) -y_c log(1 - d_c / y_c). As d
        sums to zero, |d_c| <= sqrt((C-1)/C) |d|; let u bound d_c / y_c. Then the excess is at most
        q + k(u) sum_(y_c > 0) d_c^2 / y_c with k of log_excess and q the sum of d over the support of y,
        which is that of p over its z zeros: q <= sqrt(z (C-z) / C) |d|, by the norms of the two parts of d.
        Cauchy and Schwarz sum q over the samples.
        """
        if y.dim() == 1:
            zeros, least = (
                torch.full_like(y, c - 1, dtype=torch.float64),
                torch.ones_like(y, dtype=torch.float64),
            )
        else:
            zeros = (y == 0).sum(1).to(torch.float64)
            least = torch.where(y > 0, y, math.inf).amin(1)
        share = (c - 1) / c
        weight = float((torch.where(zeros == c - 1, share, 1.0) / least).amax())
        curved = log_excess(math.sqrt(share) * residual_norm / float(least.amin()) * SPARE) * weight
        if not math.isfinite(curved):
            return math.inf
        outside = math.sqrt(float((zeros * (c - zeros) / c).sum())) * residual_norm
        return (outside + curved * residual_norm**2) / len(y) * SPARE + TINY

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        if y.dim() == 2:
            if not self.attained(y):
                return None
            target = y.log()
            return target + (z - target).mean(1, keepdim=True)  # a constant in a row changes nothing
        label = y[:, None]
        others = z.scatter(1, label, -math.inf).logsumexp(1, keepdim=True)
        return z.scatter(1, label, torch.maximum(z.gather(1, label), others - math.log(math.expm1(eps))))

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        if y.dim() == 2:
            known = (int(group.bincount().amax()) + y.shape[1] + 4) * UNIT
            return entropy_below(group_sum(y, group, groups), known)
        # count the pairs (group, class) that occur: a table of all would be groups x classes
        classes = int(y.max()) + 1
        pair, times = torch.unique(group * classes + y, return_counts=True)
        of, count = pair // classes, group.bincount(minlength=groups).to(torch.float64)
        terms = times * torch.log1p((count[of] - times) / times)
        # each term is right to 8 u, and a group adds no more of them than there are classes
        return torch.zeros_like(count).index_add_(0, of, terms) * (1 - (classes + 8) * UNIT)
