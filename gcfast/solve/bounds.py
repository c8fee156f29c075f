"""Outer bounds of what is said of a head: its loss, and how far it is from the minimiser of P.

Logits are sums of m products: |fl(z) - z| <= gamma_(m+2) (|H| |V|^T + |b|) in any order of summation. What a
loss makes of that is its own (:class:`gcfast.losses.LossBounds`). For

    P(U) = (1/n) sum_i loss_i(z_i) + (lambda/2) |U|^2,  z = z0 + H1 U,
    D(r) = (1/n) sum_i (<r_i, z0_i> - loss_i*(r_i)) - |H1^T r / n|^2 / (2 lambda) <= min P

let r be the gradient at the outputs zh that were computed: loss_i*(r_i) = <r_i, zh_i> - loss_i(zh_i). Then no
large terms cancel, wherever z0 is:

    P(U) - D(r) = (1/n) sum_i (loss_i(z_i) - loss_i(zh_i) - <r_i, z_i - zh_i>)
                  + |H1^T r / n + lambda U|^2 / (2 lambda).

P is strongly convex, so |U - U*|^2 is at most 2/lambda of P(U) - min P. Nor is that more than P(U) - L*,
which is known still where features or lambda are so extreme that rounding alone makes a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast.features import Features
from gcfast.losses import ConvexLoss, LossBounds, above, bounds_at, mean_above, nan_is_inf
from gcfast.proofs import ROOT, SMALLEST, bounded_logits, gamma, round_up

Head = tuple[Tensor, Tensor | None]  # weight (C, m), bias (C,), float64


@dataclass
class BoundedHead:
    """A head's loss: ``at`` are the bounds sample by sample, ``loss`` is no less than its mean.

    ``norms`` (n,) are no less than the row norms of H1.
    """

    head: Head
    at: LossBounds
    loss: float
    computed: float
    norms: Tensor


def bounded_heads(
    features: Features, heads: Sequence[Head], loss: ConvexLoss, targets: Tensor
) -> list[BoundedHead]:
    """Losses of some heads of equal shape by one pass over the features."""
    weight = torch.cat([w for w, _ in heads])
    biases = [b for _, b in heads if b is not None]
    bias = torch.cat(biases) if biases else None
    z, error, norms = bounded_logits(features, weight, bias)
    c = len(heads[0][0])
    found = []
    for head, own, off in zip(heads, z.split(c, 1), error.split(c, 1), strict=True):
        at = bounds_at(loss, own.contiguous(), targets, off.contiguous())
        found.append(BoundedHead(head, at, mean_above(at.value), float(at.computed.mean()), norms))
    return found


def bounded_gradients(
    features: Features, heads: Sequence[BoundedHead]
) -> list[tuple[Tensor, Tensor | None, float]]:
    """H1^T r / n of each head's residuals as (C, m), (C,), and a bound of its error in Frobenius norm.

    A sum of n products over n is off by gamma_(n+1) (1/n) sum_i |h_i| |r_i|, and residuals off by d_i add
    (1/n) sum_i |h_i| |d_i|. Each product that underflows may cost the least normal number, and so may the
    quotient; where an operand is flushed, it is that number times the other one, which is far less than what
    ROOT has added to the norms.
    """
    n, m = features.n, features.m
    r = torch.cat([head.at.residual for head in heads], 1)
    total = torch.zeros((r.shape[1], m), dtype=torch.float64, device=features.device)
    for rows, columns, block in features.blocks():
        total[:, columns].addmm_(r[rows].mT, block)
    found, terms = [], gamma(n + 1)
    sizes = [head.at.residual.shape[1] for head in heads]
    for head, c, own, biases in zip(heads, sizes, total.split(sizes), r.sum(0).split(sizes), strict=True):
        of_rows = terms * row_norms(head.at.residual) + row_norms(head.at.residual_error)
        of_sum = mean_above(nan_is_inf(head.norms * of_rows)) + math.sqrt(c * (m + 1)) * 2 * SMALLEST
        found.append((own / n, None if head.head[1] is None else biases / n, round_up(of_sum)))
    return found


def bounded_gap(
    head: BoundedHead, slope: tuple[Tensor, Tensor | None, float], center: Head, lam: float
) -> tuple[float, float]:
    """No less than P(U) - D(r), U = head - center, and what it is as computed.

    slope + lambda U takes three roundings in each entry. With one of |U|, two of the size and one of its
    product with gamma they are seven; lambda U may underflow. So may the last term of the gap, and what that
    hides is less than the least normal number.
    """
    weight, bias, lost = slope
    u, u_bias = difference(head.head, center)
    size = norm_above(weight, bias) + lam * norm_above(u, u_bias)
    gradient = norm_above(weight + lam * u, None if bias is None or u_bias is None else bias + lam * u_bias)
    underflow = SMALLEST * math.sqrt(weight.numel() + len(weight))
    most = above(above(gradient + lost + gamma(7) * size) + underflow)
    gap = above(mean_above(head.at.excess) + SMALLEST + above(0.5 * most * (most / lam)))
    return gap, 0.5 * gradient * (gradient / lam)


def objective_above(head: BoundedHead, center: Head, lam: float) -> float:
    """No less than P(U), U = head - center. Of its last term two roundings, or an underflow."""
    size = norm_above(*difference(head.head, center))
    return above(head.loss + above(0.5 * (size * (lam * size))) + SMALLEST)


def difference(head: Head, center: Head) -> Head:
    """What lies between two heads."""
    return head[0] - center[0], None if head[1] is None or center[1] is None else head[1] - center[1]


def row_norms(x: Tensor) -> Tensor:
    """No less than the norms of the rows of x (n, C)."""
    c = x.shape[1]
    return torch.linalg.vector_norm(x, dim=1) * (1 + gamma(c + 4)) + math.sqrt(c) * ROOT


def norm_above(*parts: Tensor | None) -> float:
    """No less than the Frobenius norm of all parts together, at any scale."""
    x = torch.cat([p.flatten() for p in parts if p is not None])
    largest = x.abs().amax() if len(x) else x.sum()
    if not bool(largest):
        return 0.0
    norm = above(float(row_norms(x[None] / largest)) * float(largest))
    return math.inf if math.isnan(norm) else norm


def norm_below(*parts: Tensor | None) -> float:
    """No more than it, where each entry may have been rounded once.

    Of k entries :func:`norm_above` makes 3/2 k + 14 roundings, and three more follow: at most 20 k.
    """
    count = sum(p.numel() for p in parts if p is not None)
    return norm_above(*parts) * (1 - gamma(20 * count)) - SMALLEST
