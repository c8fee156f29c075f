"""Proof of full row rank in floating point, rounding errors included.

``prove_full_rank`` shows that H1 = [H, 1] (n x (m+1)) has rank n, as stored. Only matrix products are
trusted, through |fl(AB) - AB| <= gamma_k |A||B| (any order of summation, with or without FMA; k the inner
length; Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., section 3.5) plus underflow.
Factorisations only propose a witness X; a bad proposal makes the proof fail, never succeed wrongly.

The proof: for any X, rank(X H1) = n implies rank(H1) = n. Take X = L^-1 from the Cholesky factor of the
Gram (shifted and repeated where that is ill-conditioned; Fukaya, Kannan, Nakatsukasa, Yamamoto,
Yanagisawa, 2020). With Q = fl(X H1), G2 = fl(Q Q^T):

    sigma_min(X H1) >= sqrt(1 - ||G2 - I|| - gamma || |Q||Q|^T ||) - gamma || |X||H1| ||,
    sigma_min(H1)   >= sigma_min(X H1) / ||X||.

The sharp bound on ||X|| comes from a second proof on well-scaled data: t I - X X^T = L L^T + E, so that
||X||^2 <= t + ||E||. Unlike a shift of the Gram itself it loses nothing to the square of the condition
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from gcfast import ops

ROW_BLOCK = 512  # rows of the lower block triangle computed at once: half the work, still large products
PANEL = 1024  # columns of H1 in flight
PANEL32 = 256  # inner length of a float32 product: gamma stays 1.5e-5 whatever m is
_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
_TINY = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126}  # flush-to-zero allowed for


@dataclass(frozen=True)
class RankProof:
    """Outcome of :func:`prove_full_rank`.

    ``proved``: rank(H1) = n is proved. ``sigma_min_lower`` / ``sigma_max_upper``: proved bounds on the
    extreme singular values (0 and inf where not proved). ``margin``: proved lower bound of sigma_min(X H1), 1
    is perfect. ``reason``: one sentence.
    """

    proved: bool
    sigma_min_lower: float
    sigma_max_upper: float
    margin: float
    passes: int
    reason: str


def _up(x: float, terms: int = 8) -> float:
    """x enlarged by ``terms`` roundings of non-negative float64 numbers and a few more, upward.

    It covers ``ops.abs_products`` and ``ops.gram_error_bound`` of an n x m matrix with ``terms`` = n + m.
    """
    return float(x) * (1.0 + 4.0 * (terms + 8) * _UNIT[torch.float64])


def gamma(k: int, dtype: torch.dtype = torch.float64) -> float:
    """gamma_k = k u / (1 - k u), rounded up; inf where k u >= 1/2 (the bound is of no use there)."""
    ku = k * _UNIT[dtype]
    return math.inf if ku >= 0.5 else _up(ku / (1.0 - ku))


def _precision_switches() -> list[Any]:
    """Torch's settings that let a float32 product use TF32 or bf16, as objects with ``fp32_precision``."""
    paths = (
        torch.backends,
        getattr(torch.backends.cuda, "matmul", None),
        getattr(getattr(torch.backends, "mkldnn", None), "matmul", None),
    )
    return [p for p in paths if p is not None and hasattr(p, "fp32_precision")]


@contextmanager
def exact_products() -> Iterator[None]:
    """Products by the plain IEEE rules the bounds assume: no TF32, no bf16, no autocast, for the block."""
    switches = [(s, s.fp32_precision) for s in _precision_switches()]
    try:
        for switch, _ in switches:
            switch.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for switch, before in switches:
            switch.fp32_precision = before


