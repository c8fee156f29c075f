"""Checks of features and targets before any work: shapes, dtypes, finite values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcfast.features.matrix import Features, StoredFeatures
from gcfast.features.reading import as_matrix
from gcfast.features.wide import WideFeatures


def as_features(data: Any, name: str = "features") -> Features:
    """:class:`Features` of a tensor, an array, blocks of rows, or what is one already; finite, not empty.

    Raises TypeError and ValueError naming the argument.
    """
    if isinstance(data, Features):
        return data
    matrix, mapped = as_matrix(data, name)
    return StoredFeatures(matrix, mapped)


def _all_finite(x: Tensor) -> bool:
    """One pass without copies of x: a sum may overflow where no entry does, then parts are looked at."""
    if bool(torch.isfinite(x.sum(-1)).all()):
        return True
    return all(bool(torch.isfinite(part).all()) for part in x.split(4096))


def check_features(features: Tensor, name: str = "features") -> None:
    """Raise what is wrong with an (n, m) matrix of features."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor (n, m); got {type(features).__name__}")
    if features.dim() != 2:
        raise ValueError(f"{name}: expected shape (n, m); got {tuple(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"{name}: expected a real floating point dtype; got {features.dtype}")
    if features.shape[0] == 0:
        raise ValueError(f"{name}: the training set is empty (shape {tuple(features.shape)})")
    if _all_finite(features):
        return
    for start in range(0, len(features), 4096):
        bad = (~torch.isfinite(features[start : start + 4096])).nonzero()
        if len(bad):
            i, j = (bad[0] + torch.tensor([start, 0], device=bad.device)).tolist()
            raise ValueError(f"{name}: not finite: {float(features[i, j])} at sample {i}, unit {j}")


def checked(data: Any, name: str = "features") -> Features:
    """:class:`Features` of what a user gave, finite and not empty; TypeError and ValueError naming it."""
    if isinstance(data, Features):
        if isinstance(data, WideFeatures):
            data.forget()
            check_features(data.z, "z")
            for part, value in (("weight", data.weight), ("bias", data.bias)):
                if not _all_finite(value):
                    raise ValueError(f"{part}: the wide layer's {part} is not finite")
        elif isinstance(data, StoredFeatures):
            check_features(data.matrix, name)
        return data
    found = as_features(data, name)
    assert isinstance(found, StoredFeatures)
    check_features(found.matrix, name)
    return found
