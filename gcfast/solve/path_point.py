"""One point of the regularisation path, and the factors by which lambda falls."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PATH_FACTOR = 0.1  # lambda shrinks by this; the path is nearly linear in log lambda, so it is extrapolated
LOOSE, TIGHT = 3.0, 1e-2  # P - D over (lambda/2)|U|^2 on the way and at the end
MAX_PATH = 60


@dataclass
class PathPoint:
    """Where the path is: what the next point needs of the ones before."""

    index: int
    lam: float
    a: Tensor
    f: Tensor
    previous: tuple[float, Tensor, Tensor] | None = None
    flat: int = 0
    attempts: int = 0
