"""What a layer gives is compared with its formula, to rounding, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # numbers that are compared at a time


@torch.no_grad()
def first_difference(
    formula: Callable[[Tensor], Tensor],
    z: Tensor,
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    steep: bool = False,
) -> int | None:
    """The first row of ``given`` (k, m) that is not formula(z) to rounding; None where all are.

    ``formula`` is a function of slope 2 at most, or ``steep`` as exp is, of z weight^T + bias: z (k, d),
    weight (m, d), bias (m,). It is computed as the layer computes it, so that what is left is the order of
    summation. What that may move is measured by the formula's values: those given may be anything.
    """
    if given.shape != (len(z), len(weight)):
        return 0
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
    shift = torch.zeros_like(norms) if bias is None else bias.abs().to(torch.float64)
    step = max(1, _AT_ONCE // max(1, len(norms)))
    for start in range(0, len(z), step):
        rows, part = z[start : start + step], given[start : start + step]
        again = formula(rows)
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        size = torch.addcmul(shift, lengths[:, None], norms) * (1 + again.abs() if steep else 2) + again.abs()
        eps = max(torch.finfo(t.dtype).eps for t in (rows, part, again))
        apart = (again - part).abs()
        near = (apart <= 64 * eps * size) & apart.isfinite()
        same = near | (again == part) | (again.isnan() & part.isnan())  # a NaN is near nothing
        bad = (~same.all(1)).nonzero()
        if len(bad):
            return start + int(bad[0])
    return None
