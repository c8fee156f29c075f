"""Proof of full row rank by whitening, for condition numbers up to about 1e13.

For any X, rank(X H1) = n implies rank(H1) = n. X = L^-1 comes from the Cholesky factor of the Gram, shifted
and repeated where that is ill-conditioned (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, 2020). With
Q = fl(X H1), G2 = fl(Q Q^T):

    sigma_min(X H1) >= sqrt(1 - ||G2 - I|| - ||G2 - Q Q^T||) - ||Q - X H1||,
    sigma_min(H1)   >= sigma_min(X H1) / ||X||.

||Q - X H1|| <= gamma || |X||H1| || is what ends this near a condition number of 1e11; from there on Q comes
from a doubled product. The sharp bound on ||X|| comes from a proof on well-scaled data: t I - X X^T >=
-residual, so that ||X||^2 <= t + residual. Unlike a shift of the Gram it loses nothing to the square of the
condition number.
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
    add_exact_product_,
    add_product_,
    gamma,
    panel_slices,
    round_up,
    tiling,
)
from gcfast.proofs.shift import verified_cholesky
from gcfast.proofs.tiles import Tiles
from gcfast.storage import Scratch

INNER32 = 256  # of float32 products: gamma stays 1.5e-5 whatever m is


def cholesky_inverse(
    g: Tiles,
    start_shift: float,
    scratch: Scratch | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Tiles, float] | None:
    """X = L^-1 with L L^T = g + shift I; the least shift of 0, s, 100 s, ... that lets Cholesky through."""
    scale = float(g.diagonal().amax())
    low, shift = Tiles(g.n, g.dtype, g.device, scratch), 0.0
    for _ in range(6):
        # a pivot at rounding level means the factor is noise from there on: shift instead
        least = 0.0 if shift else 4 * g.n * UNIT[torch.float64] * scale
        if tiles.cholesky(g, shift, low, lambda fraction: on_progress(0.5 * fraction), least):
            return tiles.invert_(low, lambda fraction: on_progress(0.5 + 0.5 * fraction)), shift
        shift = start_shift * scale if shift == 0.0 else shift * 100.0
    return None


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two next above each of ``largest`` (k,), float64; at least 2^-1000, inf above 2^1023."""
    largest = largest.clamp(min=2.0**-1000)
    return largest / torch.frexp(largest)[0]  # the quotient is representable, so division gives it exactly


