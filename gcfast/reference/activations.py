"""Activation functions and their derivatives of any order, exact to rounding, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACTIVATIONS = ("softplus", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "relu")

_A = 2.0 * math.sqrt(2.0 / math.pi)  # gelu_tanh(x) = x * sigmoid(A x + B x^3)
_B = 0.044715 * _A


def _logistic(t: Tensor) -> Tensor:
    """sigmoid, with its relative accuracy kept down to denormal results (torch.sigmoid gives 0 there)."""
    e = torch.exp(-t.abs())
    return torch.where(t < 0, e, torch.ones_like(e)) / (1 + e)


def _softplus(x: Tensor, beta: float, order: int) -> Tensor:
    t = x * beta
    if order == 0:
        # not F.softplus: its threshold of 20 is an error of 2e-9
        low = torch.log1p(torch.exp(-t.abs())) / beta
        return x.clamp(min=0) + low
    if order == 1:
        return _logistic(t)
    return beta * _logistic(t) * _logistic(-t)


def _sigmoid(x: Tensor, order: int) -> Tensor:
    if order == 0:
        return _logistic(x)
    slope = _logistic(x) * _logistic(-x)
    return slope if order == 1 else -slope * torch.tanh(0.5 * x)


def _tanh(x: Tensor, order: int) -> Tensor:
    if order == 0:
        return torch.tanh(x)
    slope = 4 * _logistic(2 * x) * _logistic(-2 * x)
    return slope if order == 1 else -2 * torch.tanh(x) * slope


def _gated(x: Tensor, v: Tensor, dv: Tensor | float, ddv: Tensor | float, limit: float, order: int) -> Tensor:
    """x * sigmoid(v(x)) and its derivatives; beyond `limit` the sigmoid is 0 or 1 to all digits."""
    s, r = _logistic(v), _logistic(-v)
    near = x.clamp(-limit, limit)
    if order == 0:
        return x.clamp(min=-limit) * s
    if order == 1:
        return s + near * s * r * dv
    return s * r * (2 * dv + near * ddv - near * dv * dv * torch.tanh(0.5 * v))


def _silu(x: Tensor, order: int) -> Tensor:
    return _gated(x, x, 1.0, 0.0, 2000.0, order)


def _gelu_tanh(x: Tensor, order: int) -> Tensor:
    near = x.clamp(-40.0, 40.0)
    v = near * (_A + _B * near * near)
    return _gated(x, v, _A + 3 * _B * near * near, 6 * _B * near, 40.0, order)


def _gelu(x: Tensor, order: int) -> Tensor:
    near = x.clamp(-200.0, 200.0)
    if order == 0:
        return x.clamp(min=-200.0) * (0.5 * torch.erfc(-near * math.sqrt(0.5)))
    density = torch.exp(-0.5 * near * near) / math.sqrt(2 * math.pi)
    if order == 1:
        return 0.5 * torch.erfc(-near * math.sqrt(0.5)) + near * density
    return density * (2 - near * near)


def _relu(x: Tensor, order: int) -> Tensor:
    if order == 0:
        return x.clamp(min=0)
    nan_or_zero = torch.where(x.isnan(), x, torch.zeros_like(x))
    return nan_or_zero if order == 2 else torch.where(x > 0, torch.ones_like(x), nan_or_zero)


_FUNCTIONS = {
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "relu": _relu,
}


def working(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def activation(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    order: int = 0,
    grad: Tensor | None = None,
) -> Tensor:
    """grad * act^(order)(x + bias), `bias` along the last dimension, `grad` of x's shape; both optional.

    softplus is log(1 + exp(beta x)) / beta; the others take no beta. relu's first derivative at 0 is 0.
    """
    work = working(x)
    if bias is not None:
        work = work + working(bias)
    out = _softplus(work, beta, order) if activation == "softplus" else _FUNCTIONS[activation](work, order)
    if grad is not None:
        out = out * working(grad)
    return out.to(x.dtype)
