"""Proof of full row rank in floating point, rounding errors included.

``prove_full_rank`` shows that H1 = [H, 1] (n x (m+1)) has rank n, as stored. Only matrix products are
trusted, by their error bound (:mod:`gcfast._products`). Factorisations only propose a witness; a bad proposal
makes the proof fail, never succeed wrongly. Two routes, the short one first:

- *Shift* (:mod:`gcfast._shift`): lambda_min(H1 H1^T) >= s - errors, up to condition numbers near 1e6.
- *Whitening* (:mod:`gcfast._whitening`): sigma_min(X H1) > 0 for a witness X, up to about 1e13.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gcfast._products import PANEL, UNIT, StackedOnes, _up, check_products, exact_products, gamma, norm_upper
from gcfast._shift import BoundedGram, ShiftProof, bounded_gram, prove_by_shift
from gcfast._whitening import INNER32, Whitened, cholesky_inverse, lower_mm, norm_sharp, whiten

__all__ = ["RankProof", "_up", "exact_products", "gamma", "proof_bytes", "prove_full_rank"]


@dataclass(frozen=True)
class RankProof:
    """Outcome of :func:`prove_full_rank`.

    ``proved``: rank(H1) = n is proved. ``sigma_min_lower`` / ``sigma_max_upper``: proved bounds on the
    extreme singular values (0 and inf where not proved). ``margin``: what the errors leave of 1, which is
    perfect: a proved lower bound of sigma_min(X H1) for the witness X of whitening, (s - errors) / s for a
    shift s. ``passes``: of whitening. ``reason``: one sentence. ``route``: what proved it, None where nothing
    did; both routes rest on the error bound of matrix products and on nothing else.
    """

    proved: bool
    sigma_min_lower: float
    sigma_max_upper: float
    margin: float
    passes: int
    reason: str
    route: Literal["shift", "whitening"] | None = None


def proof_bytes(n: int, m: int) -> int:
    """Peak bytes of :func:`prove_full_rank` beyond the features."""
    # Gram, witness, LAPACK's result and, where whitening is repeated, the product of two witnesses; panels
    return 4 * n * (7 * n + 10 * min(PANEL, m + 1)) + (1 << 25)


def prove_full_rank(
    features: Tensor | StackedOnes,
    *,
    ones: bool = True,
    sharp: bool = True,
    max_passes: int = 6,
    progress: Callable[[str, float], None] | None = None,
) -> RankProof:
    """Prove that [features, 1] has full row rank n; see the module's docstring for the method.

    Args:
        features: (n, m) float32 or float64, finite, n <= m + 1; float32 is taken exactly, as float64. Or
            panels of features that are not stored (``_products.WidePanels``), which say themselves whether
            a column of ones is appended.
        ones: append the column of ones (the head's bias).
        sharp: spend about a third more time on a bound of sigma_min within some per cent of the truth.
        max_passes: of whitening; each gains about six digits of the condition number.
        progress: called with a step's name and the fraction done.
    """
    tell = progress or (lambda step, fraction: None)
    h1 = features if isinstance(features, StackedOnes) else StackedOnes(features, ones)
    n = h1.n
    if n == 0:
        return RankProof(True, math.inf, 0.0, 1.0, 0, "no rows")
    with exact_products():
        check_products(h1.device)
        tell("Gram", 0.0)
        g = bounded_gram(h1)
        if not math.isfinite(g.error) or float(g.lower.diagonal().amin()) < 1e-290:
            rows, one = h1.abs_products()
            sigma_max = _up(math.sqrt(one * float(rows.amax())), n + h1.columns)
            reason = "the Gram over- or underflows float64; rescale the features"
            return RankProof(False, 0.0, sigma_max, 0.0, 0, reason)
        sigma_max = _up(math.sqrt(_up(g.norm + g.error)))
        if n > h1.columns:
            reason = f"{n} rows of {h1.columns} numbers are dependent"
            return RankProof(False, 0.0, sigma_max, 0.0, 0, reason)
        short = prove_by_shift(g, sharp, tell)
        if short is not None and (not sharp or short.lower >= 0.75 * short.estimate):
            tell("done", 1.0)
            return _shifted(short, sigma_max)
        proof = _by_whitening(h1, g, sigma_max, sharp, max_passes, tell)
        if short is not None and not proof.sigma_min_lower**2 > short.lower:
            proof = _shifted(short, sigma_max)
        tell("done", 1.0)
        return proof


def _shifted(short: ShiftProof, sigma_max: float) -> RankProof:
    low = math.sqrt(short.lower) * (1 - 1e-15)
    reason = (
        f"shift: sigma_min(H1)^2 >= {short.lower:.3e}, {short.margin:.0%} of the shift left by the errors"
    )
    return RankProof(True, low, sigma_max, short.margin, 0, reason, "shift")


def _by_whitening(
    h1: StackedOnes,
    g: BoundedGram,
    sigma_max: float,
    sharp: bool,
    max_passes: int,
    tell: Callable[[str, float], None],
) -> RankProof:
    """Empties ``g``, for its memory."""
    n, least = h1.n, 11.0 * (h1.n + h1.columns) * UNIT[torch.float64]

    def refused(reason: str, margin: float = 0.0, passes: int = 0) -> RankProof:
        return RankProof(False, 0.0, sigma_max, margin, passes, reason)

    tell("Cholesky, whitening", 0.5)
    found = cholesky_inverse(g.lower, least)
    g.lower = g.lower.new_zeros((0, 0))
    if found is None:
        return refused("no Cholesky factor, even of the shifted Gram")
    x, shift = found
    best: tuple[Tensor, Whitened] | None = None
    passes, last = 0, "rows dependent, or nearly so: the witness is too large for any error bound"
    while passes < max_passes:
        passes += 1
        tell("whitening", 0.5 + 0.3 * passes / max_passes)
        # float32 for the second Gram: it is near the identity, and halves the time where its bound allows
        single = shift == 0.0 and 0.8 * n * gamma(INNER32 + h1.columns // INNER32, torch.float32) < 0.2
        white = whiten(h1, x, torch.float32 if single else torch.float64)
        if white is None:
            break
        last = (
            f"||G2 - I|| <= {white.distance:.1e}, product error {white.product_error:.1e}, witness error "
            f"{white.witness_error:.1e} (their sum must stay below 1)"
        )
        better = white.margin > (best[1].margin if best else 0.0)
        if better:
            best = (x, white)
        # a small margin makes a poor bound of sigma_min, which another pass would mend
        if passes == max_passes or (best and (not sharp or not better or white.margin > 0.9)):
            break
        found = cholesky_inverse(white.gram.to(torch.float64), least)
        white.gram = white.gram.new_zeros((0, 0))
        if found is None:
            break
        x, shift = lower_mm(found[0], x), found[1]
        del found
    if best is None:
        return refused(f"whitening proves nothing here: {last}", passes=passes)
    x, white = best
    white.gram = white.gram.new_zeros((0, 0))
    tell("norm of the witness", 0.85)
    norm = norm_sharp(x) if sharp else norm_upper(x)
    lower = white.margin / norm * (1 - 1e-14)
    doubled = " in doubled precision" if white.doubled else ""
    reason = f"whitening{doubled}: sigma_min(X H1) >= {white.margin:.6f}, ||X|| <= {norm:.3e}"
    return RankProof(True, lower, sigma_max, white.margin, passes, reason, "whitening")
