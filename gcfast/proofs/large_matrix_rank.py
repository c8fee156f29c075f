"""The rank of one large matrix with proved bounds, by whatever is cheapest of four ways.

A Cholesky factor proves full rank (:mod:`gcfast.proofs.shift`). Where tol^2 is within reach of float64,
counts of eigenvalues of the Gram above and below it bound the rank on both sides. Beyond, an SVD says what is
left to prove: full rank by whitening (:mod:`gcfast.proofs.whitening`), anything else by a verified SVD. Small
matrices have kernels of their own (csrc/core/inertia.h).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast import ops, reference
from gcfast.features import FeaturesWithOnes
from gcfast.proofs.eigenvalue_counts import count_above
from gcfast.proofs.full_rank import prove_full_rank
from gcfast.proofs.rounding import UNIT, round_up, tiling
from gcfast.proofs.scaling import lower_power, scaled_matrix, upper_power
from gcfast.proofs.shift import BoundedGram, bounded_gram, prove_by_shift
from gcfast.proofs.tiles import Tiles


def _top(g: BoundedGram, low: Tensor) -> tuple[float, float]:
    """Proved bounds of the largest eigenvalue of H H^T: Rayleigh's quotient, and a norm."""
    n = len(low)
    v = low.new_ones(n) + 0.5 * torch.arange(n, device=low.device).cos()  # of no particular direction
    for _ in range(6):
        v = v / torch.linalg.vector_norm(v)
        w = low @ v + low.mT @ v - low.diagonal() * v
        quotient, v = float(v @ w), w
    square = 2 * float(low.square().sum()) - float(low.diagonal().square().sum())
    frobenius = round_up(math.sqrt(square), n * n)
    least = quotient - g.error - 8 * (n + 4) * UNIT[torch.float64] * g.norm
    return max(least, 0.0), min(g.norm, frobenius) + g.error


def _by_counts(g: BoundedGram, low: Tensor, below: float, above: float) -> tuple[int, int]:
    """(lower, upper): at least so many eigenvalues of H H^T exceed ``above``, at most so many ``below``."""
    n = len(low)
    lost = 4 * (g.error + tiling(low.device).gamma(n) * g.largest)
    shift = above + lost
    count, error = count_above(low, shift)
    lower = count if shift - round_up(error + g.error + 4 * UNIT[torch.float64] * shift) >= above else 0
    if lower == n or below <= lost:
        return lower, n
    shift = below - lost
    count, error = count_above(low, shift)
    return lower, count if shift + round_up(error + g.error) <= below * (1 - 8 * UNIT[torch.float64]) else n


def rank_of_large(x: Tensor, atol: Tensor, rtol: Tensor) -> tuple[Tensor, ...]:
    """What ``reference.batched_rank`` says of x (1, n, m), finite, atol and rtol (1,); mostly sooner."""
    with ops.exact_products(x.device):
        h, exponent = scaled_matrix(x[0] if x.shape[1] <= x.shape[2] else x[0].mT)
        absolute, relative = _times_power(float(atol), -exponent), float(rtol)
        # what the scaling may have lost, of a singular value and of atol
        lost = math.sqrt(x.numel()) * 2.0**-1073 if exponent else 0.0
        found = _rank_of_scaled(h, absolute, relative, lost)
        if found.decided:
            rank, lower, upper = found.rank, found.lower, found.upper
            counts = [torch.full((1,), k, device=x.device) for k in (rank, lower, upper)]
            least = lower_power(max(found.least - lost, 0.0), exponent)
            largest = upper_power(found.largest + lost, exponent)
            return *counts, *(torch.full_like(atol, v) for v in (least, largest))
        del h
        estimate, *proved = reference.batched_rank(x, atol, rtol)
    proved[0].clamp_(min=found.lower)
    proved[1].clamp_(max=found.upper)
    return estimate.clamp(found.lower, found.upper), *proved


class _Found(NamedTuple):
    """The rank, its bounds and those of the singular values, where ``decided``; else what the rank's are."""

    decided: bool
    rank: int
    lower: int
    upper: int
    least: float
    largest: float


def _rank_of_scaled(h: Tensor, absolute: float, relative: float, lost: float) -> _Found:
    """Of h (n, m), n <= m, whose entries' products are far from under- and overflow."""

    def tolerance(top: float) -> float:
        return max(absolute, relative * top)

    n = len(h)
    lower, upper, largest = 0, n, math.inf
    low = torch.zeros((n, n), dtype=torch.float64, device=h.device)
    g = bounded_gram(FeaturesWithOnes(h, ones=False), Tiles.of(low))
    if math.isfinite(g.error) and g.norm > 0:
        bottom, top = _top(g, low)
        largest = math.sqrt(top) * (1 + 1e-15)
        least_tolerance = tolerance(math.sqrt(bottom) * (1 - 1e-15))
        if least_tolerance >= largest + lost:
            return _Found(True, 0, 0, 0, 0.0, largest)
        above = tolerance(largest) ** 2 * (1 + 1e-14) + 1e-290
        short = prove_by_shift(g, True, lambda step, fraction: None)
        if short is not None and short.lower > above:
            return _Found(True, n, n, n, math.sqrt(short.lower) * (1 - 1e-15), largest)
        lower, upper = _by_counts(g, low, least_tolerance**2, above)
        if lower == upper:
            least = math.sqrt(above) * (1 - 1e-15) if lower == n else 0.0
            return _Found(True, lower, lower, upper, least, largest)
    del g, low
    values = torch.linalg.svdvals(h.to(torch.float64))
    rank = int((values > tolerance(float(values[0]))).sum())
    if rank == n:
        proof = prove_full_rank(h, ones=False)
        highest = tolerance(proof.sigma_max_upper) * (1 + 1e-15)
        if proof.proved and proof.sigma_min_lower * (1 - 1e-15) > highest + 4 * lost:
            return _Found(True, n, n, n, proof.sigma_min_lower, proof.sigma_max_upper)
    return _Found(rank == lower > 0, rank, lower, upper, 0.0, largest)


def _times_power(x: float, exponent: int) -> float:
    """x 2^exponent, off by 2^-1075 at most; inf where it overflows."""
    try:
        return math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
