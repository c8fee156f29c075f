"""Outer bounds of losses: what outputs known to within an error, and float64 itself, may have hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast.losses.base import ConvexLoss
from gcfast.losses.rounding import SPARE, UNIT, nan_is_inf


@dataclass(frozen=True)
class LossBounds:
    """What is known of n samples at outputs within ``error`` (n, C) of z, rounding included.

    ``value`` (n,): no less than loss_i there. ``residual`` (n, C) is as computed at z, and
    ``residual_error`` (n, C) bounds its distance from the gradient r_i of loss_i at z itself. ``excess`` (n,)
    bounds loss_i(z + d) - loss_i(z) - <r_i, d> for |d| <= error. ``computed`` (n,): the values at z, which
    are ``outputs`` (n, C).
    """

    outputs: Tensor
    value: Tensor
    computed: Tensor
    residual: Tensor
    residual_error: Tensor
    excess: Tensor


def bounds_at(loss: ConvexLoss, z: Tensor, y: Tensor, error: Tensor) -> LossBounds:
    """:class:`LossBounds` of a loss at outputs z (n, C), float64, known to within ``error`` (n, C)."""
    computed, residual, _ = loss.terms(z, y)
    of_value, of_residual = loss.rounding(z, y, computed, residual)
    excess = loss.excess(z, y, error, computed, residual) * SPARE
    computed, residual = computed.to(torch.float64), residual.to(torch.float64)
    along = ((residual.abs() + of_residual) * error).sum(1)
    value = computed + (of_value + along + excess + 4 * UNIT * computed.abs()) * SPARE
    return LossBounds(z, nan_is_inf(value), computed, residual, nan_is_inf(of_residual), nan_is_inf(excess))
