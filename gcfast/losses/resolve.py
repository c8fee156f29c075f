"""From what a user calls a loss (a name, a torch.nn module, their own) to a convex loss, checked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gcfast.losses.base import ConvexLoss
from gcfast.losses.cross_entropy import CrossEntropy
from gcfast.losses.elementwise import MSE, BCEWithLogits, Huber

_BY_NAME = {"cross_entropy": CrossEntropy, "mse": MSE, "bce_with_logits": BCEWithLogits, "huber": Huber}


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
    if type(loss) in _BY_NAME.values():
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