def check_products(device: torch.device) -> None:
    """Raise RuntimeError where products are seen to break the bounds: TF32, bf16 or emulation left on.

    Positive entries, so that a shorter mantissa shows; integers for float64, where the product is exact.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(1 << 21, 1 << 22, (2, 128, 128), generator=generator)
    exact = whole[0].to(device).double() @ whole[1].to(device).double()
    a, b = (1 + torch.rand((2, 256, 256), generator=generator)).to(device)
    error = ((a @ b).double() - a.double() @ b.double()).abs() / (a.double() @ b.double())
    # int64 products wrap for nothing here: 2^44 * 128 = 2^51
    if not torch.equal(exact.cpu().long(), whole[0] @ whole[1]) or float(error.amax()) > 256 * 2.0**-24:
        raise RuntimeError(
            f"matrix products on {device} are less exact than IEEE arithmetic (TF32, bf16 or emulated "
            "float64 is on), so nothing can be proved with them: switch that off "
            "(torch.set_float32_matmul_precision('highest'), "
            "no CUBLAS_EMULATE_* or ONEDNN_DEFAULT_FPMATH_MODE in the environment)"
        )


class StackedOnes:
    """H1 = [H, 1] by column panels in float64; H float32 or float64, any strides, never copied whole."""

    def __init__(self, features: Tensor, ones: bool = True):
        self.features, self.ones = features, ones
        self.n, self.columns = features.shape[0], features.shape[1] + int(ones)

    def panels(self, width: int = PANEL, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
        m = self.features.shape[1]
        for j in range(0, self.columns, width):
            panel = self.features[:, j : min(j + width, m)].to(dtype)
            if self.ones and j + width >= self.columns:
                panel = torch.cat([panel, panel.new_ones(self.n, 1)], 1)
            yield panel if panel.stride(1) == 1 else panel.contiguous()

    def abs_products(self, left: Tensor | None = None) -> tuple[Tensor, float]:
        """|H1| 1 (n,) and the largest entry of left |H1|, float64; ``left`` ones by default."""
        rows = self.features.new_zeros(self.n, dtype=torch.float64)
        largest = rows.new_zeros(())
        for panel in self.panels(dtype=self.features.dtype):  # by rows, so that no bit depends on the layout
            panel_rows, columns = ops.abs_products(panel, left)
            rows += panel_rows
            largest = torch.maximum(largest, columns.amax())  # unlike max(), it keeps a NaN
        return rows, float(largest)


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    for i in range(0, n, ROW_BLOCK):
        yield i, min(i + ROW_BLOCK, n)


def _reflect(g: Tensor) -> Tensor:
    """Lower block triangle mirrored in place, so that g is symmetric as stored."""
    for i0, i1 in _blocks(len(g)):
        diagonal = g[i0:i1, i0:i1]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
        g[:i0, i0:i1] = g[i0:i1, :i0].mT
    return g


def gram(h1: StackedOnes, dtype: torch.dtype = torch.float64) -> Tensor:
    """H1 H1^T (n x n), lower block triangle computed and mirrored. A proposal, not a proof."""
    g = h1.features.new_zeros((h1.n, h1.n), dtype=dtype)
    for panel in h1.panels(dtype=dtype):
        for i0, i1 in _blocks(h1.n):
            g[i0:i1, :i1].addmm_(panel[i0:i1], panel[:i1].mT)
    return _reflect(g)


def _invert_lower_(low: Tensor, leaf: int = 128) -> Tensor:
    """Inverse of a lower triangular matrix in place, by halves: almost all the work is matrix products."""
    n = len(low)
    if n <= leaf:
        identity = torch.eye(n, dtype=low.dtype, device=low.device)
        low.copy_(torch.linalg.solve_triangular(low.tril(), identity, upper=False))
        return low
    k = (n // 2 + leaf - 1) // leaf * leaf
    _invert_lower_(low[:k, :k], leaf)
    _invert_lower_(low[k:, k:], leaf)
    low[k:, :k] = -_lower_times(low[k:, k:], low[k:, :k] @ low[:k, :k])
    return low


def _lower_times(x: Tensor, b: Tensor) -> Tensor:
    """x @ b for lower triangular x, skipping the zero blocks above the diagonal."""
    out = torch.empty_like(b)
    for i0, i1 in _blocks(len(x)):
        torch.mm(x[i0:i1, :i1], b[:i1], out=out[i0:i1])
    return out


def _cholesky_inverse(g: Tensor, start_shift: float) -> tuple[Tensor, float] | None:
    """X = L^-1 with L L^T = g + shift I; the least shift of 0, s, 100 s, ... that lets Cholesky through."""
    scale = float(g.diagonal().amax())
    shift, tries = 0.0, 0
    while tries < 6:
        work = g.clone()
        if shift:
            work.diagonal().add_(shift)
        low, info = torch.linalg.cholesky_ex(work)
        del work
        # a pivot at rounding level means the factor is noise from there on: shift instead
        if (
            int(info) == 0
            and bool(torch.isfinite(low.diagonal()).all())
            and (shift or float(low.diagonal().amin()) ** 2 > 4 * len(g) * _UNIT[torch.float64] * scale)
        ):
            return _invert_lower_(low.tril_()), shift
        shift = start_shift * scale if shift == 0.0 else shift * 100.0
        tries += 1
    return None


def norm_upper(x: Tensor) -> float:
    """Proved upper bound of ||x||_2: sqrt(||x||_1 ||x||_inf), float64."""
    rows, columns = ops.abs_products(x)
    return _up(math.sqrt(float(rows.amax()) * float(columns.amax())), sum(x.shape))


def _add_gram_(g: Tensor, q: Tensor, inner: int) -> None:
    """g += q q^T on the lower block triangle, in float32 or float64, products of inner length ``inner``."""
    for k in range(0, q.shape[1], inner):
        part = q[:, k : k + inner]
        for i0, i1 in _blocks(len(g)):
            # the product is rounded by itself, then added: gamma_(inner + number of panels), not gamma_m
            g[i0:i1, :i1] += part[i0:i1] @ part[:i1].mT


@dataclass
class _Whitened:
    gram: Tensor
    distance: float  # ||G2 - I||
    product_error: float  # bound on ||G2 - Q Q^T||
    witness_error: float  # bound on ||Q - X H1||
    margin: float


def _whiten(h1: StackedOnes, x: Tensor, dtype: torch.dtype) -> _Whitened:
    """Q = X H1 by column panels, G2 = Q Q^T in ``dtype``, and every error term of the proof."""
    n, columns = h1.n, h1.columns
    g2 = torch.zeros((n, n), dtype=dtype, device=x.device)
    inner = PANEL32 if dtype == torch.float32 else PANEL
    q_rows = torch.zeros(n, dtype=torch.float64, device=x.device)
    for panel in h1.panels():
        q = _lower_times(x, panel).to(dtype)
        q_rows += ops.gram_error_bound(q)
        _add_gram_(g2, q, inner)
    terms = n + columns
    # || |X||H1| || from its row and column sums; |Q||Q|^T is symmetric, its largest row sum is enough
    # Underflow in them does not count: where Q is nearly orthonormal, both are far above it.
    h_rows, xh_one = h1.abs_products(left=ops.abs_products(x)[1])
    xh_inf = float(ops.abs_products(x, right=h_rows)[0].amax())
    xh = _up(math.sqrt(xh_one * xh_inf), 2 * terms)
    qq = _up(float(q_rows.amax()), terms)
    tiny, tiny64 = n * columns * _TINY[dtype], n * n * _TINY[torch.float64]
    panels = -(-columns // PANEL) * (PANEL // inner)
    witness_error = _up(gamma(n + 2) * xh + tiny64)
    product_error = _up(gamma(inner + panels + 2, dtype) * qq + tiny)
    _reflect(g2)
    diagonal = g2.diagonal().to(torch.float64, copy=True)
    if dtype != torch.float64:  # Q was rounded to float32 before its Gram; ||Q||_F^2 is the Gram's trace
        square = _up(float(diagonal.sum()) + n * product_error, n)
        witness_error = _up(witness_error + _UNIT[dtype] * math.sqrt(square) + tiny)
    g2.diagonal().zero_()
    residual = ops.abs_products(g2)[0] + (diagonal - 1.0).abs()
    g2.diagonal().copy_(diagonal)
    distance = _up(float(residual.amax()), terms)
    inside = 1.0 - distance - product_error
    margin = (math.sqrt(inside) * (1 - 1e-15) - witness_error) if inside > 0 else -math.inf
    if not all(map(math.isfinite, (distance, product_error, witness_error))):
        margin = -math.inf
    return _Whitened(g2, distance, product_error, witness_error, margin)


def _norm_sharp(x: Tensor) -> float:
    """Proved upper bound of ||x||_2 for lower triangular x, a few per cent above the truth.

    Proves t I - X X^T positive semidefinite up to a bounded residual, in float32 on X scaled to norm about 1:
    the proof is well conditioned whatever X is. Falls back to row and column sums.
    """
    n = len(x)
    plain = norm_upper(x)
    if n == 1 or plain == 0.0 or not math.isfinite(plain):
        return plain
    dtype = torch.float32 if n > 256 else torch.float64
    generator = torch.Generator(device="cpu").manual_seed(0)
    y = (x * (1.0 / plain)).to(dtype)
    v = torch.linalg.qr(torch.randn((n, 8), generator=generator, dtype=dtype).to(x.device))[0]
    top = 0.0
    for _ in range(40):
        v = y @ (y.mT @ v)
        v, r = torch.linalg.qr(v)
        new = float(torch.linalg.matrix_norm(r, 2))
        if new <= top * 1.01:  # an underestimate costs a second try below, not soundness
            break
        top = new
    top = max(top, new)
    scale = 1.0 / (plain * math.sqrt(top))
    scale = 2.0 ** math.floor(math.log2(scale))  # a power of two: y is X rounded once, nothing else
    y = (x * scale).to(dtype)
    top = top * (plain * scale) ** 2
    unit, tiny = _UNIT[dtype], n * n * _TINY[dtype]
    inner = PANEL32 if dtype == torch.float32 else PANEL
    terms = inner + -(-n // inner) + 2
    m = torch.zeros_like(y)
    for k in range(0, n, inner):  # column block k of lower triangular y is zero above row k
        part = y[k:, k : k + inner]
        for i0, i1 in _blocks(n - k):
            m[k + i0 : k + i1, k : k + i1] += part[i0:i1] @ part[:i1].mT
    _reflect(m)
    error = _up(gamma(terms, dtype) * _up(float(ops.gram_error_bound(y).amax()), 2 * n) + tiny)
    diagonal = m.diagonal().clone()
    frobenius = math.sqrt(_up(float(diagonal.sum(dtype=torch.float64)) + n * error, n))
    shifted = m.neg_()
    for slack in (1.05, 1.25, 2.0):
        t = float(torch.tensor(slack * top, dtype=dtype))
        shifted.diagonal().copy_(t - diagonal)
        low, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0:
            continue
        low = low.tril_()
        product = torch.zeros_like(low)
        for k in range(0, n, inner):
            part = low[k:, k : k + inner]
            for i0, i1 in _blocks(n - k):
                product[k + i0 : k + i1, k : k + i1] += part[i0:i1] @ part[:i1].mT
        _reflect(product)
        residual = _up(float(ops.abs_products(product.sub_(shifted))[0].amax()), n)
        low_rows = _up(float(ops.gram_error_bound(low).amax()), 2 * n)
        # t I - Y Y^T = L L^T + (what each product, the shift's subtraction and the residual's rounding hide)
        hidden = error + gamma(terms, dtype) * low_rows + residual * (1 + 4 * unit)
        hidden = hidden + 4 * unit * (t + top * slack) + tiny
        bound = math.sqrt(_up(t + hidden, n)) + unit * frobenius * (1 + 4 * unit) + tiny
        return min(plain, _up(bound / scale))
    return plain


def proof_bytes(n: int, m: int) -> int:
    """Peak bytes of :func:`prove_full_rank` beyond the features."""
    # Gram, factor, LAPACK's copy and its work in float64; or one such and four in float32 (the sharp bound)
    return 8 * n * (15 * n // 4 + 5 * min(PANEL, m + 1))


def prove_full_rank(
    features: Tensor,
    *,
    ones: bool = True,
    sharp: bool = True,
    max_passes: int = 3,
    progress: Callable[[str, float], None] | None = None,
) -> RankProof:
    """Prove that [features, 1] has full row rank n; see the module's docstring for the method.

    Args:
        features: (n, m) float32 or float64, finite, n <= m + 1; float32 is taken exactly, as float64.
        ones: append the column of ones (the head's bias).
        sharp: spend about a quarter more time on a bound of sigma_min within a few per cent of the truth.
        max_passes: whitening passes; one is enough up to a condition number of about 1e7.
        progress: called with a step's name and the fraction done.
    """
    tell = progress or (lambda step, fraction: None)
    h1 = StackedOnes(features, ones)
    n = h1.n
    if n == 0:
        return RankProof(True, math.inf, 0.0, 1.0, 0, "no rows")
    with exact_products():
        check_products(features.device)
        tell("Gram", 0.0)
        rows, one = h1.abs_products()
        sigma_max = _up(math.sqrt(one * float(rows.amax())), n + h1.columns)
        g = gram(h1)
        if not bool(torch.isfinite(g.diagonal()).all()) or float(g.diagonal().amin()) < 1e-290:
            return RankProof(
                False, 0.0, sigma_max, 0.0, 0, "the Gram over- or underflows float64; rescale the features"
            )
        tell("Cholesky", 0.25)
        found = _cholesky_inverse(g, 11.0 * (n + h1.columns) * _UNIT[torch.float64])
        if found is None:
            return RankProof(False, 0.0, sigma_max, 0.0, 0, "no Cholesky factor, even of the shifted Gram")
        x, shift = found
        del g
        white = None
        for done in range(1, max_passes + 1):
            tell("whitening", 0.3 + 0.2 * done)
            # float32 for the second Gram: it is near the identity, and halves the time where its bound allows
            single = shift == 0.0 and 0.8 * n * gamma(PANEL32 + h1.columns // PANEL32, torch.float32) < 0.2
            white = _whiten(h1, x, torch.float32 if single else torch.float64)
            if white.margin > 0 or done == max_passes or white.witness_error >= 1.0:
                break
            least = 11.0 * (n + h1.columns) * _UNIT[torch.float64]
            found = _cholesky_inverse(white.gram.to(torch.float64), least)
            if found is None:
                break
            x = _lower_times(found[0], x)
            shift = found[1]
            del found
        assert white is not None
        if white.margin <= 0:
            reason = (
                f"whitening proves nothing here: ||G2 - I|| <= {white.distance:.1e}, "
                f"product error {white.product_error:.1e}, witness error {white.witness_error:.1e} (their "
                "sum must stay below 1)"
            )
            return RankProof(False, 0.0, sigma_max, white.margin, done, reason)
        del white.gram
        tell("norm of the witness", 0.85)
        norm = _norm_sharp(x) if sharp else norm_upper(x)
        lower = white.margin / norm * (1 - 1e-14)
        tell("done", 1.0)
        reason = f"whitening: sigma_min(X H1) >= {white.margin:.6f}, ||X|| <= {norm:.3e}"
        return RankProof(True, lower, sigma_max, white.margin, done, reason)


@dataclass(frozen=True)
class Dependency:
    """sum_k coefficients[k] * H1[samples[k]] is ``residual`` times as small as its terms.

    0 and ``exact``: it is zero.
    """

    samples: list[int]
    coefficients: list[float]
    residual: float
    exact: bool


def near_dependency(features: Tensor, *, ones: bool = True, vectors: int = 8) -> Dependency | None:
    """A smallest near-dependency among the rows of [features, 1], or None where they are far from dependent.

    Inverse iteration on the shifted Gram finds the vectors that nearly annihilate the rows; elimination with
    pivots makes them sparse. Coefficients that look rational are tried in exact arithmetic: then ``exact`` is
    a proof that the rank is below n.
    """
    h1 = StackedOnes(features, ones)
    n = h1.n
    with exact_products():
        g = gram(h1)
        unit = _UNIT[torch.float64]
        found = _cholesky_inverse(g, 11.0 * (n + h1.columns) * unit)
        if found is None or n < 2:
            return None
        x, _ = found
        generator = torch.Generator().manual_seed(0)
        v = torch.randn((n, min(vectors, n)), generator=generator, dtype=torch.float64).to(x.device)
        for _ in range(12):
            v = torch.linalg.qr(x.mT @ (x @ v))[0]
        # Rayleigh and Ritz: values of the Gram on this subspace, ascending
        values, rotation = torch.linalg.eigh(v.mT @ (g @ v))
        v = (v @ rotation)[:, values <= 1e4 * n * unit * float(g.diagonal().sum())]
    if v.shape[1] == 0:
        return None
    basis = v.cpu()
    for k in range(basis.shape[1]):  # column echelon form: each column keeps one pivot of its own
        left = basis[:, k:].abs()
        row, column = divmod(int(left.argmax()), left.shape[1])
        order = list(range(basis.shape[1]))
        order[k], order[k + column] = order[k + column], order[k]
        basis = basis[:, order]
        basis[:, k] = basis[:, k] / basis[row, k].clone()
        for j in range(basis.shape[1]):
            if j != k:
                basis[:, j] = basis[:, j] - basis[row, j].clone() * basis[:, k]
    counts = (basis.abs() > 1e-5 * basis.abs().amax(0)).sum(0)
    u = basis[:, int(counts.argmin())]
    samples = (u.abs() > 1e-5 * u.abs().amax()).nonzero()[:, 0].tolist()
    samples = sorted(sorted(samples, key=lambda i: -abs(float(u[i])))[:32])
    rows = features[samples].to(torch.float64).cpu()
    if ones:
        rows = torch.cat([rows, rows.new_ones(len(samples), 1)], 1)
    c = u[samples]
    size = float((c.abs()[:, None] * rows.abs()).sum(0).norm())
    residual = float((c @ rows).norm()) / size if size else 0.0
    exact = len(samples) <= 8 and _is_dependency(rows, c)
    return Dependency(samples, c.tolist(), 0.0 if exact else residual, exact)


def _is_dependency(rows: Tensor, coefficients: Tensor) -> bool:
    """Whether simple rational coefficients near the given ones annihilate the rows exactly."""
    simple = [Fraction(float(c)).limit_denominator(64) for c in coefficients]
    if all(s == 0 for s in simple) or any(
        abs(float(s) - float(c)) > 1e-4 for s, c in zip(simple, coefficients, strict=True)
    ):
        return False
    approx = torch.tensor([float(s) for s in simple], dtype=torch.float64) @ rows
    if float(approx.abs().amax()) > 1e-9 * float(rows.abs().amax()):
        return False
    return all(
        sum(s * Fraction(v) for s, v in zip(simple, column, strict=True)) == 0 for column in rows.mT.tolist()
    )
