"""The regularisation path of the nearest minimiser: lambda falls until the loss is within the target gap."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gcfast.solve.newton import NewtonState, Problem, minimise
from gcfast.solve.path_checkpoint import PathCheckpoint
from gcfast.solve.path_point import LOOSE, MAX_PATH, PATH_FACTOR, TIGHT, PathPoint
from gcfast.solve.problem import HeadProblem
from gcfast.solve.solution import Progress

REGULARISED = "minimiser of the regularised problem, certified by duality"
ARRIVED = "nearest minimiser within the target gap, certified by duality"


def follow_path(
    problem: Problem,
    head_problem: HeadProblem,
    state: NewtonState,
    lam: float,
    target: float,
    target_gap: float,
    weight_decay: float,
    path: list[tuple[float, float]],
    on_progress: Callable[[Progress], None],
    began: float,
    initial: float,
    keeper: PathCheckpoint,
) -> tuple[NewtonState, float, str]:
    """Follow the path down in lambda to the target; the last point is polished and checked in float64."""
    point = keeper.point(None) or PathPoint(0, lam, state.a, state.f)
    span = math.log(max(initial - head_problem.infimum, 10 * target_gap) / target_gap)
    state, lam = NewtonState(point.a, point.f), point.lam
    while point.index < MAX_PATH:
        keeper.keep_all(point)
        lam = point.lam
        last = weight_decay > 0 and lam <= weight_decay
        state = minimise(problem, NewtonState(point.a, point.f), lam, TIGHT if last else LOOSE)
        if not last and not weight_decay and state.loss <= target:
            state = minimise(problem, state, lam, TIGHT)
        if last:
            for _ in range(3):
                if state.gap <= target_gap:
                    break
                state = minimise(problem, state, lam, 0.5 * target_gap / max(state.quadratic, 1e-300))
            state = _settle(problem, head_problem, state, lam, target_gap)
        path.append((lam, state.loss))
        problem.newest = state
        point.index += 1
        excess = max(state.loss - head_problem.infimum, 1e-300)
        fraction = 1.0 if last else min(max(1 - math.log(max(excess / target_gap, 1.0)) / span, 0.0), 1.0)
        gap = state.gap if weight_decay else excess
        on_progress(Progress(point.index, lam, state.loss, gap, time.perf_counter() - began, fraction))
        if last:
            return state, lam, REGULARISED
        if not weight_decay and state.loss <= target:
            state, inside = _correct(problem, head_problem, state, lam, target)
            if inside:
                path[-1] = (lam, state.loss)
                return state, lam, ARRIVED
            point.attempts += 1
            if point.attempts > 6:
                return state, lam, "rounding in the dtype of the features keeps the loss above the target"
            point.lam, point.a, point.f, point.previous = 0.7 * lam, state.a, state.f, None
            continue
        if len(path) > 1 and state.loss - head_problem.infimum > 0.95 * (path[-2][1] - head_problem.infimum):
            point.flat += 1
            if point.flat >= 4:
                return state, lam, why_not_reached(head_problem, target_gap)
        else:
            point.flat = 0
        if not math.isfinite(state.value):
            return state, lam, "the loss overflowed along the path"
        shrink = (
            PATH_FACTOR
            if head_problem.loss.attained(head_problem.targets)
            else max(PATH_FACTOR, min(0.8 * target_gap / excess, 0.8))
        )
        following = max(lam * shrink, weight_decay) if weight_decay else lam * shrink
        ahead = _extrapolate(problem, point.previous, state, lam, following)
        point.previous, point.lam = (lam, state.a, state.f), following
        point.a, point.f = ahead.a, ahead.f
    return state, lam, why_not_reached(head_problem, target_gap)


def _settle(
    problem: Problem, head_problem: HeadProblem, state: NewtonState, lam: float, target_gap: float
) -> NewtonState:
    """With weight decay and a float32 Gram true logits become the offset until the gap is small."""
    if problem.gram.dtype == torch.float64:
        return state
    for _ in range(4):
        du, db = head_problem.transpose(state.a)
        problem.offset = head_problem.logits(du, None if head_problem.bias is None else db) - state.f
        steps = problem.steps
        state = minimise(problem, state, lam, 0.5 * target_gap / max(state.quadratic, 1e-300))
        if problem.steps == steps:
            break
    return state


def _correct(
    problem: Problem, head_problem: HeadProblem, state: NewtonState, lam: float, target: float
) -> tuple[NewtonState, bool]:
    """Iterative refinement: the true logits become the offset."""
    for _ in range(4):
        du, db = head_problem.transpose(state.a)
        true = head_problem.logits(
            head_problem.weight + du,
            None if head_problem.bias is None or db is None else head_problem.bias + db,
        )
        problem.offset = true - state.f
        steps = problem.steps
        state = minimise(problem, state, lam, TIGHT)
        if problem.steps == steps:  # within tolerance at the true logits
            if problem.gram.dtype != torch.float64 and state.gap > 5 * TIGHT * state.quadratic:
                break  # or no step goes down any more, by float32 products
            return state, state.loss <= target and head_problem.stored_loss(du, db) <= target
    return state, False


def why_not_reached(head_problem: HeadProblem, target_gap: float) -> str:
    n, m = head_problem.n, head_problem.features.m
    if n > m + int(head_problem.bias is not None):
        return (
            f"L* + {target_gap:g} is out of reach: n = {n} samples exceed m + 1 = {m + 1}; "
            "gcfast.widen the model to m >= n - 1"
        )
    return (
        f"L* + {target_gap:g} was not reached: the features are too nearly dependent; "
        "gcfast.certify names the samples"
    )


def _extrapolate(
    problem: Problem,
    previous: tuple[float, Tensor, Tensor] | None,
    state: NewtonState,
    lam: float,
    following: float,
) -> NewtonState:
    """Go on linearly in log lambda where that beats standing still: late on the path it is nearly exact."""
    if previous is None:
        return state
    w = math.log(following / lam) / math.log(lam / previous[0])
    a, f = state.a + w * (state.a - previous[1]), state.f + w * (state.f - previous[2])
    ahead, _ = problem.evaluate(a, f, following)
    here, _ = problem.evaluate(state.a, state.f, following)
    return NewtonState(a, f) if ahead < here else state
