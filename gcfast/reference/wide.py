"""The wide layer's outputs, gradients and Gram products with its features formed whole, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast.reference import activations


def wide_features(
    z: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "softplus", beta: float = 1.0
) -> Tensor:
    """act(z weight^T + bias): z (..., d), weight (m, d), bias (m,) to (..., m)."""
    return activations.activation(z @ weight.mT, bias, activation=activation, beta=beta)


def wide_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
) -> Tensor:
    """act(z weight^T + bias) head_weight^T + head_bias: (..., C), with head_weight (C, m)."""
    return torch.nn.functional.linear(
        wide_features(z, weight, bias, activation=activation, beta=beta), head_weight, head_bias
    )


def wide_head_grad(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
) -> Tensor:
    """residual^T act(z weight^T + bias): (C, m), with z (n, d) and residual (n, C)."""
    return residual.mT @ wide_features(z, weight, bias, activation=activation, beta=beta)


def wide_backward(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of wide_forward in z, weight, bias and head_weight; g (n, C): that of its output."""
    pre = z @ weight.mT
    slope = activations.activation(pre, bias, activation=activation, beta=beta, order=1, grad=g @ head_weight)
    phi = activations.activation(pre, bias, activation=activation, beta=beta)
    return slope @ weight, slope.mT @ z, slope.sum(dim=0), g.mT @ phi


def wide_gram_product(
    z: Tensor, weight: Tensor, bias: Tensor, r: Tensor, *, activation: str = "softplus", beta: float = 1.0
) -> Tensor:
    """Phi (Phi^T r) with Phi = act(z weight^T + bias): (n, C), with z (n, d) and r (n, C)."""
    phi = wide_features(z, weight, bias, activation=activation, beta=beta)
    return phi @ (phi.mT @ r)
