"""A proved lower bound of the least eigenvalue of G, by a Cholesky factor of G - s I.

lambda_min(G - s I) >= -||G - s I - L L^T||_2 for any L, and only products are trusted. A blocked Cholesky
factorisation forms, on its way, all the products that the residual G - s I - L L^T is made of, so the
residual costs a few per cent more than the factor. With
||G - H1 H1^T|| <= E it follows that sigma_min(H1)^2 >= s - E - residual: rank and singular value at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast import ops
from gcfast.features import FeaturesWithOnes
from gcfast.proofs import tiles
from gcfast.proofs.rounding import (
    SMALLEST_NORMAL,
    UNIT,
    add_product_,
    gamma,
    panel_slices,
    round_up,
    tiling,
)
from gcfast.proofs.tiles import Tiles
from gcfast.storage import Scratch


@dataclass
class BoundedGram:
    """G (n x n, float64, lower triangle) with ||G - H1 H1^T||_2 <= ``error``."""

    lower: Tiles
    error: float
    norm: float  # ||G||_inf, rounded up
    largest: float  # of |H1||H1|^T: its largest row sum, rounded up


@dataclass
class GramSweep:
    """One sweep over the panels of H1: the Gram and what bounds its error. It may stop between two panels."""

    lower: Tiles
    rows: Tensor  # |H1||H1|^T 1 so far
    row_sums: Tensor  # |H1| 1 so far
    column: int = 0  # where the next panel begins

    @classmethod
    def begin(
        cls, h1: FeaturesWithOnes, lower: Tiles | None = None, scratch: Scratch | None = None
    ) -> GramSweep:
        zero = torch.zeros(h1.n, dtype=torch.float64, device=h1.device)
        lower = Tiles(h1.n, torch.float64, h1.device, scratch) if lower is None else lower
        return cls(lower, zero, zero.clone())

    def run(
        self, h1: FeaturesWithOnes, after: Callable[[float], None] = lambda fraction: None
    ) -> BoundedGram:
        """The rest of the sweep; ``after`` is told the fraction done, after each panel."""
        for panel in h1.panels(self.column):
            tiles.add_gram_(self.lower, panel)
            # |P||P|^T 1 of the panels P add up to |H1||H1|^T 1
            row_sums, columns = ops.abs_products(panel)
            self.rows += ops.abs_products(panel, right=columns)[0]
            self.row_sums += row_sums
            self.column += panel.shape[1]
            after(self.column / h1.columns)
        tile, terms = tiling(h1.device), h1.n + h1.columns
        largest = round_up(float(self.rows.amax()), terms)
        slices = panel_slices(h1.columns, tile.slice_length)
        # a flushed operand is at most SMALLEST_NORMAL, its partner at most the largest row sum
        tiny = h1.n * h1.columns * SMALLEST_NORMAL[torch.float64] * (2.0 + float(self.row_sums.amax()))
        error = round_up(gamma(min(tile.slice_length, h1.columns) + slices + 2) * largest + tiny)
        norm = round_up(float(tiles.symmetric_row_sums(self.lower).amax()), 2 * h1.n)
        if not all(map(math.isfinite, (error, norm, largest))):
            error = norm = math.inf
        return BoundedGram(self.lower, error, norm, largest)


def bounded_gram(h1: FeaturesWithOnes, lower: Tiles | None = None) -> BoundedGram:
    """H1 H1^T and a proved bound of its error; inf where not finite. ``lower``: zeros, for the result."""
    return GramSweep.begin(h1, lower).run(h1)


def verified_cholesky(
    a: Tiles, shift: float, low: Tiles, on_progress: Callable[[float], None] = lambda fraction: None
) -> float | None:
    """Puts L into ``low``; a proved bound of ||A - shift I - L L^T||_2, or None where a pivot fails.

    Args:
        a: symmetric, float32 or float64.
        shift: taken off the diagonal.
        low: of a's size and dtype, zeros above the diagonal.

    By rows, so that a hopeless matrix is found out early. Of tile (i, j), with W = sum_(k<j) L_ik L_jk^T
    computed by slices, S = fl(A_ij - W) gives L_ij, whatever its quality, and R = fl(S - L_ij L_jj^T) is what
    is left. The slices and their sums err by gamma_(inner + slices) |L||L|^T; S and R are rounded once, by
    u |S| and u |R|, where |S| <= |R| + |L_ij||L_jj|^T but for second order; on the diagonal the shift is
    rounded once more.
    """
    n, tile, unit = a.n, tiling(a.device), UNIT[a.dtype]
    row_sums = torch.zeros(n, dtype=torch.float64, device=a.device)
    for i, span in enumerate(a.spans):
        for j in range(i + 1):
            s = torch.zeros_like(a[i, j])
            for k in range(j):
                add_product_(s, low[i, k], low[j, k].mT, tile.slice_length)
            torch.sub(a[i, j], s, out=s)
            if i == j:
                s.diagonal().sub_(shift)
                factor, info = torch.linalg.cholesky_ex(s)
                if int(info) != 0:
                    return None
                low[i, i].copy_(factor.tril_())
            else:
                low[i, j].copy_(torch.linalg.solve_triangular(low[j, j].mT, s, upper=True, left=False))
            product = torch.zeros_like(s)
            add_product_(product, low[i, j], low[j, j].mT, tile.slice_length)
            s -= product
            if i == j:
                rows, columns = ops.abs_products(s.tril_())
                row_sums[span] += rows + columns - s.diagonal().abs()
            else:
                rows, columns = ops.abs_products(s)
                row_sums[span] += rows
                row_sums[a.spans[j]] += columns
        on_progress((span.stop / n) ** 3)
    residual = round_up(float(row_sums.amax()), 2 * n)
    products = round_up(float(tiles.abs_gram_sums(low).amax()), 2 * n)  # ||  |L||L|^T  ||
    # entries of L are at most the largest of |L||L|^T or 1: that covers a flushed operand's partner
    tiny = 4 * n * n * SMALLEST_NORMAL[a.dtype] * (2.0 + products)
    bound = round_up(
        tile.gamma(n, a.dtype) * products + residual * (1 + 4 * unit) + 4 * unit * abs(shift) + tiny
    )
    return bound if math.isfinite(bound) else None


def least_eigenvalue(low: Tiles) -> float:
    """Estimate, from above, of the least eigenvalue of L L^T: 8 inverse iterations on 8 vectors at most."""
    generator = torch.Generator("cpu").manual_seed(0)
    v = torch.randn((low.n, min(8, low.n)), generator=generator, dtype=torch.float64, device="cpu")
    v = v.to(low.device, low.dtype)
    largest = 0.0
    for step in range(8):
        v = torch.linalg.qr(v)[0]
        w = tiles.solve_triangular(low, v)
        try:  # ||L^-1 v||: Rayleigh's quotient of the inverse
            new = float(torch.linalg.matrix_norm(w, 2)) ** 2
        except OverflowError:
            return 0.0
        if step > 1 and new <= 1.02 * largest:
            return 1.0 / new
        largest = max(largest, new)
        v = tiles.solve_triangular(low, w, transposed=True)
    return 1.0 / largest


@dataclass
class ShiftProof:
    """sigma_min(H1)^2 >= ``lower``; ``estimate`` of it; ``margin``: the share of the shift that is left."""

    lower: float
    estimate: float
    margin: float


def prove_by_shift(
    g: BoundedGram, sharp: bool, on_progress: Callable[[str, float], None], scratch: Scratch | None = None
) -> ShiftProof | None:
    """Prove lambda_min(H1 H1^T) > 0, or None where that is beyond these bounds.

    The first shift is about twice what the proof will lose. ``sharp`` adds a second factorisation, shifted by
    most of the estimated lambda_min. ``on_progress``: told a step and its fraction done.
    """
    a = g.lower
    lost = g.error + tiling(a.device).gamma(a.n) * g.largest
    shift = 2.2 * lost
    if not 0.0 < shift < math.inf:  # 0: of a Gram so small that its errors vanish
        return None
    low = Tiles(a.n, a.dtype, a.device, scratch)
    residual = verified_cholesky(a, shift, low, lambda fraction: on_progress("Cholesky", fraction))
    if residual is None:
        return None
    lower = _down(shift, g.error, residual)
    best = ShiftProof(lower, shift, lower / shift)
    if sharp:
        estimate = shift + least_eigenvalue(low)
        best.estimate = estimate
        for share in (0.94, 0.8):  # the estimate is from above
            if not share * estimate > shift:
                continue
            found = verified_cholesky(
                a, share * estimate, low, lambda fraction: on_progress("Cholesky, sharp", fraction)
            )
            if found is not None:
                lower = _down(share * estimate, g.error, found)
                if lower > best.lower:
                    best = ShiftProof(lower, estimate, lower / (share * estimate))
                break
    return best if best.lower > 0 else None


def prove_least_eigenvalue(k: Tensor) -> float:
    """A proved lower bound of lambda_min(k), 0.0 where no positive one is within reach.

    Args:
        k: (n, n) float64, symmetric as stored: its lower triangle is read. Finite.

    Nothing is said of the matrix that k may be a rounding of.
    """
    with ops.exact_products(k.device):
        low = k.tril()
        roots = low.diagonal().clamp(min=0).sqrt()  # |L||L|^T has entries of at most roots_i roots_j
        g = BoundedGram(Tiles.of(low), 0.0, 0.0, round_up(float(roots.amax() * roots.sum()), len(k)))
        proof = prove_by_shift(g, True, lambda step, fraction: None)
    return 0.0 if proof is None else proof.lower


def _down(shift: float, *errors: float) -> float:
    """shift - sum of errors, rounded down."""
    return shift - round_up(sum(errors) + 8 * UNIT[torch.float64] * shift)
