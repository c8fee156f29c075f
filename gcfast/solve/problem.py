"""Phase two's convex problem: features, targets, loss and start, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from gcfast import errors
from gcfast.features import Features, equal_rows
from gcfast.losses import (
    UNIT,
    ConvexLoss,
    infimum_with_copies,
)
from gcfast.solve.bounds import BoundedHead, Head, bounded_heads
from gcfast.storage import check_memory


@dataclass
class HeadProblem:
    """The problem in float64 terms, whatever the features' dtype and wherever they come from."""

    features: Features
    targets: Tensor
    loss: ConvexLoss
    weight: Tensor  # V_tau (C, m), float64
    bias: Tensor | None
    infimum: float
    dtype: torch.dtype  # of the head as it is stored
    target_gap: float = 1e-6
    weight_decay: float = 0.0
    copies: list[list[int]] = field(default_factory=list)  # groups of samples with equal features
    _transposed: tuple[Tensor, tuple[Tensor, Tensor | None]] | None = None
    _bounded: tuple[BoundedHead, BoundedHead] | None = None

    @property
    def n(self) -> int:
        return self.features.n

    @property
    def device(self) -> torch.device:
        return self.features.device

    def logits(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """H W^T + b (n, C) in float64."""
        z = self.features.times(weight.to(torch.float64))
        return z if bias is None else z + bias.to(torch.float64)

    @cached_property
    def start_logits(self) -> Tensor:
        return self.logits(self.weight, self.bias)

    @property
    def target(self) -> float:
        """The loss asked for, without weight decay."""
        return self.infimum + self.target_gap

    @cached_property
    def offset(self) -> Tensor:
        """Outputs (n, C) of the head that U is measured from: V_tau, or zero with weight decay."""
        return torch.zeros_like(self.start_logits) if self.weight_decay else self.start_logits

    @property
    def zero(self) -> Tensor:
        """(n, C)."""
        return torch.zeros_like(self.offset)

    @cached_property
    def initial(self) -> float:
        """The loss there."""
        return self.mean_loss(self.offset)

    def head(self, du: Tensor, db: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The head that lies (du, db) from there."""
        if self.weight_decay:
            return du, db
        return self.weight + du, None if self.bias is None or db is None else self.bias + db

    def outputs(self, step: tuple[Tensor, Tensor | None]) -> Tensor:
        """Outputs (n, C) in float64 of the head that lies ``step`` from there."""
        return self.logits(*self.head(*step))

    def transpose(self, a: Tensor, remember: bool = True) -> tuple[Tensor, Tensor | None]:
        """H1^T a as (C, m) and (C,), float64; remembers the last one."""
        if not remember:
            return self._transpose(a)
        if self._transposed is not None and self._transposed[0] is a:
            return self._transposed[1]
        self._transposed = (a, self._transpose(a))
        return self._transposed[1]

    def _transpose(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.features.transposed_times(a), (None if self.bias is None else a.sum(0))

    def mean_loss(self, z: Tensor) -> float:
        return float(self.loss.value(z, self.targets).mean())

    def bounded(self, weight: Tensor, bias: Tensor | None) -> tuple[BoundedHead, BoundedHead]:
        """The head rounded to its dtype, and as given: one where that is the same.

        The last ones are remembered: whether a head is within the target is asked before it is evaluated.
        """
        given: Head = (weight.double(), None if bias is None else bias.double())
        last = self._bounded
        if last is None or not same_head(last[1].head, given):
            dtype = self.dtype
            stored = (given[0].to(dtype).double(), None if given[1] is None else given[1].to(dtype).double())
            heads = [given] if same_head(stored, given) else [stored, given]
            found = bounded_heads(self.features, heads, self.loss, self.targets)
            last = self._bounded = found[0], found[-1]
        return last

    def loss_above(self, weight: Tensor, bias: Tensor | None) -> float:
        """No less than the loss of the head as stored.

        Enlarged so that what is no more than infimum + target_gap is within the target after roundings too.
        """
        loss = self.bounded(weight, bias)[0].loss
        return loss + 8 * UNIT * (abs(loss) + abs(self.infimum))

    def stored_loss(self, du: Tensor, db: Tensor | None) -> float:
        """:meth:`loss_above` of the start plus (du, db)."""
        return self.loss_above(self.weight + du, None if self.bias is None or db is None else self.bias + db)


def same_head(one: Head, other: Head) -> bool:
    biases = one[1] is None or other[1] is None or torch.equal(one[1], other[1])
    return torch.equal(one[0], other[0]) and biases


def make_problem(
    features: Features,
    targets: Tensor,
    loss: ConvexLoss,
    start: tuple[Tensor, Tensor | None] | None,
    dtype: torch.dtype | None = None,
) -> HeadProblem:
    """The problem with its arguments checked; ``dtype`` of the head, by default that of the features."""
    n, m = features.n, features.m
    if targets.device != features.device:
        raise ValueError(
            f"targets: expected on the device of the features, {features.device}; got {targets.device}"
        )
    if start is None:
        c = loss.output_count(targets)
        check_memory(
            f"targets: labels up to {c - 1}, a head of {c:,} outputs,",
            8 * c * (m + 6 * n),
            None,
            features.device,
            "number the classes from 0 on",
        )
        weight = torch.zeros((c, m), dtype=torch.float64, device=features.device)
        bias: Tensor | None = torch.zeros(c, dtype=torch.float64, device=features.device)
    else:
        if not isinstance(start, (tuple, list)) or len(start) != 2:
            raise TypeError("start: expected (weight (C, m), bias (C,) or None)")
        w, b = start
        for part in (w, b):
            if part is not None:
                errors.is_a("start", part, Tensor, "(weight (C, m), bias (C,) or None), tensors")
                errors.is_dense("start", part)
                if part.is_complex():
                    raise TypeError(f"start: expected real numbers; got {part.dtype}")
        errors.is_a("start", w, Tensor, "(weight (C, m), bias (C,) or None), tensors")
        if w.dim() != 2 or w.shape[1] != m or (b is not None and b.shape != w.shape[:1]):
            raise ValueError(
                f"start: expected weight (C, {m}) and bias (C,); "
                f"got {tuple(w.shape)} and {None if b is None else tuple(b.shape)}"
            )
        if w.device != features.device:
            raise ValueError(
                f"start: expected on the device of the features, {features.device}; got {w.device}"
            )
        weight = w.detach().to(torch.float64)
        bias = None if b is None else b.detach().to(torch.float64)
        for part in (weight, bias):
            if part is not None and not bool(torch.isfinite(part.to(dtype or features.dtype)).all()):
                which = "do not fit in" if bool(torch.isfinite(part).all()) else "are not finite in"
                raise ValueError(f"start: the weights {which} {dtype or features.dtype}, the head's dtype")
    y = loss.prepare(targets, n, len(weight))
    copies = equal_rows(features.keys())
    infimum = infimum_with_copies(loss, y, copies)
    return HeadProblem(features, y, loss, weight, bias, infimum, dtype or features.dtype, copies=copies)
