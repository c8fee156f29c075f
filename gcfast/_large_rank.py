"""The rank of one large matrix with proved bounds, by whatever is cheapest of four ways.

A Cholesky factor proves full rank (:mod:`gcfast._shift`). Where tol^2 is within reach of float64, counts of
eigenvalues of the Gram above and below it bound the rank on both sides. Beyond, an SVD says what is left to
prove: full rank by whitening (:mod:`gcfast._whitening`), anything else by a verified SVD. Small matrices have
kernels of their own (csrc/core/inertia.h).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcfast import ops, reference
from gcfast._products import (
    TINY,
    UNIT,
    StackedOnes,
    _up,
    add_product_,
    check_products,
    exact_products,
    tiling,
)
from gcfast._rank_proof import prove_full_rank
from gcfast._shift import BoundedGram, bounded_gram, prove_by_shift
from gcfast._tiles import Tiles


def _symmetric_row_sums(low: Tensor) -> Tensor:
    """Row sums of |S| for the symmetric S whose lower triangle is ``low``, zero above the diagonal."""
    rows, columns = ops.abs_products(low)
    return rows + columns - low.diagonal().abs()


def _unpack(factor: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """L (unit lower triangular), D's diagonal and subdiagonal, and the rows' order, from LAPACK's sytrf.

    LAPACK leaves the rows of earlier columns where they were when a later interchange moved them.
    """
    n = len(factor)
    low = factor.tril(-1)
    order = list(range(n))
    below = torch.zeros(n, dtype=factor.dtype, device=factor.device)
    subdiagonal = factor.diagonal(-1).clone()
    k, chosen = 0, pivots.tolist()
    pairs = []
    while k < n:
        single = chosen[k] > 0
        row, other = (k, chosen[k] - 1) if single else (k + 1, -chosen[k] - 1)
        if row != other:
            low[[row, other], :k] = low[[other, row], :k]
            order[row], order[other] = order[other], order[row]
        if not single:
            pairs.append(k)
        k += 1 if single else 2
    if pairs:
        at = torch.tensor(pairs, device=factor.device)
        below[at] = subdiagonal[at]
        low[at + 1, at] = 0.0
    low.diagonal().fill_(1.0)
    return low, factor.diagonal().clone(), below, order


def count_above(lower: Tensor, shift: float) -> tuple[int, float]:
    """(p, e): the symmetric matrix has p eigenvalues above shift - e, and at most p above shift + e; proved.

    LAPACK's Bunch-Kaufman factor of M = G - shift I only proposes: P M P^T = L D L^T + F with ||F|| <= e,
    bounded by products that were formed, and D has p positive eigenvalues (Sylvester, Weyl).

    Args:
        lower: (n, n) float64, its lower triangle, zeros above.
        shift: any finite number.

    ``e`` is inf where the factorisation is of no use.
    """
    n, unit, tile = len(lower), UNIT[torch.float64], tiling(lower.device)
    full = lower + lower.tril(-1).mT
    full.diagonal().sub_(shift)
    factor, pivots, info = torch.linalg.ldl_factor_ex(full)
    if int(info) != 0:
        return 0, math.inf
    low, diagonal, below, order = _unpack(factor, pivots)
    del factor
    # L D: a column and, in a pair, its neighbour; two products and a sum an entry
    scaled = low * diagonal
    scaled[:, :-1] += low[:, 1:] * below[:-1]
    scaled[:, 1:] += low[:, :-1] * below[:-1]
    full = full[order][:, order]
    spans = tile.spans(n)
    sums = torch.zeros(n, dtype=torch.float64, device=full.device)
    for r, c in ((r, c) for i, r in enumerate(spans) for c in spans[: i + 1]):
        product = torch.zeros_like(full[r, c])
        end = min(c.stop + 1, n)  # a pair may straddle the tile
        add_product_(product, scaled[r, :end], low[c, :end].mT, tile.inner)
        product = full[r, c] - product
        if r == c:
            sums[r] += _symmetric_row_sums(product.tril_())
        else:
            rows, columns = ops.abs_products(product)
            sums[r] += rows
            sums[c] += columns
    # |L||D||L|^T 1, from the right; |L D| <= |L||D| (1 + 2u), and so are the rounding errors of L D
    right = ops.abs_products(low)[1]
    middle = diagonal.abs() * right
    middle[:-1] += below[:-1].abs() * right[1:]
    middle[1:] += below[:-1].abs() * right[:-1]
    magnitude = _up(float(ops.abs_products(low, right=middle)[0].amax()), 4 * n)
    residual = _up(float(sums.amax()), 2 * n)
    size = _up(float(_symmetric_row_sums(lower).amax()), 2 * n) + abs(shift)
    tiny = 8 * n * n * TINY[torch.float64] * (2.0 + magnitude)
    lost = (tile.gamma(n) + 4 * unit) * magnitude + residual * (1 + 4 * unit) + 4 * unit * size + tiny
    # a pair's block is indefinite, one eigenvalue of each sign; rounding must not have hidden another case
    first, second, off = diagonal[:-1], diagonal[1:], below[:-1]
    paired = off != 0
    indefinite = off * off > (first * second) * (1 + 8 * unit)
    alone = torch.ones(n, dtype=torch.bool, device=full.device)
    alone[:-1] &= ~paired
    alone[1:] &= ~paired
    if not bool((indefinite | ~paired).all()) or not bool((diagonal[alone] != 0).all()):
        return 0, math.inf
    positive = int((diagonal[alone] > 0).sum()) + int(paired.sum())
    return (positive, _up(lost)) if math.isfinite(lost) else (0, math.inf)


def _top(g: BoundedGram, low: Tensor) -> tuple[float, float]:
    """Proved bounds of the largest eigenvalue of H H^T: Rayleigh's quotient, and a norm."""
    n = len(low)
    v = low.new_ones(n) + 0.5 * torch.arange(n, device=low.device).cos()  # of no particular direction
    quotient = 0.0
    for _ in range(6):
        v = v / torch.linalg.vector_norm(v)
        w = low @ v + low.mT @ v - low.diagonal() * v
        quotient, v = float(v @ w), w
    square = 2 * float(low.square().sum()) - float(low.diagonal().square().sum())
    frobenius = _up(math.sqrt(square), n * n)
    least = quotient - g.error - 8 * (n + 4) * UNIT[torch.float64] * g.norm
    return max(least, 0.0), min(g.norm, frobenius) + g.error


