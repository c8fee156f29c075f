"""The regularisation path over a working set: the samples that matter, as for support vector machines.

With hard labels the dual variable of a sample, A_i = -residual_i / (lambda n), vanishes where its margin is
large, and late on the path most margins are. So K = H1 H1^T is formed for the working set S alone; the others
have A_i = 0 and are looked at in each pass over the features. Samples whose pull
p_ic K_ii / (lambda n) exceeds a threshold belong to S. At the end the threshold falls until the gradient over
*all* samples, in float64, is within the tolerance: what is certified is the whole problem.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gcfast.features import StoredFeatures
from gcfast.solve.grams import DenseGram
from gcfast.solve.newton import NewtonState, Problem, minimise
from gcfast.solve.path_point import LOOSE, MAX_PATH, PATH_FACTOR, TIGHT, PathPoint
from gcfast.solve.problem import HeadProblem
from gcfast.solve.solution import Progress

ROUGH, FINE = 1e-2, 1e-4  # thresholds on the way and at the end
MOST, GROWTH = 1280, 384  # samples of S at first, and joining at a time; the end has no such limit
FIRST = 3e-3  # the first n lambda over the mean diagonal of the centred Gram: outweighs all but the worst


class WorkingSetFull(Exception):
    """More samples matter than there is room for."""


class WorkingSet:
    """Features (n, m), the Gram of a set S of rows, and passes over all of them: in float32, until
    :meth:`switch_to_float64` makes them float64.

    ``most``: the largest S allowed; beyond it :class:`WorkingSetFull` is raised.
    """

    def __init__(self, head_problem: HeadProblem, most: int | None = None):
        given = self.given = head_problem.features
        self.dtype = torch.float32
        convert = isinstance(given, StoredFeatures) and given.dtype != torch.float32
        self.h = StoredFeatures(given.matrix.to(torch.float32)) if convert else given  # type: ignore[attr-defined]
        self.most = head_problem.n if most is None else most
        self.bias, self.start = head_problem.bias is not None, head_problem.start_logits
        self.targets, self.loss = head_problem.targets, head_problem.loss
        self.n, device = head_problem.n, head_problem.device
        mean = self.h.transposed_times(torch.full((self.n, 1), 1.0 / self.n, device=device))[0]
        # squared distance from the mean row: the diagonal of the centred Gram
        square, cross = self.h.square_norms(mean)
        centred = square - 2 * cross + float(mean @ mean)
        self.diagonal = torch.maximum(centred, (square + float(self.bias)) / self.n).clamp(min=1e-300)
        self.rows = torch.zeros(0, dtype=torch.long, device=device)
        self.gram = torch.zeros((0, 0), dtype=torch.float32, device=device)
        self.chosen = self.h.select(self.rows)
        self.products = self.steps = 0
        self.slow = False
        self.newest: Tensor | None = None

    def switch_to_float64(self) -> bool:
        """From now on in float64; False where that is so already, or S has no room for it."""
        if self.dtype == torch.float64 or len(self.rows) > self.most / math.sqrt(2):
            return False
        self.dtype = torch.float64
        self.most = int(self.most / math.sqrt(2))  # of twice the bytes in the same room
        self.h = self.given
        rows, self.rows = self.rows, self.rows[:0]
        self.gram = torch.zeros((0, 0), dtype=torch.float64, device=self.gram.device)
        if len(rows):
            self.add(rows)
        return True

    def gram_times(self, a: Tensor) -> Tensor:
        """K a (n, C) for a that is zero outside S: a pass over S's features and one over all."""
        part = a[self.rows]
        scale = float(part.abs().amax()) if part.numel() else 0.0
        if scale == 0.0:
            return torch.zeros_like(a)
        part = part / scale
        part[part.abs() < 1e-30] = 0.0
        u = self.chosen.transposed_times(part.to(self.dtype))
        f = self.h.times(u).to(torch.float64)
        if self.bias:
            f += part.sum(0)
        return f * scale

    def choose(self, a: Tensor, f: Tensor, lam: float, threshold: float, most: int) -> None:
        """Add to S the samples that pull most at the outputs start + f, as far as there is room.

        What has a part in a stays: dropping it would cost more steps than its rows cost time.
        """
        z = self.start + f
        _, residual, _ = self.loss.terms(z, self.targets)
        pull = residual.abs().amax(1) * self.diagonal / (self.n * lam)
        pull[self.rows] = 0.0
        new = (pull > threshold).nonzero()[:, 0]
        room = max(most - len(self.rows), GROWTH)
        if len(new) > room:
            new = pull.topk(room).indices
        if len(new):
            self.add(new)

    def add(self, new: Tensor) -> None:
        """Samples to S."""
        k = len(self.rows)
        if k + len(new) > self.most:
            raise WorkingSetFull
        self.rows = torch.cat([self.rows, new])
        self.chosen = self.h.select(self.rows)
        block = self.h.block(new, self.chosen, self.dtype)
        if self.bias:
            block += 1.0
        gram = block.new_empty((len(self.rows), len(self.rows)))
        gram[:k, :k] = self.gram
        gram[k:] = block
        gram[:k, k:] = block[:, :k].mT
        self.gram = gram

    def minimise(self, a: Tensor, f: Tensor, lam: float, tolerance: float) -> tuple[Tensor, NewtonState]:
        """The path's problem at lambda over S, from (a, f = K a); the new a (n, C), zero outside S."""
        rows = self.rows
        problem = Problem(DenseGram(self.gram), self.start[rows], self.loss, self.targets[rows], n=self.n)
        part = a[rows]
        own = problem.product(part)
        problem.offset = self.start[rows] + f[rows] - own  # f may be exact where the Gram is float32
        state = minimise(problem, NewtonState(part, own), lam, tolerance)
        self.products += problem.products
        self.steps += problem.steps
        self.slow |= problem.slow
        new = torch.zeros_like(a)
        new[rows] = state.a
        return new, state


