"""One point of the regularisation path, and what the path asks of a form of K."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gcfast.solve.newton import NewtonState
from gcfast.solve.problem import HeadProblem

PATH_FACTOR = 0.1  # lambda shrinks by this; the path is nearly linear in log lambda, so it is extrapolated
LOOSE, TIGHT = 3.0, 1e-2  # P - D over (lambda/2)|U|^2 on the way and at the end
MAX_PATH = 100
FIRST = 3e-3  # the first n lambda over the mean diagonal of the centred K: outweighs all but the worst


@dataclass
class PathPoint:
    """Where the path is: what the next point needs of the ones before."""

    index: int
    lam: float
    a: Tensor
    f: Tensor
    previous: tuple[float, Tensor, Tensor] | None = None
    flat: int = 0
    stuck: int = 0
    attempts: int = 0


class PathForm(ABC):
    """The problem in one form of K: coordinates a of U, and the outputs f (n, C) that U adds."""

    name: str
    head_problem: HeadProblem
    scale: float  # mean squared length of a sample about the common mean
    hurried = False  # whether steps took longer than another form's would
    newest: NewtonState | None = None  # the last point of the path, for an interruption
    sound: tuple[int, float, NewtonState] | None = None  # the last one that Newton's method came to an end at

    @property
    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """Newton steps and products so far."""

    @abstractmethod
    def zero(self) -> Tensor:
        """The coordinates of U = 0."""

    @abstractmethod
    def outputs(self, a: Tensor) -> Tensor:
        """f of the coordinates a."""

    @abstractmethod
    def direction(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """U as a step of the weight (C, m) and of the bias (C,)."""

    @abstractmethod
    def evaluate(self, a: Tensor, f: Tensor, lam: float) -> float:
        """P."""

    @abstractmethod
    def noise(self, a: Tensor) -> float:
        """By how much rounding makes the outputs of a wrong."""

    @abstractmethod
    def minimise(self, a: Tensor, f: Tensor, lam: float, tolerance: float) -> NewtonState:
        """From (a, f) to P - D <= tolerance (lambda/2)|U|^2."""

    @abstractmethod
    def polish(self, state: NewtonState, lam: float) -> tuple[NewtonState, bool] | None:
        """To the end of the path, at outputs that float64 gives to U itself, and whether it is reached there.

        None where the form fails.
        """

    def coordinates(self, step: tuple[Tensor, Tensor | None]) -> Tensor | None:
        """Those of a U from another form; None where the form cannot tell."""
        return None

    def finer(self) -> bool:
        """From now on with more digits; False where there are no more."""
        return False

    def kept(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What a checkpoint needs of the form, values and tensors; None where it keeps nothing."""
        return {}, {}

    def restore(self, values: dict[str, Any], tensors: Callable[[str], Tensor]) -> None:
        """Be as the form that kept this."""
        return None

    def step(self, state: NewtonState) -> tuple[Tensor, Tensor | None]:
        """U of the state."""
        return self.direction(state.a) if state.step is None else state.step

    def inside(self, state: NewtonState) -> bool:
        """Whether the loss is within the target, also that of the head as it will be stored."""
        target = self.head_problem.target
        return state.loss <= target and self.head_problem.stored_loss(*self.step(state)) <= target
