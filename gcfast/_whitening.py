"""The long route, for condition numbers above 1 / sqrt(n u): prove the rank of X H1 for a witness X.

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
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast import ops
from gcfast._products import (
    TINY,
    UNIT,
    StackedOnes,
    _up,
    add_gram_,
    add_product_,
    gamma,
    lower_times,
    lower_triangle_,
    norm_upper,
    panel_slices,
    row_tiles,
    symmetric_row_sums,
    tiling,
)
from gcfast._shift import verified_cholesky

INNER32 = 256  # of float32 products: gamma stays 1.5e-5 whatever m is


def invert_lower_(low: Tensor, leaf: int = 128) -> Tensor:
    """Inverse of a lower triangular matrix in place, by halves: almost all the work is matrix products."""
    n = len(low)
    if n <= leaf:
        identity = torch.eye(n, dtype=low.dtype, device=low.device)
        low.copy_(torch.linalg.solve_triangular(low.tril(), identity, upper=False))
        return low
    k = (n // 2 + leaf - 1) // leaf * leaf
    invert_lower_(low[:k, :k], leaf)
    invert_lower_(low[k:, k:], leaf)
    low[k:, :k] = -lower_mm(low[k:, k:], low[k:, :k] @ low[:k, :k])
    return low


def lower_mm(x: Tensor, b: Tensor, strip: int = 512) -> Tensor:
    """x b for lower triangular x, a proposal: products as long as they come, none with the zeros of x."""
    out = torch.empty_like(b)
    for i in range(0, len(x), strip):
        torch.mm(x[i : i + strip, : i + strip], b[: i + strip], out=out[i : i + strip])
    return out


def cholesky_inverse(g: Tensor, start_shift: float) -> tuple[Tensor, float] | None:
    """X = L^-1 with L L^T = g + shift I; the least shift of 0, s, 100 s, ... that lets Cholesky through.

    Reads the lower triangle of g only.
    """
    scale = float(g.diagonal().amax())
    shift = 0.0
    for _ in range(6):
        diagonal = g.diagonal().clone()
        g.diagonal().add_(shift)
        low, info = torch.linalg.cholesky_ex(g)
        g.diagonal().copy_(diagonal)
        # a pivot at rounding level means the factor is noise from there on: shift instead
        if (
            int(info) == 0
            and bool(torch.isfinite(low.diagonal()).all())
            and (shift or float(low.diagonal().amin()) ** 2 > 4 * len(g) * UNIT[torch.float64] * scale)
        ):
            return invert_lower_(low), shift
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
    return (53 - math.ceil(math.log2(max(k, 2)))) // 2


def lower_times_doubled(x: Tensor, b: Tensor) -> Tensor:
    """x b for lower triangular x as if in about 1.4 times the digits: see :func:`doubled_error`.

    Both factors are split as in Ozaki, Ogita, Oishi, Rump (2012): the product of the high parts is exact in
    any order of summation, the rest is 2^-bits as large and rounded as any product.
    """
    tile, bits = tiling(x.device), doubled_bits(len(x))
    b_high, b_low = split(b, power_of_two(b.abs().amax(0)), bits)
    out = torch.empty_like(b)
    scratch = tile.scratch(b)
    for rows, columns, end in row_tiles(x, b):
        part = x[rows, :end]
        x_high, x_low = split(part, power_of_two(part.abs().amax(1))[:, None], bits)
        rest = torch.zeros_like(out[rows, columns])
        add_product_(rest, x_high, b_low[:end, columns], tile.inner, scratch)
        add_product_(rest, x_low, b[:end, columns], tile.inner, scratch)
        torch.add(x_high @ b_high[:end, columns], rest, out=out[rows, columns])
    return out


def doubled_error(x: Tensor, h1: StackedOnes, x_rows: Tensor, h_columns: float, h_scales: float) -> float:
    """Bound of ||fl(X H1) - X H1||_2 for :func:`lower_times_doubled`, but for the last rounding, u ||Q||_F.

    The rounded part is |X_high||H_low| + |X_low||H1| <= delta (|X_high| 1) c^T + delta r (1^T |H1|), with
    r and c the scales of rows and columns, delta = 2^-bits / 2: two matrices of rank one.

    Args:
        x_rows: |X| 1.
        h_columns: Euclidean norm of 1^T |H1|.
        h_scales: Euclidean norm of c.
    """
    n, tile = len(x), tiling(x.device)
    delta = 0.5 * 2.0 ** -doubled_bits(n)
    r = power_of_two(x.abs().amax(1))
    high = float((x_rows + n * delta * r).norm())
    rounded = delta * (high * h_scales + float(r.norm()) * h_columns)
    # two products added up in one tile: twice the slices
    factor = gamma(min(n, tile.inner) + 2 * tile.slices(n) + 2)
    return _up(factor * _up(rounded, 4 * (n + h1.columns)))


@dataclass
class Whitened:
    gram: Tensor  # lower triangle
    distance: float  # ||G2 - I||
    product_error: float  # bound on ||G2 - Q Q^T||
    witness_error: float  # bound on ||Q - X H1||
    margin: float
    doubled: bool


def whiten(h1: StackedOnes, x: Tensor, dtype: torch.dtype, most: float = 1.0) -> Whitened | None:
    """Q = X H1 by column panels, G2 = Q Q^T in ``dtype``, and every error term of the proof.

    Q comes from a doubled product where a plain one would lose more than 1e-2. None, before any product,
    where even that loses ``most`` or more.
    """
    n, columns, tile = h1.n, h1.columns, tiling(x.device)
    terms = n + columns
    x_rows, x_columns = ops.abs_products(x)
    # || |X||H1| || from its row and column sums. Underflow in them does not count: where Q is nearly
    # orthonormal, both are far above it.
    h_rows, xh_one = h1.abs_products(left=x_columns)
    xh_inf = float(ops.abs_products(x, right=h_rows)[0].amax())
    partner = 2.0 + float(x_rows.amax()) + float(h_rows.amax())  # of an operand that is flushed to zero
    tiny64 = 4 * n * (n + columns) * TINY[torch.float64] * partner
    witness_error = _up(tile.gamma(n) * _up(math.sqrt(xh_one * xh_inf), 2 * terms) + tiny64)
    doubled = not witness_error < 1e-2
    if doubled:
        sums, scales = 0.0, 0.0
        for panel in h1.panels():
            sums += float(ops.abs_products(panel)[1].square().sum())
            scales += float(power_of_two(panel.abs().amax(0)).square().sum())
        norms = (_up(math.sqrt(s), 2 * terms) for s in (sums, scales))
        witness_error = _up(doubled_error(x, h1, x_rows, *norms) + tiny64)
    if not witness_error < most:
        return None
    g2 = torch.zeros((n, n), dtype=dtype, device=x.device)
    inner = INNER32 if dtype == torch.float32 else tile.inner
    q_rows = torch.zeros(n, dtype=torch.float64, device=x.device)
    for panel in h1.panels():
        q = (lower_times_doubled(x, panel) if doubled else lower_times(x, panel)).to(dtype)
        q_rows += ops.gram_error_bound(q)
        add_gram_(g2, q, inner)
        del q
    lower_triangle_(g2)
    qq = _up(float(q_rows.amax()), terms)  # |Q||Q|^T is symmetric: its largest row sum is enough
    tiny = 4 * n * columns * TINY[dtype] * (2.0 + qq)
    terms_of_one = min(inner, columns) + panel_slices(columns, inner)
    product_error = _up(gamma(terms_of_one + 2, dtype) * qq + tiny)
    diagonal = g2.diagonal().to(torch.float64, copy=True)
    if doubled or dtype != torch.float64:  # Q was rounded once more; ||Q||_F^2 is the trace of its Gram
        square = _up(max(float(diagonal.sum()), 0.0) + n * product_error, n)
        unit = UNIT[torch.float64] * doubled + UNIT[dtype] * (dtype != torch.float64)
        witness_error = _up(witness_error + 1.01 * unit * math.sqrt(square) + tiny)
    g2.diagonal().zero_()
    residual = symmetric_row_sums(g2) + (diagonal - 1.0).abs()
    g2.diagonal().copy_(diagonal)
    distance = _up(float(residual.amax()), 2 * terms)
    inside = 1.0 - distance - product_error
    margin = (math.sqrt(inside) * (1 - 1e-15) - witness_error) if inside > 0 else -math.inf
    if not all(map(math.isfinite, (distance, product_error, witness_error))):
        margin = -math.inf
    return Whitened(g2, distance, product_error, witness_error, margin, doubled)


def norm_sharp(x: Tensor) -> float:
    """Proved upper bound of ||x||_2 for lower triangular x, a few per cent above the truth.

    Proves t I - X X^T positive semidefinite up to a bounded residual, in float32 on X scaled to norm about 1:
    the proof is well conditioned whatever X is. Falls back to row and column sums.
    """
    n = len(x)
    plain = norm_upper(x)
    if n == 1 or plain == 0.0 or not math.isfinite(plain):
        return plain
    dtype = torch.float32 if n > 256 else torch.float64
    generator = torch.Generator().manual_seed(0)
    y = (x * (1.0 / plain)).to(dtype)
    v = torch.linalg.qr(torch.randn((n, 8), generator=generator, dtype=dtype).to(x.device))[0]
    top = new = 0.0
    for _ in range(40):
        v, r = torch.linalg.qr(y @ (y.mT @ v))
        new = float(torch.linalg.matrix_norm(r, 2))
        if new <= top * 1.01:  # an underestimate costs a second try below, not soundness
            break
        top = new
    top = max(top, new)
    # a power of two: y is X rounded once, nothing else
    scale = 2.0 ** math.floor(math.log2(1.0 / (plain * math.sqrt(top))))
    y = (x * scale).to(dtype)
    top = top * (plain * scale) ** 2
    unit, tiny = UNIT[dtype], 4 * n * n * TINY[dtype]
    tile = tiling(x.device)
    inner = INNER32 if dtype == torch.float32 else tile.inner
    m = torch.zeros_like(y)
    add_gram_(m, y, inner, triangular=True)
    lower_triangle_(m)
    products = _up(float(ops.gram_error_bound(y).amax()), 2 * n)
    error = _up(gamma(min(inner, n) + -(-n // inner) + 2, dtype) * products + tiny)
    diagonal = m.diagonal().clone()
    frobenius = math.sqrt(_up(float(diagonal.sum(dtype=torch.float64)) + n * error, n))
    shifted, low = m.neg_(), y.zero_()
    for slack in (1.05, 1.25, 2.0):
        t = float(torch.tensor(slack * top, dtype=dtype))
        shifted.diagonal().copy_(t - diagonal)  # rounded once, by at most u (t + ||Y||_F^2)
        found = verified_cholesky(shifted, out=low)
        if found is not None:
            # t I - Y Y^T = L L^T + (what the product, the shift's subtraction and the residual hide)
            hidden = error + found[1] + 4 * unit * (t + float(diagonal.amax()))
            bound = math.sqrt(_up(t + hidden, n)) + unit * frobenius * (1 + 4 * unit) + tiny
            return min(plain, _up(bound / scale))
    return plain
