"""Logits of a head with proved error bounds: by one pass over the features, at any scale of either."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcfast.features import Features
from gcfast.proofs.rounding import SMALLEST_NORMAL, gamma

SMALLEST = SMALLEST_NORMAL[torch.float64]
ROOT = 2.0**-511  # of it: the square of anything below may vanish


def bounded_logits(features: Features, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """z = H weight^T + bias (n, C), a bound of its error, and one of the norms of the rows of H1 (n,).

    weight (C, m) and bias (C,) in float64. Sums of m + 1 terms are off by at most gamma_(m+1) (|H| |weight|^T
    + |bias|) in any order, and by the least normal number for each product that underflows, or that number
    times the other operand where one is flushed. inf where the bound itself overflows.
    """
    n, m, c = features.n, features.m, len(weight)
    z = torch.zeros((n, c), dtype=torch.float64, device=features.device)
    size, square = torch.zeros((n, c + 1), dtype=torch.float64, device=features.device), z.new_zeros(n)
    w = weight.mT.contiguous()
    # the last column: |H| 1, for operands that are flushed
    of_w = torch.cat([w.abs(), torch.ones_like(w[:, :1])], 1)
    for rows, columns, block in features.blocks():
        z[rows].addmm_(block, w[columns])
        square[rows] += torch.linalg.vector_norm(block, dim=1) ** 2
        size[rows].addmm_(block.abs(), of_w[columns])
    if bias is not None:
        z, square = z + bias, square + 1.0
        size[:, :c] += bias.abs()
    terms = gamma(m + 4)
    flushed = SMALLEST * (m + 1 + of_w[:, :c].sum(0) + size[:, c:])
    error = size[:, :c] * (terms * (1 + 2 * terms)) + flushed * (1 + 2 * terms)
    norms = square.sqrt() * (1 + terms) + math.sqrt(m) * ROOT
    return z, torch.where(error.isnan(), math.inf, error), norms
