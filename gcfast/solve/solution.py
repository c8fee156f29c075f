"""The solved head: its loss, gap and duality gap, and how near to the start it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gcfast.losses import above, check_convex, gap_above, infimum_with_copies
from gcfast.solve.bounds import (
    Head,
    bounded_gap,
    bounded_gradients,
    difference,
    norm_above,
    norm_below,
    objective_above,
)
from gcfast.solve.problem import HeadProblem


@dataclass
class Progress:
    """What a callback is told, as computed: after each point of the path, or each epoch of gd and sgd."""

    iteration: int
    regularization: float
    loss: float
    gap: float
    seconds: float
    fraction: float


@dataclass
class HeadSolution:
    """A head and what is known of it.

    ``weight`` (C, m), ``bias`` (C,) (None for a head without one): of a model in the dtype of its head,
    else in that of the features. What follows is bounded outward, the rounding of its own evaluation
    included, and inf where no finite bound is known: ``loss`` is no less than theirs as stored, ``infimum``
    no more than L*, which no model whatever can beat (where features were given, no head upon them);
    ``gap`` >= L - L* (with weight decay: of the regularised problem that was asked for, then the same as
    ``duality_gap``). ``duality_gap`` >= P - D certifies the nearest point: |U - U*| <= ``distance_bound`` *
    |U|, the rounding to that dtype included (``duality_gap`` is that of the head before it, but with weight
    decay); both are inf where there is no lambda. ``form`` says how K = H1 H1^T was held, ``path`` lists
    (lambda, loss), and ``residual`` is the Frobenius norm of the loss's gradient in the head, as computed.
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
    reason: str,
    **fields: Any,
) -> HeadSolution:
    """Bound the loss of the head as it will be stored, and its distance from the minimiser of P.

    With weight decay P is what was asked for, whatever lambda the path got to.
    """
    dtype = head_problem.dtype
    arrived, lam = lam == weight_decay, weight_decay or lam
    stored, before = head_problem.bounded(weight, bias)
    check_convex(head_problem.loss, stored.at.outputs, head_problem.targets, seen=head_problem.start_logits)
    zero = torch.zeros_like
    center: Head = (head_problem.weight, head_problem.bias)
    if weight_decay:
        center, before = (zero(center[0]), None if center[1] is None else zero(center[1])), stored
    # at a small lambda rounding moves the gradient more than the head: certify the head before it
    heads = [stored] if before is stored else [stored, before]
    slopes = bounded_gradients(head_problem.features, heads)
    duality_gap = distance = math.inf
    computed = stored.computed - head_problem.infimum
    if lam > 0:
        duality_gap, certain = bounded_gap(before, slopes[-1], center, lam)
        least = gap_above(objective_above(before, center, lam), head_problem.infimum)
        duality_gap, certain = min(duality_gap, least), min(certain, least)
        moved = norm_above(*difference(stored.head, before.head))
        far = above(above(math.sqrt(2 * duality_gap)) / math.sqrt(lam) + moved)
        length = norm_below(*difference(stored.head, center))
        distance = above(far / length) if 0 < length < math.inf else math.inf
        computed = certain if weight_decay else computed
    gap = duality_gap if weight_decay else gap_above(stored.loss, head_problem.infimum)
    if not (gap <= gap_target or fields.get("interrupted")):
        if not _is_finite(stored.head):
            reason = f"the head does not fit in {dtype}: scale the features, or give them in torch.float64"
        elif computed <= gap_target:
            reason = (
                f"as computed the gap is {computed:.3g}, within the target; rounding may hide "
                f"{gap - computed:.3g} more: scale the features or the targets, start nearer to zero, or ask "
                "for a larger target_gap"
            )
        elif weight_decay and arrived and fields.get("method") == "nearest":
            reason = f"no step went further down, at a gap of {gap:.3g}"
    return HeadSolution(
        weight=stored.head[0].to(dtype),
        bias=None if stored.head[1] is None else stored.head[1].to(dtype),
        loss=stored.loss,
        infimum=head_problem.infimum,
        gap=gap,
        duality_gap=duality_gap,
        distance_bound=distance,
        residual=norm_above(*slopes[0][:2]),
        regularization=lam,
        converged=gap <= gap_target,
        seconds=math.nan,  # solve_head knows how many
        reason=reason,
        **fields,
    )


def beyond_the_head(head_problem: HeadProblem, found: HeadSolution, copies: list[list[int]]) -> None:
    """Measure ``found`` by L* of all models, which must give the same to ``copies`` alone.

    The head problem's own is of all samples with equal features, which another body might tell apart.
    """
    infimum = infimum_with_copies(head_problem.loss, head_problem.targets, copies)
    if infimum >= found.infimum:
        return
    found.infimum = infimum
    if not head_problem.weight_decay:
        of_the_head, found.gap = found.gap, gap_above(found.loss, infimum)
        if found.converged and not found.gap <= head_problem.target_gap:
            i, j = next(group for group in head_problem.copies if group not in copies)[:2]
            found.converged = False
            found.reason = (
                f"samples {i} and {j} have equal features, and other inputs as far as is known: the head is "
                f"within {of_the_head:.3g} of what any head can reach, other hidden weights may reach more"
            )


def no_worse_than_the_start(head_problem: HeadProblem, found: HeadSolution) -> HeadSolution:
    """``found``, or the head that the work began at, where rounding makes something worse of a better one."""
    if found.converged or found.loss < head_problem.infimum:  # that is wrong, and so is the start's gap
        return found
    bias = head_problem.bias
    still = torch.zeros_like(head_problem.weight), None if bias is None else torch.zeros_like(bias)
    kept = ("method", "interrupted", "iterations", "products", "peak_bytes", "reason", "form", "path")
    start = evaluate_head(
        head_problem,
        *head_problem.head(*still),
        lam=found.regularization,
        gap_target=head_problem.target_gap,
        weight_decay=head_problem.weight_decay,
        **{name: getattr(found, name) for name in kept},
    )
    start.reason = found.reason
    return start if start.gap < found.gap or not _is_finite((found.weight, found.bias)) else found


def _is_finite(head: Head) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in head if part is not None)
