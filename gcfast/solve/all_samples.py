"""The path's problem over all samples at once: by K, stored or not, or by singular vectors of H1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gcfast.solve.newton import NewtonState, Problem, minimise
from gcfast.solve.path_point import TIGHT, PathForm
from gcfast.solve.problem import HeadProblem


class AllSamples(PathForm):
    """Newton's method on a :class:`Problem` of all samples."""

    def __init__(self, name: str, head_problem: HeadProblem, problem: Problem):
        self.name, self.head_problem, self.problem, self.scale = name, head_problem, problem, problem.scale

    @property
    def counts(self) -> tuple[int, int]:
        return self.problem.steps, self.problem.products

    def zero(self) -> Tensor:
        return self.problem.zero()

    def outputs(self, a: Tensor) -> Tensor:
        return self.problem.product(a)

    def direction(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.problem.direction(self.head_problem, a)

    def coordinates(self, step: tuple[Tensor, Tensor | None]) -> Tensor | None:
        return self.problem.coordinates(*step)

    def noise(self, a: Tensor) -> float:
        return self.problem.noise(a)

    def evaluate(self, a: Tensor, f: Tensor, lam: float) -> float:
        return self.problem.evaluate(a, f, lam)

    def minimise(self, a: Tensor, f: Tensor, lam: float, tolerance: float) -> NewtonState:
        return minimise(self.problem, NewtonState(a, f), lam, tolerance)

    def kept(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        return ({}, {}) if self.problem.repeatable else None

    def polish(self, state: NewtonState, lam: float) -> tuple[NewtonState, bool]:
        """Iterative refinement: the true outputs become the offset, until no step is left to take.

        U is summed up step by step: H1^T A would round by what cancels in it.
        """
        decay, gap = self.head_problem.weight_decay, self.head_problem.target_gap
        du, db = self.direction(state.a)
        for _ in range(6):
            self.problem.offset = self.head_problem.outputs((du, db)) - state.f
            steps = self.problem.steps
            tolerance = 0.5 * gap / max(state.quadratic, 1e-300) if decay else TIGHT
            before, gap_before = state.a, state.gap
            state = minimise(self.problem, state, lam, tolerance)
            if self.problem.steps != steps:
                more, more_b = self.direction(state.a - before)
                du, db = du + more, None if db is None or more_b is None else db + more_b
            state.step = du, db
            failing = state.gap > max(tolerance * state.quadratic, 0.5 * gap_before)
            if self.problem.steps == steps or failing:  # within the tolerance, or rounding leaves no way down
                return state, state.gap <= (gap if decay else 5 * TIGHT * state.quadratic)
        return state, False
