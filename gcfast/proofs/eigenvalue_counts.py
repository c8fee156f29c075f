"""How many eigenvalues of a symmetric matrix lie above a shift, proved by Sylvester's law of inertia."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcfast import ops
from gcfast.proofs.rounding import SMALLEST_NORMAL, UNIT, add_product_, round_up, tiling


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
        single = chosen[k] >= 1  # rows are counted from 1, those of a pair below 0
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
        add_product_(product, scaled[r, :end], low[c, :end].mT, tile.slice_length)
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
    magnitude = round_up(float(ops.abs_products(low, right=middle)[0].amax()), 4 * n)
    residual = round_up(float(sums.amax()), 2 * n)
    size = round_up(float(_symmetric_row_sums(lower).amax()), 2 * n) + abs(shift)
    tiny = 8 * n * n * SMALLEST_NORMAL[torch.float64] * (2.0 + magnitude)
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
    return (positive, round_up(lost)) if math.isfinite(lost) else (0, math.inf)
