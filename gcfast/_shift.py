"""The short route: lambda_min(G - s I) >= -||G - s I - L L^T||_2 for any L, hence a bound of lambda_min(G).

Only products are trusted. A blocked Cholesky factorisation forms, on its way, all the products that the
residual G - s I - L L^T is made of, so the residual costs a few per cent more than the factor. With
||G - H1 H1^T|| <= E it follows that sigma_min(H1)^2 >= s - E - residual: rank and singular value at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast import ops
from gcfast._products import (
    TINY,
    UNIT,
    StackedOnes,
    _up,
    add_product_,
    gamma,
    lower_gram,
    panel_slices,
    symmetric_row_sums,
    tiling,
)


@dataclass
class BoundedGram:
    """G (n x n, float64, lower triangle, zeros above) with ||G - H1 H1^T||_2 <= ``error``."""

    lower: Tensor
    error: float
    norm: float  # ||G||_inf, rounded up
    largest: float  # of |H1||H1|^T: its largest row sum, rounded up


def bounded_gram(h1: StackedOnes) -> BoundedGram:
    """H1 H1^T with a proved bound of its error; inf where it is not finite."""
    g = lower_gram(h1)
    tile, terms = tiling(g.device), h1.n + h1.columns
    rows = torch.zeros(h1.n, dtype=torch.float64, device=g.device)
    row_sums = torch.zeros_like(rows)
    # |P||P|^T 1 of the panels P add up to |H1||H1|^T 1
    for panel in h1.panels(dtype=h1.dtype):
        columns = ops.abs_products(panel)
        rows += ops.abs_products(panel, right=columns[1])[0]
        row_sums += columns[0]
    largest = _up(float(rows.amax()), terms)
    slices = panel_slices(h1.columns, tile.inner)
    # a flushed operand is at most TINY, its partner at most the largest row sum
    tiny = h1.n * h1.columns * TINY[torch.float64] * (2.0 + float(row_sums.amax()))
    error = _up(gamma(min(tile.inner, h1.columns) + slices + 2) * largest + tiny)
    norm = _up(float(symmetric_row_sums(g).amax()), 2 * h1.n)
    if not all(map(math.isfinite, (error, norm, largest))):
        error = norm = math.inf
    return BoundedGram(g, error, norm, largest)


def verified_cholesky(
    a: Tensor, shift: float = 0.0, out: Tensor | None = None
) -> tuple[Tensor, float] | None:
    """L, lower triangular, and a proved bound of ||A - shift I - L L^T||_2; None where a pivot fails.

    Args:
        a: (n, n) float32 or float64, its lower triangle; only the lower triangle is read.
        shift: taken off the diagonal.
        out: (n, n) of a's dtype, zero above the diagonal, for L.

    Left-looking, by tiles. Of tile (i, j), with W = sum_(k<j) L_ik L_jk^T computed by slices,
    S = fl(A_ij - W) gives L_ij, whatever its quality, and R = fl(S - L_ij L_jj^T) is what is left. The slices
    and their sums err by gamma_(inner + slices) |L||L|^T; S and R are rounded once, by u |S| and u |R|, where
    |S| <= |R| + |L_ij||L_jj|^T but for second order; on the diagonal the shift is rounded once more.
    """
    n, tile, unit = len(a), tiling(a.device), UNIT[a.dtype]
    low = torch.zeros_like(a) if out is None else out
    scratch = tile.scratch(a)
    row_sums = torch.zeros(n, dtype=torch.float64, device=a.device)
    for i0, i1, j0, j1 in tile.lower(n):
        s = torch.zeros((i1 - i0, j1 - j0), dtype=a.dtype, device=a.device)
        add_product_(s, low[i0:i1, :j0], low[j0:j1, :j0].mT, tile.inner, scratch)
        torch.sub(a[i0:i1, j0:j1], s, out=s)
        if i0 == j0:
            s.diagonal().sub_(shift)
            factor, info = torch.linalg.cholesky_ex(s)
            if int(info) != 0:
                return None
            low[i0:i1, j0:j1] = factor.tril_()
        else:
            low[i0:i1, j0:j1] = torch.linalg.solve_triangular(factor.mT, s, upper=True, left=False)
        product = torch.zeros_like(s)
        add_product_(product, low[i0:i1, j0:j1], low[j0:j1, j0:j1].mT, tile.inner, scratch)
        s -= product
        if i0 == j0:
            row_sums[i0:i1] += symmetric_row_sums(s.tril_())
        else:
            rows, columns = ops.abs_products(s)
            row_sums[i0:i1] += rows
            row_sums[j0:j1] += columns
    residual = _up(float(row_sums.amax()), 2 * n)
    products = _up(float(ops.gram_error_bound(low).amax()), 2 * n)  # ||  |L||L|^T  ||
    # entries of L are at most the largest of |L||L|^T or 1: that covers a flushed operand's partner
    tiny = 4 * n * n * TINY[a.dtype] * (2.0 + products)
    bound = _up(tile.gamma(n, a.dtype) * products + residual * (1 + 4 * unit) + 4 * unit * abs(shift) + tiny)
    return (low, bound) if math.isfinite(bound) else None


def least_eigenvalue(low: Tensor, vectors: int = 8, steps: int = 8) -> float:
    """Estimate, from above, of the least eigenvalue of L L^T: inverse iteration on a subspace."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn((len(low), min(vectors, len(low))), generator=generator, dtype=torch.float64)
    v = v.to(low.device, low.dtype)
    largest = 0.0
    for step in range(steps):
        v = torch.linalg.qr(v)[0]
        w = torch.linalg.solve_triangular(low, v, upper=False)
        # ||L^-1 v||: Rayleigh's quotient of the inverse
        new = float(torch.linalg.matrix_norm(w, 2)) ** 2
        if step > 1 and new <= 1.02 * largest:
            return 1.0 / new
        largest = max(largest, new)
        v = torch.linalg.solve_triangular(low.mT, w, upper=True)
    return 1.0 / largest if largest > 0 and math.isfinite(largest) else 0.0


