"""The arithmetic of outer bounds: what float64 may have hidden of sums, means and entropies.

All of it rests on the model fl(a o b) = (a o b)(1 + d), |d| <= u = 2^-53, with gradual underflow, and on
exp, log and log1p being right to a few u, which the tests of the kernels check. A bound is computed from
rounded numbers too: ``SPARE`` enlarges it by more than 2^32 roundings can take away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**-53
TINY = 2.0**-1021  # above the least normal number: what an underflow may cost
SPARE = 1.0 + 2.0**-20
LEAST_MASS = 2.0**-960  # a share of 2^-60 of it is still a normal number


def nan_is_inf(x: Tensor) -> Tensor:
    """No number, from inf - inf or 0 inf, bounds nothing."""
    return torch.where(x.isnan(), math.inf, x)


def mean_above(values: Tensor, n: int | None = None) -> float:
    """No less than the sum of the values (n,) over n; inf where one is inf or no number."""
    count = max(len(values) if n is None else n, 1)
    try:
        mean = math.fsum(values.tolist()) / count  # fsum rounds once
    except (OverflowError, ValueError):
        return math.inf
    return math.inf if math.isnan(mean) else above(mean)


def mean_below(values: Tensor, n: int | None = None) -> float:
    """No more than the sum of the values (n,) over n."""
    return 0.0 - mean_above(-values, n)


def positive(x: Tensor) -> Tensor:
    """x where it is a positive finite number, elsewhere 0: as a lower bound of what is not negative."""
    return x.nan_to_num(nan=0.0, posinf=0.0).clamp(min=0.0)


def row_means_below(x: Tensor) -> Tensor:
    """No more than the means (n,) of rows (n, C) of numbers >= 0: C - 1 sums, a quotient, this product."""
    return x.mean(1) * (1 - (x.shape[1] + 1) * UNIT)


def above(x: float) -> float:
    """No less than any number that two roundings bring to x; 0 stays 0."""
    return x if x == 0.0 else math.nextafter(math.nextafter(x, math.inf), math.inf)


def gap_above(loss: float, infimum: float) -> float:
    """No less than loss - infimum; inf where that is no number, or below 0, so that one of both is wrong."""
    gap = loss - infimum
    return math.inf if not gap >= 0 else gap if infimum == 0.0 else above(gap)


def entropy_below(mass: Tensor, known: float) -> Tensor:
    """No more than -sum_c M_c log(M_c / S), S = sum_c M_c, for mass (..., C) within M (1 +- known), M >= 0.

    All terms are positive, and each keeps its digits: that of the largest mass M is M log1p((S - M) / M),
    which multiplies a relative error of its argument by at most 1. No other share exceeds 1/2, and its log
    multiplies an error by at most 1 / log 2. An error of e in each mass, and sums of C terms, then make at
    most 4 (e + (C + 8) u). The sum increases with each mass, so those may be left out that could underflow.
    """
    mass = mass * (mass >= LEAST_MASS)
    top = mass.argmax(-1, keepdim=True)
    at_top = mass.gather(-1, top)
    others = mass.scatter(-1, top, 0.0)
    rest = others.sum(-1, keepdim=True)
    terms = -torch.xlogy(others, others / (rest + at_top))
    terms = terms.scatter(-1, top, at_top * torch.log1p(rest / at_top))
    return positive(terms.sum(-1) * (1 - 4 * (known + (mass.shape[-1] + 8) * UNIT)))
