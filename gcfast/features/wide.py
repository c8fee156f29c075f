"""Features of a wide layer that are made anew whenever they are looked at and never stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcfast import errors, ops
from gcfast.features.matrix import Features
from gcfast.features.reading import as_matrix
from gcfast.model import alteration
from gcfast.nn import WideLayer
from gcfast.ops import arguments


class WideFeatures(Features):
    """act(z weight^T + bias) (n, m), computed again whenever it is looked at and never stored.

    Args:
        z: (n, d), what enters the wide layer: a tensor, a numpy array (memory-mapped ones are read as
            needed), or an iterable of blocks of rows.
        layer: a :class:`gcfast.WideLayer` without hooks, masks or another ``forward``, or (weight (m, d),
            bias (m,)).
        activation, beta: with a pair of tensors, as in :func:`gcfast.ops.activation`.

    The weights are copied, so that it stays what it is while the layer is trained; z is not.
    ``certify`` and ``solve_head`` take it in the place of a matrix of features. What is proved of it is
    proved of one definite matrix: the layer evaluated in float64 (:func:`gcfast.ops.wide_panel`, which gives
    the same bits every time), its values rounded to float32 where the layer is float32.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        z: Tensor | np.ndarray | Iterable[Any],
        layer: WideLayer | tuple[Tensor, Tensor],
        *,
        activation: str = "softplus",
        beta: float = 1.0,
    ):
        pair: Any = layer
        if isinstance(layer, WideLayer):
            altered = alteration(layer)
            if altered is not None:
                raise ValueError(
                    f"layer: expected a plain gcfast.WideLayer, whose features can be made anew; {altered}. "
                    "Give what it computes, as a tensor, or (weight, bias) if the formula alone is meant"
                )
            activation, beta = layer.activation, layer.beta
            pair = (layer.weight, layer.bias)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2) or not all(
            isinstance(t, Tensor) for t in pair
        ):
            raise TypeError(
                f"layer: expected a gcfast.WideLayer or (weight, bias); got {type(layer).__name__}"
            )
        self._given: dict[str, Tensor] = {"weight": pair[0], "bias": pair[1]}
        for name, value in self._given.items():
            errors.is_dense(f"layer: {name}", value)
        # copies: the matrix stays what it is while the layer is trained
        weight, bias = (t.detach().clone() for t in pair)
        matrix, self.mapped = as_matrix(z, "z", "(n, d)")
        arguments.wide_rows("WideFeatures", matrix[:1].to(weight.dtype), weight, bias)
        arguments.is_activation(activation, beta)
        self.z, self.weight, self.bias = matrix, weight, bias
        self.settings: dict[str, Any] = {"activation": activation, "beta": float(beta)}
        self.n, self.d, self.m = len(matrix), matrix.shape[1], len(weight)
        self.dtype, self.device = weight.dtype, matrix.device
        self._doubled: tuple[int, tuple[Tensor, Tensor, Tensor]] | None = None

    def forget(self) -> None:
        """Look at z anew: it is the user's, who may write to it between two calls, unseen by torch."""
        self._doubled = None

    @property
    def given(self) -> dict[str, Tensor]:
        """The weights as they were given, whose draws may be on record, where they are what they were."""
        kept = {"weight": self.weight, "bias": self.bias}
        same = {key: t for key, t in self._given.items() if torch.equal(t, kept[key])}
        return {**kept, **same}

    @property
    def _double(self) -> tuple[Tensor, Tensor, Tensor]:
        version = 0 if self.z.is_inference() else self.z._version
        # z is the user's, who may have written to it
        if self._doubled is None or self._doubled[0] != version:
            self._doubled = version, (self.z.double(), self.weight.double(), self.bias.double())
        return self._doubled[1]

    def _layer(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if dtype == torch.float64:
            return self._double
        return self.z.to(dtype), self.weight.to(dtype), self.bias.to(dtype)

    def panel(self, start: int, end: int) -> Tensor:
        z, weight, bias = self._double
        panel = ops.wide_panel(z, weight[start:end], bias[start:end], **self.settings)
        return panel if self.dtype == torch.float64 else panel.to(self.dtype).double()

    def columns(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        z, weight, bias = self._layer(dtype)
        if dtype == torch.float64:  # not rounded: as the products with H are
            return ops.wide_panel(z, weight[start:end], bias[start:end], **self.settings)
        return ops.wide_features(z, weight[start:end], bias[start:end], **self.settings)

    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        z = self.z[index].to(dtype)
        if dtype == torch.float64:
            return ops.wide_panel(z, *self._double[1:], **self.settings)
        return ops.wide_features(z, self.weight.to(dtype), self.bias.to(dtype), **self.settings)

    def exact_rows(self, index: Tensor) -> Tensor:
        return self.select(index).panel(0, self.m)

    def select(self, index: Tensor) -> Features:
        part = copy.copy(self)  # of the same weights, which are not copied again
        part.z, part.n, part.mapped, part._doubled = self.z[index], len(index), False, None
        return part

    def times(self, weight: Tensor) -> Tensor:
        return ops.wide_forward(*self._layer(weight.dtype), weight, **self.settings)

    def transposed_times(self, a: Tensor) -> Tensor:
        return ops.wide_head_grad(*self._layer(a.dtype), a, **self.settings)

    def gram_times(self, r: Tensor) -> Tensor:
        return ops.wide_gram_product(*self._layer(r.dtype), r, **self.settings)

    def keys(self) -> Tensor:
        return self.z

    def identity(self) -> tuple[Any, ...]:
        return ("wide", self.z, self.weight, self.bias, self.settings["activation"], self.settings["beta"])

    @property
    def nbytes(self) -> int:
        return 0 if self.mapped else self.z.numel() * self.z.element_size()
