"""Convex losses: value, residual, curvature, conjugate and infimum, sample by sample.

The training loss is L = (1/n) sum_i loss_i(f_i) with f = logits (n, C). Values agree with the functions of
``torch.nn.functional`` of the same name with ``reduction="mean"``: MSE, BCE and Huber average over the C
outputs too, so that loss_i carries a factor 1/C.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from gcfast import ops


class ConvexLoss(ABC):
    """A convex, differentiable loss of the outputs; subclass it for a loss of your own.

    :meth:`value` and :meth:`infimum` are enough: the rest is derived by automatic differentiation.
    """

    name = "custom"
    separable = False  # no curvature between outputs of one sample

    @abstractmethod
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """loss_i (n,) at outputs z (n, C) and prepared targets y."""

    @abstractmethod
    def infimum(self, y: Tensor) -> Tensor:
        """inf_q loss_i(q) (n,), or a lower bound of it: what no model can beat."""

    def prepare(self, y: Tensor, n: int, c: int) -> Tensor:
        """Check the targets of n samples with c outputs and bring them into the form the methods take."""
        if len(y) != n:
            raise ValueError(f"targets: expected {n} rows, one per sample; got shape {tuple(y.shape)}")
        return y

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

    def terms(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss_i, residual, conjugate loss_i*(residual_i)); the last two by Fenchel and Young's equality."""
        value, residual = self.value(z, y), self.residual(z, y)
        return value, residual, (residual * z).sum(1) - value

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
        return residual_norm**2 / (kappa * len(y)) if kappa > 0 else math.inf

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        """Outputs near z at which every loss_i is within eps of its infimum; None if not known."""
        return None

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        """inf_q sum_{i in group} loss_i(q), (groups,), or a lower bound: samples no model can tell apart."""
        total = torch.zeros(groups, dtype=torch.float64, device=y.device)
        return total.index_add_(0, group, self.infimum(y).to(torch.float64))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def _group_mean(y: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean of y (n, C) in each group and the number of members."""
    y = y.to(torch.float64)
    count = torch.zeros(groups, dtype=torch.float64, device=y.device).index_add_(
        0, group, torch.ones_like(y[:, 0])
    )
    total = torch.zeros((groups, y.shape[1]), dtype=torch.float64, device=y.device).index_add_(0, group, y)
    return total / count.clamp(min=1).unsqueeze(1), count


def _log_excess(u: float) -> float:
    """A k with -log(1 - v) <= v + k v^2 for all v <= u, inf for u >= 1: (-log(1 - u) - u) / u^2, rounded up.

    For (-log(1 - v) - v) / v^2 = int_0^1 (1 - s) / (1 - s v)^2 ds increases with v.
    """
    if u >= 1.0:
        return math.inf
    return 0.5 + 0.5 * u if u < 1e-3 else (-math.log1p(-u) - u) / u**2 * (1 + 1e-9)


class CrossEntropy(ConvexLoss):
    """-sum_c q_c log softmax(z)_c; y: int64 classes (n,) or probabilities (n, C), as F.cross_entropy."""

    name = "cross_entropy"

    def __init__(self, label_smoothing: float = 0.0):
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected a number in [0, 1); got {label_smoothing}")
        self.label_smoothing = float(label_smoothing)

    def prepare(self, y: Tensor, n: int, c: int) -> Tensor:
        if y.is_floating_point():
            if tuple(y.shape) != (n, c):
                raise ValueError(f"targets: probabilities must have shape ({n}, {c}); got {tuple(y.shape)}")
            y = y.to(torch.float64)
            _finite(y)
            bad = ((y < 0).any(1) | ((y.sum(1) - 1).abs() > 1e-4)).nonzero()
            if len(bad):
                i = int(bad[0])
                raise ValueError(
                    f"targets: row {i} is no probability vector (minimum {float(y[i].min()):.3g}, "
                    f"sum {float(y[i].sum()):.6g})"
                )
            y = y / y.sum(1, keepdim=True)
        else:
            if y.dtype == torch.bool or y.is_complex():
                raise TypeError(f"targets: expected integer class labels or probabilities; got {y.dtype}")
            if y.dim() == 2 and y.shape[1] == 1:
                y = y[:, 0]
            if tuple(y.shape) != (n,):
                raise ValueError(f"targets: class labels must have shape ({n},); got {tuple(y.shape)}")
            y = y.long()
            bad = ((y < 0) | (y >= c)).nonzero()
            if len(bad):
                i = int(bad[0])
                raise ValueError(
                    f"targets: label {int(y[i])} of sample {i} is out of range for {c} outputs (0..{c - 1})"
                )
            if self.label_smoothing:
                y = nn.functional.one_hot(y, c).to(torch.float64)
        if self.label_smoothing:
            y = (1 - self.label_smoothing) * y + self.label_smoothing / c
        return y

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
        return residual.scatter_add(1, y[:, None], torch.ones_like(residual[:, :1]))

    def curvature_product(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return ops.softmax_curvature(z, v)

    def curvature_diagonal(self, z: Tensor, y: Tensor) -> Tensor:
        p = self.probabilities(self.residual(z, y), y)
        return p * (1 - p)

    def infimum(self, y: Tensor) -> Tensor:
        if y.dim() == 1:
            return torch.zeros(len(y), dtype=torch.float64, device=y.device)
        return -torch.xlogy(y, y).sum(1)

    def smoothness(self, c: int) -> float:
        return 0.5 if c > 1 else 0.0

    def gap_bound(self, y: Tensor, c: int, residual_norm: float) -> float:
        """As the base class; finite where the norm is too small for any probability to reach zero.

        With d = y - p = -residual_i the excess is KL(y || p) = sum_(y_c > 0) -y_c log(1 - d_c / y_c). As d
        sums to zero, |d_c| <= sqrt((C-1)/C) |d|; let u bound d_c / y_c. Then the excess is at most
        q + k(u) sum_(y_c > 0) d_c^2 / y_c with k of _log_excess and q the sum of d over the support of y,
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
        excess = _log_excess(math.sqrt(share) * residual_norm / float(least.amin()))
        outside = math.sqrt(float((zeros * (c - zeros) / c).sum())) * residual_norm
        weight = float((torch.where(zeros == c - 1, share, 1.0) / least).amax())
        return (outside + excess * weight * residual_norm**2) / len(y) if excess < math.inf else math.inf

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
            mean, count = _group_mean(y, group, groups)
            return -count * torch.xlogy(mean, mean).sum(1)
        # count the pairs (group, class) that occur: a table of all would be groups x classes
        classes = int(y.max()) + 1 if len(y) else 1
        pair, times = torch.unique(group * classes + y, return_counts=True)
        of, count = pair // classes, group.bincount(minlength=groups).to(torch.float64)
        terms = torch.xlogy(times, times / count[of])
        return torch.zeros_like(count).index_add_(0, of, terms).neg_()


class _Elementwise(ConvexLoss):
    """Losses that are a mean of one-dimensional losses; y (n, C) float64, or (n,) where C = 1."""

    separable = True

    def prepare(self, y: Tensor, n: int, c: int) -> Tensor:
        if y.is_complex():
            raise TypeError(f"targets: expected real numbers; got {y.dtype}")
        if y.dim() == 1 and c == 1:
            y = y.unsqueeze(1)
        if tuple(y.shape) != (n, c):
            raise ValueError(f"targets: expected shape ({n}, {c}); got {tuple(y.shape)}")
        y = y.to(torch.float64)
        _finite(y)
        return y


class MSE(_Elementwise):
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
        mean, _ = _group_mean(y, group, groups)
        total = torch.zeros(groups, dtype=torch.float64, device=y.device)
        return total.index_add_(0, group, ((y - mean[group]) ** 2).mean(1))

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        return y


class BCEWithLogits(_Elementwise):
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
        excess = _log_excess(norm / least)
        if excess == math.inf:
            return math.inf
        return (math.sqrt(int(hard.sum())) * norm + excess * weight * norm**2) / y.numel()

    def group_infimum(self, y: Tensor, group: Tensor, groups: int) -> Tensor:
        mean, count = _group_mean(y, group, groups)
        return count * self.infimum(mean)

    def reachable(self, z: Tensor, y: Tensor, eps: float) -> Tensor | None:
        far = -math.log(math.expm1(eps))
        return torch.where(y == 1, z.clamp(min=far), torch.where(y == 0, z.clamp(max=-far), torch.logit(y)))


class Huber(_Elementwise):
    """Mean of t^2/2 for |t| <= delta, delta (|t| - delta/2) beyond; t = z - y; as ``F.huber_loss``."""

    name = "huber"

    def __init__(self, delta: float = 1.0):
        if not (delta > 0 and math.isfinite(delta)):
            raise ValueError(f"delta: expected a positive number; got {delta}")
        self.delta = float(delta)

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
        q, count = _group_mean(y, group, groups)
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


_BY_NAME = {"cross_entropy": CrossEntropy, "mse": MSE, "bce_with_logits": BCEWithLogits, "huber": Huber}


def _finite(y: Tensor) -> None:
    bad = (~torch.isfinite(y)).nonzero()
    if len(bad):
        raise ValueError(
            f"targets: expected finite numbers; got {float(y[tuple(bad[0])])} at sample {int(bad[0][0])}"
        )


def resolve_loss(loss: str | nn.Module | ConvexLoss) -> ConvexLoss:
    """The :class:`ConvexLoss` of ``loss``: a name, a ``torch.nn`` loss with mean reduction, or itself."""
    if isinstance(loss, ConvexLoss):
        return loss
    if isinstance(loss, str):
        name = loss.lower().replace("-", "_")
        if name not in _BY_NAME:
            raise ValueError(
                f"loss: expected one of {sorted(_BY_NAME)}, a torch.nn loss or a gcfast.ConvexLoss; "
                f"got {loss!r}"
            )
        return _BY_NAME[name]()
    if isinstance(loss, nn.Module):
        if getattr(loss, "reduction", "mean") != "mean":
            raise ValueError(f"loss: expected reduction='mean'; got reduction={loss.reduction!r}")
        for extra in ("weight", "pos_weight"):
            if getattr(loss, extra, None) is not None:
                raise ValueError(
                    f"loss: {type(loss).__name__} with {extra} is not supported; subclass gcfast.ConvexLoss"
                )
        if isinstance(loss, nn.CrossEntropyLoss):
            return CrossEntropy(loss.label_smoothing)
        if isinstance(loss, nn.MSELoss):
            return MSE()
        if isinstance(loss, nn.BCEWithLogitsLoss):
            return BCEWithLogits()
        if isinstance(loss, nn.HuberLoss):
            return Huber(loss.delta)
    raise TypeError(
        f"loss: expected one of {sorted(_BY_NAME)}, nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, "
        f"nn.HuberLoss or a gcfast.ConvexLoss (convex in the outputs); got {type(loss).__name__}"
    )


def check_convex(loss: ConvexLoss, z: Tensor, y: Tensor) -> None:
    """Raise ValueError where a user's loss is seen not to be convex, or its infimum not to be one.

    Probes chords through random outputs around z at several scales: finds a counterexample, proves nothing.
    """
    if type(loss).__module__ == __name__:
        return
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        a = z + scale * torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        b = z + scale * torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        at_a, at_b, middle = loss.value(a, y), loss.value(b, y), loss.value(0.5 * (a + b), y)
        if not bool(torch.isfinite(at_a).all() and torch.isfinite(at_b).all()):
            raise ValueError(f"loss: {loss!r} is not finite at finite outputs")
        slack = 1e-9 * (at_a.abs() + at_b.abs() + 1.0)
        bad = (middle > 0.5 * (at_a + at_b) + slack).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"loss: {loss!r} is not convex: at sample {i} the value {float(middle[i]):.6g} in the "
                "middle of a chord lies above "
                f"the mean {0.5 * float(at_a[i] + at_b[i]):.6g} of its ends; "
                "the guarantee needs a loss convex in the outputs"
            )
        below = (torch.minimum(at_a, at_b) < loss.infimum(y) - slack).nonzero()
        if len(below):
            raise ValueError(f"loss: {loss!r} falls below its own infimum at sample {int(below[0])}")


def infimum_with_copies(loss: ConvexLoss, y: Tensor, copies: list[list[int]]) -> float:
    """L* = (1/n) sum_i inf loss_i, where equal samples must share one output."""
    total = loss.infimum(y).to(torch.float64).clone()
    if copies:
        members = torch.tensor([i for group in copies for i in group], device=y.device)
        sizes = torch.tensor([len(group) for group in copies], device=y.device)
        group = torch.arange(len(copies), device=y.device).repeat_interleave(sizes)
        total[members] = 0.0
        total[members[sizes.cumsum(0) - sizes]] = loss.group_infimum(y[members], group, len(copies)).to(total)
    return float(total.sum()) / max(len(y), 1)


def output_count(targets: Tensor) -> int:
    if (targets.dim() == 2 and targets.shape[1] > 1) or targets.is_floating_point():
        return targets.shape[1] if targets.dim() == 2 else 1
    if len(targets) and int(targets.min()) < 0:
        i = int((targets.reshape(-1) < 0).nonzero()[0])
        label = int(targets.reshape(-1)[i])
        raise ValueError(f"targets: label {label} of sample {i} is out of range (labels count from 0)")
    return max(int(targets.max()) + 1, 2) if len(targets) else 2
