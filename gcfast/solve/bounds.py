"""Outer bounds of what is said of a head: its loss, and how far it is from the minimiser of P.

Logits are sums of m products: |fl(z) - z| <= gamma_(m+2) (|H| |V|^T + |b|) in any order of summation. What a
loss makes of that is its own (:class:`gcfast.losses.LossBounds`). For

    P(U) = (1/n) sum_i loss_i(z_i) + (lambda/2) |U|^2,  z = z0 + H1 U,
    D(r) = (1/n) sum_i (<r_i, z0_i> - loss_i*(r_i)) - |H1^T r / n|^2 / (2 lambda) <= min P

let r be the gradient at the outputs zh that were computed: loss_i*(r_i) = <r_i, zh_i> - loss_i(zh_i). Then no
large terms cancel, wherever z0 is:

    P(U) - D(r) = (1/n) sum_i (loss_i(z_i) - loss_i(zh_i) - <r_i, z_i - zh_i>)
                  + |H1^T r / n + lambda U|^2 / (2 lambda).

P is strongly convex, so |U - U*|^2 is at most 2/lambda of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast.features import Features
from gcfast.losses import UNIT, ConvexLoss, LossBounds, bounds_at, mean_above, nan_is_inf
from gcfast.proofs import ROOT, SMALLEST, bounded_logits, gamma, round_up

Head = tuple[Tensor, Tensor | None]  # weight (C, m), bias (C,), float64


@dataclass
class BoundedHead:
    """A head's loss: ``at`` are the bounds sample by sample, ``loss`` is no less than its mean.

    ``norms`` (n,) are no less than the row norms of H1.
    """

    weight: Tensor
    bias: Tensor | None
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
    for k, (w, b) in enumerate(heads):
        own = slice(k * c, (k + 1) * c)
        at = bounds_at(loss, z[:, own].contiguous(), targets, error[:, own].contiguous())
        found.append(BoundedHead(w, b, at, mean_above(at.value), float(at.computed.mean()), norms))
    return found


def bounded_gradients(
    features: Features, heads: Sequence[BoundedHead]
) -> list[tuple[Tensor, Tensor | None, float]]:
    """H1^T r / n of each head's residuals as (C, m), (C,), and a bound of its error in Frobenius norm.

    |fl(H1^T r) - H1^T r|_F <= gamma_n sum_i |h_i| |r_i|, and residuals off by d_i add sum_i |h_i| |d_i|.
    """
    n, m = features.n, features.m
    r = torch.cat([head.at.residual for head in heads], 1)
    total = torch.zeros((r.shape[1], m), dtype=torch.float64, device=features.device)
    for rows, columns, block in features.blocks():
        total[:, columns].addmm_(r[rows].mT, block)
    found, start, terms = [], 0, gamma(n + 4)
    for head in heads:
        own = slice(start, start + head.at.residual.shape[1])
        start = own.stop
        bias = None if head.bias is None else r[:, own].sum(0) / n
        of_rows = terms * row_norms(head.at.residual) + row_norms(head.at.residual_error)
        lost = SMALLEST * (n + float(head.norms.sum()) + float(row_norms(head.at.residual).sum()))
        of_sum = mean_above(nan_is_inf(head.norms * of_rows)) + math.sqrt(m + 1) * r.shape[1] * lost
        found.append((total[own] / n, bias, round_up(of_sum, 16)))
    return found


def bounded_gap(
    head: BoundedHead, slope: tuple[Tensor, Tensor | None, float], center: Head, lam: float
) -> tuple[float, float]:
    """No less than P(U) - D(r), U = head - center, and what it is as computed."""
    weight, bias, lost = slope
    u_bias = None if head.bias is None or center[1] is None else head.bias - center[1]
    u = head.weight - center[0]
    size = norm_above(weight, bias) + lam * norm_above(u, u_bias)
    gradient = norm_above(weight + lam * u, None if bias is None or u_bias is None else bias + lam * u_bias)
    most = (gradient + lost + 8 * UNIT * size) * (1 + 8 * UNIT) + 2.0**-1000
    gap = (mean_above(head.at.excess) + 0.5 * most * (most / lam)) * (1 + 8 * UNIT) + 2.0**-1070
    return (math.inf if math.isnan(gap) else gap), 0.5 * gradient * (gradient / lam)


def row_norms(x: Tensor) -> Tensor:
    """No less than the norms of the rows of x (n, C)."""
    return torch.linalg.vector_norm(x, dim=1) * (1 + 2 * gamma(x.shape[1] + 4)) + math.sqrt(x.shape[1]) * ROOT


def norm_above(*parts: Tensor | None) -> float:
    """No less than the Frobenius norm of all parts together, at any scale."""
    given = [p for p in parts if p is not None and p.numel()]
    scale = max((float(p.abs().amax()) for p in given), default=0.0)
    if scale == 0.0 or not math.isfinite(scale):
        return 0.0 if scale == 0.0 else math.inf
    count = sum(p.numel() for p in given)
    square = sum(float(((p / scale) ** 2).sum()) for p in given)
    norm = math.sqrt(square * (1 + 2 * gamma(count + 8)) + count * SMALLEST) * scale
    return norm * (1 + 2.0**-48) + 2.0**-1070