def split(a: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """a = high + low exactly; high in whole multiples of 2^-bits scale, |low| <= 2^-bits scale / 2.

    ``scale``: powers of two that broadcast against a, |a| <= scale.
    """
    unit = scale * 2.0**-bits
    high = torch.round(a / unit) * unit
    return high, a - high


def doubled_bits(k: int) -> int:
    """Bits a factor for which products of inner length k, of the split's high parts, are exact in float64."""
    return (53 - (k - 1).bit_length()) // 2  # k 4^bits <= 2^53


def times_doubled(x: Tiles, b: Tensor, maxima: Tensor) -> Tensor:
    """x b for lower triangular x as if in about 1.4 times the digits: see :func:`doubled_error`.

    Both factors are split as in Ozaki, Ogita, Oishi, Rump (2012): the product of the high parts is exact in
    any order of summation, the rest is 2^-bits as large and rounded as any product.

    Args:
        maxima: ``tiles.row_maxima(x)``.
    """
    inner, bits = tiling(x.device).slice_length, doubled_bits(x.n)
    b_high, b_low = split(b, power_of_two(b.abs().amax(0)), bits)
    out, scale = torch.empty_like(b), power_of_two(maxima)[:, None]
    for i, rows in enumerate(x.spans):
        high, rest = torch.zeros_like(b[rows]), torch.zeros_like(b[rows])
        for k in range(i + 1):
            columns = x.spans[k]
            x_high, x_low = split(x[i, k], scale[rows], bits)
            add_exact_product_(high, x_high, b_high[columns])
            add_product_(rest, x_high, b_low[columns], inner)
            add_product_(rest, x_low, b[columns], inner)
        torch.add(high, rest, out=out[rows])
    return out


def doubled_error(x: Tiles, columns: int, x_rows: Tensor, h_columns: float, h_scales: float) -> float:
    """Bound of ||fl(X H1) - X H1||_2 for :func:`times_doubled`, but for the last rounding, u ||Q||_F.

    The rounded part is |X_high||H_low| + |X_low||H1| <= delta (|X_high| 1) c^T + delta r (1^T |H1|), with
    r and c the scales of rows and columns, delta = 2^-bits / 2: two matrices of rank one.

    Args:
        columns: of H1.
        x_rows: |X| 1.
        h_columns: Euclidean norm of 1^T |H1|.
        h_scales: Euclidean norm of c.
    """
    n, tile = x.n, tiling(x.device)
    delta = 0.5 * 2.0 ** -doubled_bits(n)
    r = power_of_two(tiles.row_maxima(x))
    high = float((x_rows + n * delta * r).norm())
    rounded = delta * (high * h_scales + float(r.norm()) * h_columns)
    # two products added up in one tile: twice the slices
    factor = gamma(min(n, tile.slice_length) + 2 * tile.slices(n) + 2)
    return round_up(factor * round_up(rounded, 4 * (n + columns)))


@dataclass
class Whitened:
    gram: Tiles
    distance: float  # ||G2 - I||
    product_error: float  # bound on ||G2 - Q Q^T||
    witness_error: float  # bound on ||Q - X H1||
    margin: float
    doubled: bool


@dataclass
class WhiteningSweep:
    """One sweep over the panels of H1: Q = X H1, G2 = Q Q^T and its error. It may stop between two panels."""

    gram: Tiles
    rows: Tensor  # |Q||Q|^T 1 so far
    witness_error: float  # but for the rounding of Q itself
    tiny: float
    doubled: bool
    column: int = 0  # where the next panel begins

    @classmethod
    def begin(
        cls,
        h1: FeaturesWithOnes,
        x: Tiles,
        dtype: torch.dtype,
        plain: float = 1e-2,
        scratch: Scratch | None = None,
    ) -> WhiteningSweep | None:
        """Q comes from a doubled product where a plain one would lose ``plain`` or more.

        None, before any product, where even that loses all of the margin, which is 1.
        """
        n, columns, tile = h1.n, h1.columns, tiling(x.device)
        terms = n + columns
        x_rows, x_columns = tiles.abs_products(x)
        # || |X||H1| || from its row and column sums. Underflow in them does not count: where Q is nearly
        # orthonormal, both are far above it.
        h_rows, xh_one = h1.abs_products(left=x_columns)
        xh_inf = float(tiles.abs_products(x, right=h_rows)[0].amax())
        partner = 2.0 + float(x_rows.amax()) + float(h_rows.amax())  # of an operand that is flushed to zero
        tiny = 4 * n * (n + columns) * SMALLEST_NORMAL[torch.float64] * partner
        witness_error = round_up(tile.gamma(n) * round_up(math.sqrt(xh_one * xh_inf), 2 * terms) + tiny)
        doubled = not witness_error < plain
        if doubled:
            sums, scales = 0.0, 0.0
            for panel in h1.panels():
                sums += float(ops.abs_products(panel)[1].square().sum())
                scales += float(power_of_two(panel.abs().amax(0)).square().sum())
            norms = (round_up(math.sqrt(s), 2 * terms) for s in (sums, scales))
            witness_error = round_up(doubled_error(x, columns, x_rows, *norms) + tiny)
        if not witness_error < 1.0:
            return None
        gram = Tiles(n, dtype, x.device, scratch)
        rows = torch.zeros(n, dtype=torch.float64, device=x.device)
        return cls(gram, rows, witness_error, tiny, doubled)

    def run(
        self, h1: FeaturesWithOnes, x: Tiles, after: Callable[[float], None] = lambda fraction: None
    ) -> Whitened:
        """The rest of the sweep; ``after`` is told the fraction done, after each panel."""
        g2, n, columns = self.gram, h1.n, h1.columns
        tile, terms, dtype = tiling(x.device), n + columns, g2.dtype
        inner = INNER32 if dtype == torch.float32 else tile.slice_length
        maxima = tiles.row_maxima(x) if self.doubled else None
        for panel in h1.panels(self.column):
            q = tiles.times(x, panel) if maxima is None else times_doubled(x, panel, maxima)
            q = q.to(dtype)
            self.rows += ops.gram_error_bound(q)
            tiles.add_gram_(g2, q, inner)
            self.column += panel.shape[1]
            after(self.column / columns)
        qq = round_up(float(self.rows.amax()), terms)  # |Q||Q|^T is symmetric: its largest row sum is enough
        tiny = 4 * n * columns * SMALLEST_NORMAL[dtype] * (2.0 + qq)
        terms_of_one = min(inner, columns) + panel_slices(columns, inner)
        product_error = round_up(gamma(terms_of_one + 2, dtype) * qq + tiny)
        diagonal = g2.diagonal().to(torch.float64)
        witness_error = self.witness_error
        if (
            self.doubled or dtype != torch.float64
        ):  # Q was rounded once more; ||Q||_F^2: the trace of its Gram
            square = round_up(max(float(diagonal.sum()), 0.0) + n * product_error, n)
            unit = UNIT[torch.float64] * self.doubled + UNIT[dtype] * (dtype != torch.float64)
            lost = self.tiny + n * columns * SMALLEST_NORMAL[dtype]
            witness_error = round_up(witness_error + 1.01 * unit * math.sqrt(square) + lost)
        g2.set_diagonal_(torch.zeros_like(diagonal))
        residual = tiles.symmetric_row_sums(g2) + (diagonal - 1.0).abs()
        g2.set_diagonal_(diagonal)
        distance = round_up(float(residual.amax()), 2 * terms)
        inside = 1.0 - distance - product_error
        margin = math.sqrt(max(inside, 0.0)) * (1 - 1e-15) - witness_error  # positive, or no proof
        if not all(map(math.isfinite, (distance, product_error, witness_error))):
            margin = -math.inf
        return Whitened(g2, distance, product_error, witness_error, margin, self.doubled)


def norm_upper(x: Tiles) -> float:
    """Proved upper bound of ||x||_2: sqrt(||x||_1 ||x||_inf)."""
    rows, columns = tiles.abs_products(x)
    return round_up(math.sqrt(float(rows.amax()) * float(columns.amax())), 2 * x.n)


def norm_sharp(x: Tiles) -> float:
    """Proved upper bound of ||x||_2 for lower triangular x, a few per cent above the truth.

    Proves t I - X X^T positive semidefinite up to a bounded residual, in float32 on X scaled to norm about 1:
    the proof is well conditioned whatever X is. Falls back to row and column sums.
    """
    n = x.n
    plain = norm_upper(x)
    if n == 1 or plain == 0.0 or not math.isfinite(plain):
        return plain
    dtype = torch.float32 if n > 256 else torch.float64
    generator = torch.Generator("cpu").manual_seed(0)
    y = x.clone(dtype, 1.0 / plain)
    v = torch.linalg.qr(torch.randn((n, 8), generator=generator, dtype=dtype, device="cpu").to(x.device))[0]
    top = new = 0.0
    for _ in range(40):
        v, r = torch.linalg.qr(tiles.matmul(y, tiles.matmul(y, v, transposed=True)))
        new = float(torch.linalg.matrix_norm(r, 2))
        if new <= top * 1.01:  # an underestimate costs a second try below, not soundness
            break
        top = new
    top = max(top, new)
    # a power of two: y is X rounded once, nothing else
    scale = 2.0 ** math.floor(math.log2(1.0 / (plain * math.sqrt(top))))
    y = x.clone(dtype, scale)
    top = top * (plain * scale) ** 2
    unit, tiny = UNIT[dtype], 4 * n * n * SMALLEST_NORMAL[dtype]
    inner = INNER32 if dtype == torch.float32 else tiling(x.device).slice_length
    m = tiles.triangular_gram(y, inner)
    products = round_up(float(tiles.abs_gram_sums(y).amax()), 2 * n)
    error = round_up(gamma(min(inner, n) + -(-n // inner) + 2, dtype) * products + tiny)
    diagonal = m.diagonal()
    frobenius = math.sqrt(round_up(float(diagonal.sum(dtype=torch.float64)) + n * error, n))
    for key in m.pairs():
        m[key].neg_()
    low = Tiles(n, dtype, x.device)
    for slack in (1.05, 1.25, 2.0):
        t = float(torch.tensor(slack * top, dtype=dtype, device="cpu"))
        m.set_diagonal_(t - diagonal)  # rounded once, by at most u (t + ||Y||_F^2)
        residual = verified_cholesky(m, 0.0, low)
        if residual is not None:
            # t I - Y Y^T = L L^T + (what the product, the shift's subtraction and the residual hide)
            hidden = error + residual + 4 * unit * (t + float(diagonal.amax()))
            bound = math.sqrt(round_up(t + hidden, n)) + unit * frobenius * (1 + 4 * unit) + tiny
            return min(plain, round_up(bound / scale))
    return plain
