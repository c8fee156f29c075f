"""The wide layer: act(z weight^T + bias) with m units, initialised so that its features are well spread."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gcfast import _validate, ops
from gcfast.ops import wide_forward

__all__ = ["WideLayer", "wide_forward"]


class WideLayer(nn.Module):
    """act(z weight^T + bias): (..., d) to (..., m).

    Args:
        d: width of the input.
        m: number of units; the guarantee needs about as many as there are training samples.
        activation: softplus, sigmoid, tanh, gelu, gelu_tanh, silu or relu. Every one but relu is real
            analytic, which the theorem route of ``certify`` asks for.
        beta: softplus's sharpness. The default 1.0 is the ordinary softplus, so that step sizes that suit the
            rest of the model suit this layer; a larger beta puts sharper kinks between the samples and lowers
            the condition number of the features.
        device, dtype: of the parameters.

    Attributes: ``weight`` (m, d), ``bias`` (m,), ``activation``, ``beta``.

    Initialisation: weight ~ N(0, 1/d), so that an input with entries of size one gives pre-activations of
    size one at any d and m, and random directions differ between units; bias ~ U(-sqrt 3, sqrt 3), of
    variance one, spreads the kinks over the range of the data, so that no two units are alike even for d = 1
    and none is dead or saturated.
    """

    def __init__(
        self,
        d: int,
        m: int,
        *,
        activation: str = "softplus",
        beta: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d", d), ("m", m)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        _validate.is_activation(activation, beta)
        self.d = d
        self.m = m
        self.activation = activation
        self.beta = float(beta)
        self.weight = nn.Parameter(torch.empty(m, d, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(m, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weight and bias anew, from `generator` if given."""
        self.weight.normal_(0.0, 1.0 / math.sqrt(self.d), generator=generator)
        self.bias.uniform_(-math.sqrt(3.0), math.sqrt(3.0), generator=generator)

    def forward(self, z: Tensor) -> Tensor:
        pre = nn.functional.linear(z, self.weight)
        # Under autocast the product is half precision and so is the sum with the bias.
        return ops.activation(pre, self.bias.to(pre.dtype), activation=self.activation, beta=self.beta)

    def extra_repr(self) -> str:
        return f"{self.d}, {self.m}, activation={self.activation!r}, beta={self.beta:g}"
