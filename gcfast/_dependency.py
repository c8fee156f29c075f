from __future__ import annotations
from dataclasses import dataclass
from fractions import Fraction
import torch
from torch import Tensor
from gcfast._products import UNIT as _UNIT, StackedOnes, exact_products, gram
from gcfast._whitening import cholesky_inverse as _cholesky_inverse
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
