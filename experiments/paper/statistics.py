"""Means with 95 % intervals (Student's t), paired differences, and a straight line through logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """The 95 % interval is ``mean`` ± ``half``; ``half`` is nan for a single value."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if math.isnan(self.half) else f" ± {self.half:.2f}")


def mean(values: Sequence[float]) -> Mean:
    """ValueError without values."""
    n = len(values)
    if n == 0:
        raise ValueError("values: expected at least one")
    if n == 1:
        return Mean(float(values[0]), math.nan, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Mean(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1)) * error, n)


@dataclass(frozen=True)
class Difference:
    """Of paired values; ``p``: the two-sided paired t-test of no difference, 1 where all are equal."""

    mean: float
    half: float
    p: float
    count: int

    def __str__(self) -> str:
        text = f"{self.mean:+.2f}" + ("" if math.isnan(self.half) else f" ± {self.half:.2f}")
        return f"**{text}**" if self.p < 0.05 else text


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """``values`` minus ``others``, pair by pair."""
    if len(values) != len(others):
        raise ValueError(f"others: expected {len(values)} values, as many as values has, got {len(others)}")
    each = [a - b for a, b in zip(values, others)]
    found = mean(each)
    if found.count == 1:
        return Difference(found.mean, math.nan, math.nan, 1)
    if found.half < 1e-9:  # equal but for rounding
        return Difference(found.mean, 0.0, 1.0 if abs(found.mean) < 1e-9 else 0.0, found.count)
    return Difference(found.mean, found.half, float(stats.ttest_1samp(each, 0.0).pvalue), found.count)


def power_law(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(exponent, factor) of y = factor x^exponent, by least squares in the logarithms."""
    if len(points) < 2:
        raise ValueError(f"points: expected at least two, got {len(points)}")
    x, y = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    exponent, constant = np.polyfit(x, y, 1)
    return float(exponent), float(math.exp(constant))