@dataclass
class ShiftProof:
    """sigma_min(H1)^2 >= ``lower``; ``estimate`` of it; ``margin``: the share of the shift that is left."""

    lower: float
    estimate: float
    margin: float


def prove_by_shift(g: BoundedGram, sharp: bool, tell: Callable[[str, float], None]) -> ShiftProof | None:
    """Prove lambda_min(H1 H1^T) > 0, or None where that is beyond these bounds.

    The first shift is about twice what the proof will lose. ``sharp`` adds a second factorisation, shifted by
    most of the estimated lambda_min.
    """
    if not math.isfinite(g.error):
        return None
    tile, n = tiling(g.lower.device), len(g.lower)
    lost = g.error + tile.gamma(n) * g.largest
    shift = 2.2 * lost
    tell("Cholesky", 0.4)
    found = verified_cholesky(g.lower, shift)
    if found is None:
        return None
    low, residual = found
    lower = _down(shift, g.error, residual)
    best = ShiftProof(lower, shift, lower / shift)
    if sharp:
        tell("Cholesky, sharp", 0.7)
        estimate = shift + least_eigenvalue(low)
        best.estimate = estimate
        for share in (0.94, 0.8):  # the estimate is from above
            found = verified_cholesky(g.lower, share * estimate, low) if share * estimate > shift else None
            if found is not None:
                lower = _down(share * estimate, g.error, found[1])
                if lower > best.lower:
                    best = ShiftProof(lower, estimate, lower / (share * estimate))
                break
    return best if best.lower > 0 else None


def _down(shift: float, *errors: float) -> float:
    """shift - sum of errors, rounded down."""
    return shift - _up(sum(errors) + 8 * UNIT[torch.float64] * shift)