def _by_counts(g: BoundedGram, low: Tensor, below: float, above: float) -> tuple[int, int]:
    """(lower, upper): at least so many eigenvalues of H H^T exceed ``above``, at most so many ``below``."""
    n = len(low)
    lost = 4 * (g.error + tiling(low.device).gamma(n) * g.largest)
    shift = above + lost
    count, error = count_above(low, shift)
    lower = count if shift - _up(error + g.error + 4 * UNIT[torch.float64] * shift) >= above else 0
    if lower == n or below <= lost:
        return lower, n
    shift = below - lost
    count, error = count_above(low, shift)
    return lower, count if shift + _up(error + g.error) <= below * (1 - 8 * UNIT[torch.float64]) else n


def rank_of_large(x: Tensor, atol: Tensor, rtol: Tensor) -> tuple[Tensor, ...]:
    """What ``reference.batched_rank`` says of x (1, n, m), finite, atol and rtol (1,); mostly sooner."""
    h = x[0] if x.shape[1] <= x.shape[2] else x[0].mT
    n = len(h)
    absolute, relative = float(atol), float(rtol)

    def tolerance(top: float) -> float:
        return max(absolute, relative * top)

    def outcome(rank: int, lower: int, upper: int, least: float, largest: float) -> tuple[Tensor, ...]:
        counts = [torch.full((1,), k, device=x.device) for k in (rank, lower, upper)]
        return *counts, *(torch.full_like(atol, v) for v in (least, largest))

    lower, upper, largest = 0, n, math.inf
    with exact_products():
        check_products(x.device)
        low = torch.zeros((n, n), dtype=torch.float64, device=h.device)
        g = bounded_gram(StackedOnes(h, ones=False), Tiles.of(low))
        if math.isfinite(g.error) and 1e-250 < g.norm < 1e250:
            bottom, top = _top(g, low)
            largest = math.sqrt(top) * (1 + 1e-15)
            least_tolerance = tolerance(math.sqrt(bottom) * (1 - 1e-15))
            if least_tolerance >= largest:
                return outcome(0, 0, 0, 0.0, largest)
            above = tolerance(largest) ** 2 * (1 + 1e-14) + 1e-290
            short = prove_by_shift(g, True, lambda step, fraction: None)
            if short is not None and short.lower > above:
                return outcome(n, n, n, math.sqrt(short.lower) * (1 - 1e-15), largest)
            lower, upper = _by_counts(g, low, least_tolerance**2, above)
            if lower == upper:
                return outcome(
                    lower, lower, upper, math.sqrt(above) * (1 - 1e-15) if lower == n else 0.0, largest
                )
    del g, low
    values = torch.linalg.svdvals(h.to(torch.float64))
    rank = int((values > tolerance(float(values[0]))).sum())
    if rank == n:
        proof = prove_full_rank(h, ones=False)
        if proof.proved and proof.sigma_min_lower > tolerance(proof.sigma_max_upper) * (1 + 1e-15):
            return outcome(n, n, n, proof.sigma_min_lower, proof.sigma_max_upper)
    elif rank == lower > 0:
        return outcome(rank, lower, upper, 0.0, largest)
    estimate, *proved = reference.batched_rank(x, atol, rtol)
    proved[0].clamp_(min=lower)
    proved[1].clamp_(max=upper)
    return estimate.clamp(lower, upper), *proved
