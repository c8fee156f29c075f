"""Logits against 80 digits: their error is within its bound at any scale, and the bound is no guess."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch
from heads_exact import DIGITS, draw, rows_of

from gcfast.features import checked
from gcfast.proofs import bounded_logits


@pytest.mark.parametrize("ordinary", [True, False])
def test_logits_are_within_their_error(ordinary):
    rounded = 0
    for seed in range(40):
        drawn = draw(seed, ordinary=ordinary)
        weight, bias = drawn.head
        z, error, norms = bounded_logits(checked(drawn.features), weight, bias)
        with mp.workdps(DIGITS):
            exact = drawn.exact.logits(rows_of(weight), None if bias is None else rows_of(bias))
            for row, near, by in zip(exact, z.tolist(), error.tolist(), strict=True):
                for value, x, e in zip(row, near, by, strict=True):
                    assert abs(value - mp.mpf(x)) <= e
                    rounded += value != mp.mpf(x)
            for h, norm in zip(drawn.exact.h, norms.tolist(), strict=True):
                assert mp.sqrt(mp.fdot(h, h) + (bias is not None)) <= norm
        if ordinary:
            size = drawn.features.double().abs() @ weight.abs().T + (0.0 if bias is None else bias.abs())
            assert bool((error <= 1e-14 * size).all()) and bool((norms <= 1e3).all())
    assert rounded > 100  # there was something to bound


def test_products_that_underflow_count():
    """2^-600 times 2^-600 is nothing in float64, thirty times over."""
    tiny = torch.full((2, 30), 2.0**-600, dtype=torch.float64)
    z, error, norms = bounded_logits(checked(tiny), tiny, None)
    assert bool((z == 0).all()) and bool((error > 0).all()) and bool((norms >= 2.0**-600 * 30**0.5).all())
