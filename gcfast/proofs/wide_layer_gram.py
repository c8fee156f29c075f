"""K = Phi Phi^T + 1 of a wide layer's features, in float64, with a bound on each entry's error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcfast import errors, ops
from gcfast.features import FeaturesWithOnes, WideFeatures
from gcfast.ops import arguments
from gcfast.proofs.rounding import mirror_
from gcfast.proofs.shift import bounded_gram
from gcfast.proofs.tiles import Tiles


class WideGram(NamedTuple):
    """K = H H^T and a proved bound of what rounding made of it; see :func:`wide_gram`."""

    gram: Tensor
    error_bound: float


def wide_gram(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    ones: bool = False,
) -> WideGram:
    """The Gram matrix of the wide layer's features in float64, the features never stored.

    Args:
        z: (n, d); weight: (m, d); bias: (m,); of one floating dtype and device, any strides, finite.
        activation, beta: as in :func:`gcfast.ops.activation`.
        ones: append a column of ones to the features: H = [Phi, 1] instead of Phi.

    Returns:
        ``gram`` (n, n) float64, symmetric to the bit, and ``error_bound``, with ||gram - H H^T||_2 <=
        ``error_bound`` proved, rounding included, for H the matrix of :func:`gcfast.ops.wide_panel`'s values.
        H is computed by column panels, twice, and is the same to the bit each time. With slices of length k
        and s of them the bound is gamma_(k+s+2) || |H||H|^T ||, plus what underflow may have cost (Higham,
        *Accuracy and Stability of Numerical Algorithms*, section 3.5); inf where the Gram overflows. Memory
        beside the result: about three panels of 1,024 columns. Work: n^2 m + 4 n m d, half of a full product.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    arguments.wide_rows("wide_gram", z, weight, bias)
    arguments.is_activation(activation, beta)
    errors.is_flag("ones", ones)
    for name, value in (("z", z), ("weight", weight), ("bias", bias)):
        errors.is_dense(name, value)
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite; it holds a NaN or an infinity")
    layer = (weight.double(), bias.double())  # the Gram is that of features in float64
    h = FeaturesWithOnes(WideFeatures(z.double(), layer, activation=activation, beta=beta), ones)
    if h.n == 0 or h.columns == 0:
        return WideGram(torch.zeros((h.n, h.n), dtype=torch.float64, device=z.device), 0.0)
    with ops.exact_products(z.device):
        gram = torch.zeros((h.n, h.n), dtype=torch.float64, device=z.device)
        bounded = bounded_gram(h, Tiles.of(gram))
    return WideGram(mirror_(gram), bounded.error)
