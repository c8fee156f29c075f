"""Linear dependencies among the samples, with a sparse witness, and the rank that is left, proved.

A blocked Cholesky factorisation of the Gram passes over the rows whose pivot vanishes: those it keeps are a
basis of the row space, numerically, and each row it drops is a combination of kept ones. Nothing here is
trusted: dependencies are checked in exact arithmetic, the rank of the kept rows by :func:`prove_full_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from gcfast import ops
from gcfast.features import Features, FeaturesWithOnes, StoredFeatures
from gcfast.proofs.full_rank import prove_full_rank
from gcfast.proofs.rank_proof import RankProof
from gcfast.proofs.rounding import UNIT
from gcfast.proofs.tiles import Tiles, add_gram_

BLOCK = 128  # rows among which pivots are sought; one step costs about as much as its arithmetic
EXACT = 32  # rows of the largest dependency that is tried in exact arithmetic
TRIES = 8  # dependencies that are tried
VECTORS = 32  # dropped rows that are written in terms of the kept ones


@dataclass(frozen=True)
class Dependency:
    """sum_k coefficients[k] * H1[samples[k]] is ``residual`` times as small as its terms.

    0 and ``exact``: a combination of exactly these rows is zero, with coefficients that round to these.
    """

    samples: list[int]
    coefficients: list[float]
    residual: float
    exact: bool


@dataclass
class RowBasis:
    """Rows ``kept`` and ``dropped``; ``factor`` F (n, r): G = F F^T nearly, F[kept] lower triangular."""

    kept: Tensor
    dropped: Tensor
    factor: Tensor


def _pivots(s: Tensor, scale: Tensor, tolerance: float) -> list[int]:
    """Indices, in order of choice, of the pivots of symmetric s above tolerance * scale. Works on the CPU."""
    s = s.clone()
    order: list[int] = []
    ratio = torch.empty_like(scale)
    for _ in range(len(s)):
        torch.div(s.diagonal(), scale, out=ratio)
        ratio[order] = -math.inf
        k = int(ratio.argmax())
        if not float(ratio[k]) > tolerance:
            break
        order.append(k)
        column = s[:, k].clone()
        s.addr_(column, column, alpha=-1.0 / float(column[k]))
    return order


def row_basis(g: Tensor, tolerance: float) -> RowBasis:
    """Rows whose Gram has pivots above ``tolerance`` times their squared length; g (n, n), lower triangle."""
    n, rank = len(g), 0
    factor = torch.zeros_like(g)
    kept: list[int] = []
    for j0 in range(0, n, BLOCK):
        j1 = min(j0 + BLOCK, n)
        s = torch.addmm(g[j0:, j0:j1], factor[j0:, :rank], factor[j0:j1, :rank].mT, alpha=-1.0)
        top = s[: j1 - j0].cpu()
        top = top.tril() + top.tril(-1).mT
        s[: j1 - j0] = top.to(s.device)
        order = _pivots(top, g.diagonal()[j0:j1].cpu().clamp(min=2.0**-1022), tolerance)
        while order:
            low, info = torch.linalg.cholesky_ex(top[order][:, order])
            if int(info) == 0:
                low = low.to(s.device)
                end = rank + len(order)
                chosen = s[:, torch.tensor(order, device=s.device)]
                factor[j0:, rank:end] = torch.linalg.solve_triangular(low.mT, chosen, upper=True, left=False)
                factor[torch.tensor(order, device=s.device) + j0, rank:end] = low
                kept += [j0 + k for k in order]
                rank = end
                break
            order.pop()  # the least pivot
    rest = sorted(set(range(n)) - set(kept))
    first, second = (torch.tensor(rows, dtype=torch.long, device=g.device) for rows in (kept, rest))
    return RowBasis(first, second, factor[:, :rank])


def lower_gram(h1: FeaturesWithOnes) -> Tensor:
    """H1 H1^T (n x n, float64): its lower triangle, zeros above."""
    g = torch.zeros((h1.n, h1.n), dtype=torch.float64, device=h1.device)
    tiles = Tiles.of(g)
    for panel in h1.panels():
        add_gram_(tiles, panel)
    return g


def first_tolerance(h1: FeaturesWithOnes) -> float:
    return 10.0 * (h1.n + h1.columns) * UNIT[torch.float64]


def near_dependency(features: Tensor | Features, *, ones: bool = True) -> Dependency | None:
    """A small near-dependency among the rows of [features, 1], or None where they are far from dependent.

    Of the rows that a basis drops, VECTORS are written in terms of the rows it keeps; the combination of
    fewest rows is returned, or the first that exact arithmetic confirms, of those of at most 32 rows: then
    ``exact`` is a proof that the rank is below n.
    """
    features = StoredFeatures(features) if isinstance(features, Tensor) else features
    h1 = FeaturesWithOnes(features, ones)
    with ops.exact_products():  # features made anew for exact arithmetic are rounded as those before
        basis = row_basis(lower_gram(h1), first_tolerance(h1))
        if len(basis.dropped) == 0:
            return None
        coefficients, dropped = _combinations(h1, basis)
        kept = basis.kept.cpu()
        candidates = [
            _sparse(features, ones, c, row, kept)
            for c, row in zip(coefficients.cpu(), dropped.tolist(), strict=True)
        ]
        candidates.sort(key=lambda d: (len(d.samples), d.residual))
        for found in candidates[:TRIES]:
            if len(found.samples) <= EXACT:
                exact = _exact_dependency(_rows(features, ones, found.samples))
                if exact is not None:
                    return Dependency(found.samples, exact, 0.0, True)
        return candidates[0]


def _combinations(h1: FeaturesWithOnes, basis: RowBasis) -> tuple[Tensor, Tensor]:
    """C (k, r) with H1[dropped] = C H1[kept] nearly, for the k dropped rows (k,) that need fewest of them."""
    low = basis.factor[basis.kept]
    right = basis.factor[basis.dropped].mT
    c = torch.linalg.solve_triangular(low.mT, right, upper=True).mT
    if c.shape[1] == 0:
        return c[:VECTORS], basis.dropped[:VECTORS]
    support = (c.abs() > 1e-3 * c.abs().amax(1, keepdim=True).clamp(min=1.0)).sum(1)
    few = support.argsort(stable=True)[:VECTORS]
    c, dropped = c[few], basis.dropped[few]
    for _ in range(2):  # the Gram squares the condition number; residuals of the rows do not
        step = torch.zeros_like(c)
        for panel in h1.panels():
            rows = panel[basis.kept]
            step += torch.addmm(panel[dropped], c, rows, alpha=-1.0) @ rows.mT
        half = torch.linalg.solve_triangular(low, step.mT, upper=False)
        c = c + torch.linalg.solve_triangular(low.mT, half, upper=True).mT
    return c, dropped


def _rows(features: Features, ones: bool, samples: list[int]) -> Tensor:
    rows = features.exact_rows(torch.tensor(samples, device=features.device)).cpu()
    return torch.cat([rows, rows.new_ones(len(samples), 1)], 1) if ones else rows


def _sparse(features: Features, ones: bool, c: Tensor, row: int, kept: Tensor) -> Dependency:
    """Row ``row`` minus c over the rows ``kept``, without coefficients that the residual does not miss."""
    largest = max([1.0, *c.abs().tolist()])
    for negligible in (1e-5, 1e-8, 0.0):
        support = (c.abs() > negligible * largest).nonzero()[:, 0]
        pairs = [(row, 1.0), *zip(kept[support].tolist(), (-c[support]).tolist(), strict=True)]
        samples, values = map(list, zip(*sorted(pairs), strict=True))
        rows = _rows(features, ones, samples)
        weights = rows.new_tensor(values)
        size = float((weights.abs()[:, None] * rows.abs()).sum(0).norm())
        residual = float((weights @ rows).norm()) / size if size else 0.0
        if residual < 1e-13:
            break
    return Dependency(samples, values, residual, False)


def _exact_dependency(rows: Tensor) -> list[float] | None:
    """Coefficients, largest 1, of a combination of the rows that is exactly zero; None if none is found.

    rows (k, m) float64. Elimination on the k - 1 columns of greatest pivots gives the only candidate, if
    these are independent; it is then tried on every column.
    """
    k = len(rows)
    if k == 0 or not bool(torch.isfinite(rows).all()):
        return None
    work = (rows / rows.abs().amax(1, keepdim=True)).nan_to_num()  # a zero row stays one
    columns: list[int] = []
    for _ in range(min(k - 1, rows.shape[1])):
        at = int(work.abs().argmax())
        i, j = divmod(at, rows.shape[1])
        if float(work[i, j]) == 0.0:
            break
        columns.append(j)
        work = work - torch.outer(work[:, j] / work[i, j], work[i])
    exact = [[Fraction(v) for v in row] for row in rows[:, columns].tolist()]
    null = _left_null(exact)
    if null is None:
        return None
    for column in rows.mT.tolist():
        if sum(c * Fraction(v) for c, v in zip(null, column, strict=True) if c):
            return None
    largest = max(abs(c) for c in null)
    return [float(c / largest) for c in null]


def _left_null(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """A non-zero c with sum_i c_i rows_i = 0, by elimination; None where the rows are independent."""
    k = len(rows)
    work = [row + [Fraction(int(i == j)) for j in range(k)] for i, row in enumerate(rows)]
    width = len(rows[0]) if rows else 0
    used = 0
    for j in range(width):
        pivot = next((i for i in range(used, k) if work[i][j]), None)
        if pivot is None:
            continue
        work[used], work[pivot] = work[pivot], work[used]
        for i in range(used + 1, k):
            if work[i][j]:
                factor = work[i][j] / work[used][j]
                work[i] = [a - factor * b for a, b in zip(work[i], work[used], strict=True)]
        used += 1
    return work[used][width:] if used < k else None


def prove_rank_of_basis(
    features: Tensor | Features,
    *,
    ones: bool = True,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[int, RankProof | None]:
    """A proved lower bound of the rank of [features, 1], from rows that are proved independent.

    Where the rows kept at one tolerance cannot be proved independent, fewer are tried.
    """
    features = StoredFeatures(features) if isinstance(features, Tensor) else features
    h1 = FeaturesWithOnes(features, ones)
    tolerance = first_tolerance(h1)
    for _ in range(4):
        with ops.exact_products():
            # of the basis only these are named, so that its memory goes to the proof
            kept = row_basis(lower_gram(h1), tolerance).kept.sort().values
        if len(kept) == 0:
            return 0, None
        if len(kept) < h1.n:
            part = FeaturesWithOnes(features.select(kept), ones)
            proof = prove_full_rank(part, sharp=False, progress=progress)
            if proof.proved:
                return len(kept), proof
        tolerance *= 1e3
    return 0, None
