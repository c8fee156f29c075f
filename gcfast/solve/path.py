"""The regularisation path of the nearest minimiser: lambda falls until the loss is within the target gap."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gcfast.proofs import SMALLEST
from gcfast.solve.newton import NewtonState
from gcfast.solve.path_checkpoint import PathCheckpoint
from gcfast.solve.path_point import FIRST, LOOSE, MAX_PATH, PATH_FACTOR, PathForm, PathPoint
from gcfast.solve.problem import HeadProblem
from gcfast.solve.solution import Progress

REGULARISED = "minimiser of the regularised problem, certified by duality"
ARRIVED = "nearest minimiser within the target gap, certified by duality"
WITHIN = "within the target gap; how far the nearest such head may be is distance_bound"
ROUNDING = "rounding in the dtype of the head keeps the loss above the target"
OVERFLOW = "the squares of the features overflow float64: scale them"
LOST = 0.1  # rounding of the outputs, as a share of them, at which they are no longer the head's
DEEPEST = 1e-40  # of the first lambda: singular values of a 1e-16th, squared, and the target gap
EASY = 5  # Newton steps: where the loss stands still and they are no more, lambda falls faster
ATTEMPTS = 6  # to get below the target where it is rounding that keeps the loss above


@dataclass
class PathEnd:
    """The last point of the path, its lambda, and why the path ends there."""

    state: NewtonState | None  # None: U = 0
    lam: float
    reason: str
    arrived: bool


def follow(
    form: PathForm,
    keeper: PathCheckpoint,
    on_progress: Callable[[Progress], None],
    began: float,
    start: PathPoint | None = None,
    patience: int = 4,
) -> PathEnd:
    """Follow the path down in lambda: to the target, or to the weight decay, and no further than it leads.

    Where the loss stands still, lambda falls faster: a long way down nothing may matter, if one column of the
    features is far larger than the others. The path is at its end where rounding is what moves the outputs,
    or where ``patience`` points in turn do not get done: with weight decay that is left to try. A point that
    fails is taken once more where the form has more digits.
    """
    head_problem, path = form.head_problem, keeper.path
    decay, target_gap, infimum = head_problem.weight_decay, head_problem.target_gap, head_problem.infimum
    first = FIRST * form.scale / head_problem.n
    if not math.isfinite(first):
        return PathEnd(None, decay, OVERFLOW, False)
    point = keeper.point(form) or start or PathPoint(0, max(first, decay), form.zero(), head_problem.zero)
    attained = head_problem.loss.attained(head_problem.targets)
    span = math.log(max(head_problem.initial - infimum, 10 * target_gap) / target_gap)
    while True:
        keeper.keep(form, point)
        lam, last = point.lam, point.lam <= decay
        steps = form.counts[0]
        state = form.minimise(point.a, point.f, lam, LOOSE)
        easy = form.counts[0] - steps <= EASY
        settled, failed = False, form.hurried or not state.loss <= head_problem.initial
        if not failed and (last or (not decay and state.loss <= head_problem.target)):
            polished = form.polish(state, lam)
            failed = polished is None
            state, settled = polished or (state, False)
        excess = max(state.loss - infimum, 1e-300)
        flat = bool(path) and excess > 0.95 * (path[-1][1] - infimum) and not (point.attempts or last)
        if failed or flat:
            above, known = (lam, point.a) if point.previous is None else point.previous[:2]
            if form.finer():
                point.a, point.f, point.previous = known, form.outputs(known), None
                continue
            if failed:
                return PathEnd(
                    NewtonState(known, form.outputs(known)), above, why_not_reached(head_problem), False
                )
        path.append((lam, state.loss))
        form.newest = state
        point.index += 1
        point.flat = point.flat + 1 if flat and easy else 0
        fraction = 1.0 if last else min(max(1 - math.log(max(excess / target_gap, 1.0)) / span, 0.0), 1.0)
        gap = state.gap if decay else excess
        on_progress(Progress(point.index, lam, state.loss, gap, time.perf_counter() - began, fraction))
        if last:
            return PathEnd(state, lam, REGULARISED if settled else why_not_reached(head_problem), settled)
        within = not decay and state.loss <= head_problem.target
        if within and settled and form.inside(state):
            return PathEnd(state, lam, ARRIVED, True)
        point.attempts += within * (1 if settled else 4)
        if point.attempts > ATTEMPTS:
            return PathEnd(state, lam, ROUNDING if settled else why_not_reached(head_problem), False)
        unfinished = state.gap > LOOSE * state.quadratic
        if not unfinished and not within:
            form.sound = len(path), lam, state
        again = flat and unfinished and point.previous is not None and point.previous[0] == lam
        point.stuck = point.stuck + again if flat else 0
        wrong = form.noise(state.a) / max(float(state.f.abs().amax()), 1e-300)
        lost = wrong > LOST or lam < max(DEEPEST * first, SMALLEST)
        nowhere = point.stuck >= patience or lost or point.index >= MAX_PATH - bool(decay)
        if nowhere and not decay:
            return PathEnd(state, lam, why_not_reached(head_problem), False)
        shrink = PATH_FACTOR ** min(1 + point.flat, 4)
        if within:
            shrink = 0.7
        elif unfinished and not again and not decay:
            shrink = 1.0
        elif not (attained or decay):
            shrink = max(shrink, min(0.8 * target_gap / excess, 0.8))
        following = decay if nowhere else max(lam * shrink, decay)
        point.a, point.f = state.a, state.f
        if not within and point.previous is not None and following < lam < point.previous[0]:
            point.a, point.f = _extrapolate(form, point.previous, state, lam, following)
        point.previous, point.lam = None if within else (lam, state.a, state.f), following


def why_not_reached(head_problem: HeadProblem) -> str:
    n, m, target_gap = head_problem.n, head_problem.features.m, head_problem.target_gap
    if head_problem.weight_decay:
        return (
            f"the gap {target_gap:g} was not reached at weight_decay = {head_problem.weight_decay:g}: "
            "the features are too badly scaled for float64; scale their columns"
        )
    if n > m + (one := int(head_problem.bias is not None)):
        rank, wide = (f"m + 1 = {m + 1}", "n - 1") if one else (f"m = {m}", "n")
        return (
            f"L* + {target_gap:g} is out of reach: n = {n} samples exceed {rank}; "
            f"gcfast.widen the model to m >= {wide}"
        )
    return (
        f"L* + {target_gap:g} was not reached: the features are too nearly dependent, or too badly scaled, "
        "for float64; gcfast.certify names the samples"
    )


def _extrapolate(
    form: PathForm,
    previous: tuple[float, Tensor, Tensor],
    state: NewtonState,
    lam: float,
    following: float,
) -> tuple[Tensor, Tensor]:
    """Go on linearly in log lambda where that beats standing still: late on the path it is nearly exact."""
    w = math.log(following / lam) / math.log(lam / previous[0])
    a, f = state.a + w * (state.a - previous[1]), state.f + w * (state.f - previous[2])
    ahead = form.evaluate(a, f, following) < form.evaluate(state.a, state.f, following)
    return (a, f) if ahead else (state.a, state.f)
