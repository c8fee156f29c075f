"""Matrix products with proved error bounds, the one thing that gcfast's proofs trust.

|fl(A B) - A B| <= gamma_k |A| |B| for every order of summation, with or without FMA; k the inner length
(Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., section 3.5). Products here are cut into
slices of length ``Tiling.slice_length``, each rounded by itself and then added: gamma_(length + slices) in
the place of gamma_k. An underflow costs at most the least normal number, times an operand where denormal
inputs are flushed too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast import ops, reference
from gcfast.features import PANEL
from gcfast.ops import dispatch

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
SMALLEST_NORMAL = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126}  # flush-to-zero allowed for


class Tiling(NamedTuple):
    """Square tiles of ``block`` rows, products summed over slices of length ``inner``, which divides it."""

    block: int
    slice_length: int

    def slices(self, k: int) -> int:
        return -(-k // self.slice_length)

    def gamma(self, k: int, dtype: torch.dtype = torch.float64) -> float:
        """Of a product of inner length k added up by slices, with two roundings to spare."""
        return gamma(min(k, self.slice_length) + self.slices(k) + 2, dtype)

    def spans(self, n: int) -> list[slice]:
        return [slice(i, min(i + self.block, n)) for i in range(0, n, self.block)]


def tiling(device: torch.device) -> Tiling:
    """Tiles large enough that their products run at full speed, and slices that keep errors small."""
    return Tiling(512, 128) if device.type == "cpu" else Tiling(2048, 512)


def round_up(x: float, terms: int = 8) -> float:
    """x enlarged by ``terms`` roundings of non-negative float64 numbers and a few more, upward.

    It covers ``ops.abs_products`` and ``ops.gram_error_bound`` of an n x m matrix with ``terms`` = n + m.
    """
    return float(x) * (1.0 + 4.0 * (terms + 8) * UNIT[torch.float64])


def gamma(k: int, dtype: torch.dtype = torch.float64) -> float:
    """gamma_k = k u / (1 - k u), rounded up; inf where k u >= 1/2 (the bound is of no use there)."""
    ku = k * UNIT[dtype]
    return math.inf if ku >= 0.5 else round_up(ku / (1.0 - ku))


def add_product_(out: Tensor, a: Tensor, b: Tensor, inner: int, *, lower: bool = False) -> None:
    """out += a b by slices of length ``inner``, each rounded by itself; ``lower``: not above the diagonal."""
    _add(out, a, b, inner=inner, lower=lower)


def add_exact_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b where no sum is rounded, in whatever order."""
    _add(out, a, b, inner=tiling(out.device).slice_length)


def subtract_product_(out: Tensor, a: Tensor, b: Tensor, inner: int) -> None:
    """out -= a b, likewise."""
    _add(out, a, b, alpha=-1.0, inner=inner)


def _add(out: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
    """ops.add_product; a backend that is forced and has no kernel for it is no obstacle to a proof."""
    forced = dispatch.forced()
    if forced is not None and not dispatch.serves("add_product", forced, out):
        reference.add_product(out, a, b, **options)
    else:
        ops.add_product(out, a, b, **options)


def panel_slices(columns: int, inner: int) -> int:
    """Slices of length ``inner`` in all panels of H1, each of which may end in one that is not full."""
    return columns // PANEL * -(-PANEL // inner) + -(-(columns % PANEL) // inner)


def mirror_(g: Tensor) -> Tensor:
    """The lower triangle of g above the diagonal as well, in place."""
    for rows in tiling(g.device).spans(len(g)):
        diagonal = g[rows, rows]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
        g[: rows.start, rows] = g[rows, : rows.start].mT
    return g