def _mean_loss(working: WorkingSet, f: Tensor) -> float:
    return float(working.loss.value(working.start + f, working.targets).mean())


def _extrapolate(
    working: WorkingSet,
    previous: tuple[float, Tensor, Tensor] | None,
    a: Tensor,
    f: Tensor,
    lam: float,
    following: float,
) -> tuple[Tensor, Tensor]:
    """Go on linearly in log lambda where that is better than standing still."""
    if previous is None:
        return a, f
    w = math.log(following / lam) / math.log(lam / previous[0])
    ahead_a, ahead_f = a + w * (a - previous[1]), f + w * (f - previous[2])

    def value(a: Tensor, f: Tensor) -> float:
        return _mean_loss(working, f) + 0.5 * following * float((a * f).sum())

    return (ahead_a, ahead_f) if value(ahead_a, ahead_f) < value(a, f) else (a, f)


def follow_working_set(
    working: WorkingSet,
    head_problem: HeadProblem,
    target_gap: float,
    path: list[tuple[float, float]],
    on_progress: Callable[[Progress], None],
    began: float,
    point: PathPoint | None = None,
    keep: Callable[[PathPoint], None] = lambda point: None,
    patient: bool = True,
) -> tuple[Tensor, float] | None:
    """(A, lambda) of the point of the path where loss <= L* + target_gap, or None where that is not found.

    ``point``: where to take the path up; ``keep`` is called with it before each point. Where the loss does
    not fall or, unless ``patient``, steps are long, float32 may be why: the rest of the path is in float64.
    Given up where that is no better, or has no room: all samples together are then the easier problem.
    """
    target = head_problem.infimum + target_gap
    if point is None:
        zero = torch.zeros_like(working.start)
        point = PathPoint(0, FIRST * float(working.diagonal.mean()) / head_problem.n, zero, zero.clone())
    initial = _mean_loss(working, torch.zeros_like(working.start))
    span = math.log(max(initial - head_problem.infimum, 10 * target_gap) / target_gap)
    while point.index < MAX_PATH:
        keep(point)
        a, f, lam = point.a, point.f, point.lam
        working.choose(a, f, lam, ROUGH, MOST)
        a, _ = working.minimise(a, f, lam, LOOSE)
        f = working.gram_times(a)
        loss = _mean_loss(working, f)
        good = point.a if point.previous is None else point.previous[1]
        if not loss <= initial or (working.slow and not patient):
            if not retry_in_float64(working, point, good, lam):
                return None
            continue
        working.newest = a
        path.append((lam, loss))
        point.index += 1
        excess = max(loss - head_problem.infimum, 1e-300)
        fraction = min(max(1 - math.log(max(excess / target_gap, 1.0)) / span, 0.0), 1.0)
        on_progress(Progress(point.index, lam, loss, excess, time.perf_counter() - began, fraction))
        if loss <= target:
            polished = _polish(working, head_problem, a, f, lam, target)
            if polished is None:
                if not retry_in_float64(working, point, good, lam):
                    return None
                path.pop()
                continue
            a, f, loss, inside = polished
            path[-1] = (lam, loss)
            if inside:
                return a, lam
            point.attempts += 1
            if point.attempts > 6:
                return None
            point.lam, point.a, point.f, point.previous = 0.7 * lam, a, f, None
            continue
        stalls = len(path) > 1 and excess > 0.95 * (path[-2][1] - head_problem.infimum)
        if stalls and retry_in_float64(working, point, good, lam):
            path.pop()
            continue
        point.flat = point.flat + 1 if stalls else 0
        if point.flat >= 4:
            return None
        following = lam * max(PATH_FACTOR, min(0.8 * target_gap / excess, 0.8))
        point.a, point.f = _extrapolate(working, point.previous, a, f, lam, following)
        point.previous, point.lam = (lam, a, f), following
    return None


def retry_in_float64(working: WorkingSet, point: PathPoint, a: Tensor, lam: float) -> bool:
    """Take lambda's point from ``a`` once more, in float64; False where float32 is not to blame."""
    if not working.switch_to_float64():
        return False
    working.slow = False
    point.a, point.f, point.lam, point.previous = a, working.gram_times(a), lam, None
    return True


def _polish(
    working: WorkingSet, head_problem: HeadProblem, a: Tensor, f: Tensor, lam: float, target: float
) -> tuple[Tensor, Tensor, float, bool] | None:
    """Newton steps until the gradient over all samples, in float64, is within the tolerance."""
    for step in range(7):
        working.choose(a, f, lam, FINE * 0.1**step, head_problem.n)
        a, _ = working.minimise(a, f, lam, TIGHT)
        du, db = head_problem.transpose(a)
        true = head_problem.logits(
            head_problem.weight + du,
            None if head_problem.bias is None or db is None else head_problem.bias + db,
        )
        f = true - working.start
        value, residual, _ = head_problem.loss.terms(true, head_problem.targets)
        gw, gb = head_problem.transpose(residual / head_problem.n + lam * a, remember=False)
        gap = (float((gw**2).sum()) + (0.0 if gb is None else float((gb**2).sum()))) / (2 * lam)
        quadratic = 0.5 * lam * float((a * f).sum())
        if gap <= 2 * TIGHT * quadratic:
            loss = float(value.mean())
            return a, f, loss, loss <= target and head_problem.stored_loss(du, db) <= target
    return None
