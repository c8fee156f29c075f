"""Scaling by powers of two, where products of a matrix's entries would leave float64's range.

Rows of D H1, for D diagonal with powers of two 2^k_i, are those of H1 with other exponents: not a bit is
lost, which is checked. D H1 has the rank of H1, and with 2^low <= 2^k_i <= 2^high

    sigma_min(H1) >= sigma_min(D H1) / 2^high,    sigma_max(H1) <= sigma_max(D H1) / 2^low.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gcfast.features import FeaturesWithOnes
from gcfast.proofs.tiles import Tiles

LEAST, GREATEST = 2.0**-200, 2.0**200  # of entries whose products, and squares of these, are in range
NORMAL = 2.0**-1022  # the least positive number whose digits are all there


def times_power(x: Tensor, exponents: Tensor) -> Tensor:
    """x 2^exponents, which broadcast against x, in two steps: neither 2^1074 nor 2^-1075 is a float64."""
    half = torch.div(exponents, 2, rounding_mode="trunc")
    return x * torch.exp2(half) * torch.exp2(exponents - half)


def lower_power(x: float, exponent: int) -> float:
    """At most x 2^exponent, for x >= 0; 0 where that may have been rounded to a normal number."""
    try:
        value = math.ldexp(x, exponent)
    except OverflowError:
        return torch.finfo(torch.float64).max
    return value if value > NORMAL else 0.0


def upper_power(x: float, exponent: int) -> float:
    """At least x 2^exponent, for x >= 0, and at least the least normal number."""
    try:
        return max(math.ldexp(x, exponent), NORMAL)
    except OverflowError:
        return math.inf


class ScaledRows(FeaturesWithOnes):
    """D H1; ``exponents`` (n,) float64, whole numbers: D = diag(2^exponents)."""

    def __init__(self, h1: FeaturesWithOnes, exponents: Tensor):
        super().__init__(h1.features, h1.ones)
        self.exponents = exponents

    def panels(self, *args: int) -> Iterator[Tensor]:
        for panel in super().panels(*args):
            yield times_power(panel, self.exponents[:, None])

    @property
    def low(self) -> int:
        return int(self.exponents.amin())

    @property
    def high(self) -> int:
        return int(self.exponents.amax())


def scaled_rows(h1: FeaturesWithOnes) -> ScaledRows | None:
    """D H1 with the largest entry of each row in [1/2, 1); None where a digit of some entry would be lost.

    That is so for rows that hold numbers farther apart than float64's range of normal ones, and for NaN and
    infinities.
    """
    largest = torch.zeros(h1.n, dtype=torch.float64, device=h1.device)
    least = torch.full_like(largest, math.inf)  # of those that are not zero
    for panel in h1.panels():
        size = panel.abs()
        largest = torch.maximum(largest, size.amax(1))  # keeps a NaN
        least = torch.minimum(least, torch.where(size > 0, size, math.inf).amin(1))
    if not bool(torch.isfinite(largest).all()):
        return None
    exponents = -torch.frexp(largest)[1].to(torch.float64)
    # upward every number is scaled exactly; downward those are that stay normal
    kept = (exponents >= 0) | (least >= times_power(torch.full_like(least, NORMAL), -exponents))
    return ScaledRows(h1, exponents) if bool(kept.all()) else None


def scale_columns_(x: Tiles, exponents: Tensor) -> None:
    """x diag(2^exponents) in place, for exponents (n,) <= 0; what becomes denormal is off by 2^-1073."""
    if bool(exponents.any()):
        for i, j in x.pairs():
            x[i, j].copy_(times_power(x[i, j], exponents[None, x.spans[j]]))


def scaled_matrix(x: Tensor) -> tuple[Tensor, int]:
    """x 2^-e in float64 and e; x itself and 0 where products of entries are far from the ends of float64.

    x (n, m), finite. Entries become at most 1. What that makes denormal is off by 2^-1074 at most.
    """
    low, high = (float(v) for v in torch.aminmax(x))
    largest = max(-low, high)
    if largest == 0.0 or LEAST <= largest <= GREATEST:
        return x, 0
    exponent = math.frexp(largest)[1]
    shift = torch.full((1, 1), -float(exponent), dtype=torch.float64, device=x.device)
    return times_power(x.to(torch.float64), shift), exponent
