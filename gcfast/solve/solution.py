"""The solved head: its loss, gap and duality gap, and how near to the start it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gcfast.losses import check_convex
from gcfast.solve.problem import HeadProblem


@dataclass
class Progress:
    """What a callback is told: after each point of the path, or each epoch of gd and sgd."""

    iteration: int
    regularization: float
    loss: float
    gap: float
    seconds: float
    fraction: float


@dataclass
class HeadSolution:
    """A head and what is known of it.

    ``weight`` (C, m), ``bias`` (C,) (None for a head without one), in the dtype of the features; ``loss`` is
    theirs as stored, evaluated in float64. ``infimum`` is L*, what no model whatever can beat; ``gap`` =
    loss - infimum (with weight decay: of the regularised problem, and then bounded by ``duality_gap``).
    ``duality_gap`` P - D certifies the nearest point: |U - U*| <= ``distance_bound`` * |U|, rounding to the
    dtype of the features included (``duality_gap`` is that of the head before it, but with weight decay).
    ``form`` says how K = H1 H1^T was held, ``path`` lists (lambda, loss), and ``residual`` is the Frobenius
    norm of the loss's gradient in the head.
    """

    weight: Tensor
    bias: Tensor | None
    loss: float
    infimum: float
    gap: float
    duality_gap: float
    distance_bound: float
    residual: float
    regularization: float
    method: str
    converged: bool
    interrupted: bool
    iterations: int
    products: int
    seconds: float
    peak_bytes: int
    reason: str
    form: str = ""
    path: list[tuple[float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        state = "interrupted" if self.interrupted else ("converged" if self.converged else "NOT converged")
        return (
            f"head by {self.method}: {state}; "
            f"loss {self.loss:.3e}, L* {self.infimum:.3e}, gap {self.gap:.3e}; "
            f"{self.iterations} iterations, {self.products} products, {self.seconds:.2f} s. {self.reason}"
        )


def evaluate_head(
    head_problem: HeadProblem,
    weight: Tensor,
    bias: Tensor | None,
    *,
    lam: float,
    gap_target: float,
    weight_decay: float,
    **fields: Any,
) -> HeadSolution:
    """Evaluate the head as it will be stored, in float64, and bound its distance from the minimiser of P."""
    dtype = head_problem.features.dtype
    unrounded = (weight, bias)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    z = head_problem.logits(weight, bias)
    value, residual, conjugate = head_problem.loss.terms(z, head_problem.targets)
    check_convex(head_problem.loss, z, head_problem.targets, seen=head_problem.start_logits)
    loss = float(value.mean())
    grad_w, grad_b = head_problem.transpose(residual / head_problem.n)
    duality_gap = distance = math.nan
    if lam > 0:
        center_w = torch.zeros_like(head_problem.weight) if weight_decay else head_problem.weight
        center_b = (
            None
            if head_problem.bias is None
            else (torch.zeros_like(head_problem.bias) if weight_decay else head_problem.bias)
        )
        u2 = _square(weight - center_w, None if bias is None or center_b is None else bias - center_b)
        rounding = 0.0
        if dtype != torch.float64 and not weight_decay:
            # at a small lambda rounding moves the gradient more than the head: certify the head before it
            before_w, before_b = unrounded
            moved_b = None if bias is None or before_b is None else bias - before_b
            rounding = math.sqrt(_square(weight - before_w, moved_b))
            z = head_problem.logits(before_w, before_b)
            value, residual, conjugate = head_problem.loss.terms(z, head_problem.targets)
            dual_w, dual_b = head_problem.transpose(residual / head_problem.n, remember=False)
            own_b = None if before_b is None or center_b is None else before_b - center_b
            own = _square(before_w - center_w, own_b)
        else:
            dual_w, dual_b, own = grad_w, grad_b, u2
        # D at the residual: mean(<r, z0> - loss*(r)) - |H1^T r / n|^2 / (2 lambda)
        z0 = torch.zeros_like(z) if weight_decay else head_problem.start_logits
        dual = float(((residual * z0).sum(1) - conjugate).mean()) - _square(dual_w, dual_b) / (2 * lam)
        duality_gap = max(float(value.mean()) + 0.5 * lam * own - dual, 0.0)
        distance = (math.sqrt(2 * duality_gap / lam) + rounding) / math.sqrt(u2) if u2 > 0 else 0.0
    gap = duality_gap if weight_decay else loss - head_problem.infimum
    return HeadSolution(
        weight=weight,
        bias=bias,
        loss=loss,
        infimum=head_problem.infimum,
        gap=gap,
        duality_gap=duality_gap,
        distance_bound=distance,
        residual=math.sqrt(_square(grad_w, grad_b)),
        regularization=lam,
        converged=gap <= gap_target,
        seconds=0.0,
        **fields,
    )


def _square(weight: Tensor, bias: Tensor | None) -> float:
    total = float((weight.to(torch.float64) ** 2).sum())
    return total if bias is None else total + float((bias.to(torch.float64) ** 2).sum())
