"""Phase two, solved: the convex problem in the head alone (Kawaguchi and Sun, AAAI 2021, section 4)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gcfast._descent import descent, exact
from gcfast._newton import PAIRS, Problem, State, minimise
from gcfast._products import exact_products
from gcfast._solution import HeadSolution, Progress, finish
from gcfast._task import Task
from gcfast._working_set import LOOSE, MAX_PATH, PATH_FACTOR, TIGHT, WorkingSet, follow
from gcfast.features import check_features, collect, equal_rows
from gcfast.inspection import Head
from gcfast.losses import (
    ConvexLoss,
    CrossEntropy,
    check_convex,
    infimum_with_copies,
    output_count,
    resolve_loss,
)
from gcfast.memory import require

METHODS = ("nearest", "exact", "gd", "sgd")


def solve_head(
    model_or_features: nn.Module | Tensor,
    data_or_targets: Any,
    *,
    loss: str | nn.Module | ConvexLoss = "cross_entropy",
    start: tuple[Tensor, Tensor | None] | None = None,
    target_gap: float = 1e-6,
    method: str = "nearest",
    weight_decay: float = 0.0,
    max_bytes: int | None = None,
    callback: Callable[[Progress], None] | None = None,
    head: Head | nn.Module | str | None = None,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> HeadSolution:
    """Solve phase two: minimise L over the head (W, b) with the hidden weights frozen.

    Args:
        model_or_features: a model, whose head is updated in place, or features (n, m) without the ones
            column.
        data_or_targets: the training set (inputs, targets), a Dataset or DataLoader with a fixed order; with
            features, the targets: class labels (n,), probabilities (n, C), or real (n, C), by the loss.
        loss: "cross_entropy", "mse", "bce_with_logits", "huber", a ``torch.nn`` loss, or a
            ``gcfast.ConvexLoss``.
        start: V_tau = (weight (C, m), bias (C,)), the point the answer is nearest to. Default: the model's
            head, or zeros.
        target_gap: eps > 0; stop where L <= L* + eps.
        method: ``nearest``, the eps-minimiser nearest to V_tau in Euclidean norm, certified by duality
            (weight decay: the regularised minimiser, centred at zero); ``exact`` (squared loss), the limit of
            gradient descent from V_tau; ``gd`` with step 1/beta; ``sgd`` with square-summable steps,
            batches of 256.
        weight_decay: wd >= 0 adds (wd/2)|V|^2, bias included, as in ``torch.optim``; ``nearest``, ``gd``,
            ``sgd``.
        max_bytes: refuse beforehand what needs more memory than this (default: what the machine has free).
        callback: called with a :class:`Progress`. Ctrl-C ends the work with the best head so far.
        head: module or name, where the model's head is not the last Linear applied.
        max_iterations: of gd (default 10,000) and sgd (epochs, default 200).

    Raises:
        ValueError, TypeError: naming the argument. MemoryError: with the bytes it would take and the way out.
    """
    began = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}; got {method!r}")
    _number("target_gap", target_gap, positive=True)
    _number("weight_decay", weight_decay)
    convex = resolve_loss(loss)
    if isinstance(model_or_features, nn.Module):
        if start is not None:
            raise ValueError("start: the model's own head is the start; give features to start elsewhere")
        seen = collect(model_or_features, data_or_targets, head, inspect=False)
        if seen.targets is None:
            raise ValueError("data: expected (inputs, targets); got inputs alone")
        module = seen.head.module
        task = _task(seen.features, seen.targets, convex, (module.weight, module.bias))
    else:
        check_features(model_or_features)
        if not isinstance(data_or_targets, Tensor):
            raise TypeError(f"targets: expected a tensor; got {type(data_or_targets).__name__}")
        module = None
        task = _task(model_or_features, data_or_targets, convex, start)
    say = callback or (lambda progress: None)
    with exact_products():
        check_convex(convex, task.start_logits[:256], task.targets[:256])
        if method == "exact":
            solution = exact(task, max_bytes, weight_decay, target_gap)
        elif method == "nearest":
            solution = _nearest(task, target_gap, weight_decay, max_bytes, say, began)
        else:
            solution = descent(task, method, target_gap, weight_decay, max_iterations, generator, say, began)
    if module is not None:
        with torch.no_grad():
            module.weight.copy_(solution.weight)
            if module.bias is not None and solution.bias is not None:
                module.bias.copy_(solution.bias)
    solution.seconds = time.perf_counter() - began
    return solution


def _number(name: str, value: float, positive: bool = False) -> None:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value < 0
        or (positive and value == 0)
    ):
        raise ValueError(
            f"{name}: expected a {'positive' if positive else 'non-negative'} finite number; got {value!r}"
        )


def _task(
    features: Tensor, targets: Tensor, loss: ConvexLoss, start: tuple[Tensor, Tensor | None] | None
) -> Task:
    n, m = features.shape
    if targets.device != features.device:
        raise ValueError(
            f"targets: expected on the device of the features, {features.device}; got {targets.device}"
        )
    if start is None:
        c = output_count(targets)
        weight = torch.zeros((c, m), dtype=torch.float64, device=features.device)
        bias: Tensor | None = torch.zeros(c, dtype=torch.float64, device=features.device)
    else:
        if not isinstance(start, (tuple, list)) or len(start) != 2:
            raise TypeError("start: expected (weight (C, m), bias (C,) or None)")
        w, b = start
        if w.dim() != 2 or w.shape[1] != m or (b is not None and b.shape != w.shape[:1]):
            raise ValueError(
                f"start: expected weight (C, {m}) and bias (C,); "
                f"got {tuple(w.shape)} and {None if b is None else tuple(b.shape)}"
            )
        if w.device != features.device:
            raise ValueError(
                f"start: expected on the device of the features, {features.device}; got {w.device}"
            )
        weight = w.detach().to(torch.float64)
        bias = None if b is None else b.detach().to(torch.float64)
        if not bool(torch.isfinite(weight).all()) or (
            bias is not None and not bool(torch.isfinite(bias).all())
        ):
            raise ValueError("start: the weights are not finite")
    y = loss.prepare(targets, n, len(weight))
    return Task(features, y, loss, weight, bias, infimum_with_copies(loss, y, equal_rows(features)))


def _nearest(
    task: Task,
    target_gap: float,
    weight_decay: float,
    max_bytes: int | None,
    say: Callable[[Progress], None],
    began: float,
) -> HeadSolution:
    n, c = task.n, len(task.weight)
    bytes_needed = n * n * 8 + n * 1024 * 8 + 40 * n * c * 8 + 3 * PAIRS**2 * 8
    if task.loss.separable:
        bytes_needed += 2 * min(n, 8192) ** 2 * 8
    require(
        "solve_head(method='nearest')",
        bytes_needed,
        max_bytes,
        task.features.device,
        "use method='sgd', or fewer samples",
    )
    if weight_decay:
        offset = torch.zeros((n, c), dtype=torch.float64, device=task.features.device)
    else:
        offset = task.start_logits
    target = task.infimum + target_gap
    path: list[tuple[float, float]] = []
    zero = torch.zeros((n, c), dtype=torch.float64, device=offset.device)
    initial = task.mean_loss(offset)
    known: dict[str, Any] = {
        "method": "nearest",
        "interrupted": False,
        "iterations": 0,
        "products": 0,
        "peak_bytes": bytes_needed,
        "path": path,
    }
    if not weight_decay and initial <= target:
        return finish(
            task,
            task.weight,
            task.bias,
            lam=0.0,
            gap_target=target_gap,
            weight_decay=0.0,
            reason="the start is within the target",
            **known,
        )
    best = State(zero, zero, initial)
    lam, reason = 0.0, ""
    problem: Problem | None = None
    working: WorkingSet | None = None
    try:
        # hard labels leave few samples near their margin: work on those, and look at all
        if n > 1024 and isinstance(task.loss, CrossEntropy) and task.targets.dim() == 1 and not weight_decay:
            working = WorkingSet(task)
            found = follow(working, task, target_gap, path, say, began)
            known |= {"iterations": working.steps, "products": working.products}
            if found is not None:
                known["peak_bytes"] = working.held_bytes()
                best, lam = State(found[0], zero), found[1]
                return _arrive(task, best, lam, target_gap, weight_decay, ARRIVED, known)
            path.clear()  # all samples at once, in float64, decides
            working = None
        problem = Problem(task.gram(), offset, task.loss, task.targets)
        lam = 3e-3 * float(problem.diagonal.mean()) / n
        if weight_decay:
            lam = max(lam, weight_decay)
        best, lam, reason = _follow(
            problem, task, best, lam, target, target_gap, weight_decay, path, say, began, initial
        )
    except KeyboardInterrupt:
        known["interrupted"] = True
        reason = "interrupted; the best head so far"
        lam = path[-1][0] if path else 0.0
        if problem is not None and problem.newest is not None:
            best = problem.newest
        elif working is not None and working.newest is not None:
            best = State(working.newest, zero)
    if problem is not None:
        known |= {"iterations": problem.steps, "products": problem.products}
    return _arrive(task, best, lam, target_gap, weight_decay, reason, known)


ARRIVED = "nearest minimiser within the target gap, certified by duality"


def _arrive(
    task: Task,
    best: State,
    lam: float,
    target_gap: float,
    weight_decay: float,
    reason: str,
    known: dict[str, Any],
) -> HeadSolution:
    du, db = task.transpose(best.a)
    weight = du if weight_decay else task.weight + du
    bias = None if task.bias is None or db is None else (db if weight_decay else task.bias + db)
    return finish(
        task, weight, bias, lam=lam, gap_target=target_gap, weight_decay=weight_decay, reason=reason, **known
    )


def _follow(
    problem: Problem,
    task: Task,
    state: State,
    lam: float,
    target: float,
    target_gap: float,
    weight_decay: float,
    path: list[tuple[float, float]],
    say: Callable[[Progress], None],
    began: float,
    initial: float,
) -> tuple[State, float, str]:
    """Follow the path down in lambda to the target; the last point is polished and checked in float64."""
    previous: tuple[float, State] | None = None
    flat, corrections = 0, 0
    span = math.log(max(initial - task.infimum, 10 * target_gap) / target_gap)
    for index in range(MAX_PATH):
        last = weight_decay > 0 and lam <= weight_decay
        state = minimise(problem, state, lam, TIGHT if last else LOOSE)
        if not last and not weight_decay and state.loss <= target:
            state = minimise(problem, state, lam, TIGHT)
        if last:
            for _ in range(3):
                if state.gap <= target_gap:
                    break
                state = minimise(problem, state, lam, 0.5 * target_gap / max(state.quadratic, 1e-300))
        path.append((lam, state.loss))
        problem.newest = state
        excess = max(state.loss - task.infimum, 1e-300)
        fraction = 1.0 if last else min(max(1 - math.log(max(excess / target_gap, 1.0)) / span, 0.0), 1.0)
        say(
            Progress(
                index + 1,
                lam,
                state.loss,
                state.gap if weight_decay else excess,
                time.perf_counter() - began,
                fraction,
            )
        )
        if last:
            return state, lam, "minimiser of the regularised problem, certified by duality"
        if not weight_decay and state.loss <= target:
            state, inside = _correct(problem, task, state, lam, target)
            if inside:
                path[-1] = (lam, state.loss)
                return state, lam, ARRIVED
            corrections += 1
            if corrections > 6:
                return state, lam, "rounding in the dtype of the features keeps the loss above the target"
            lam *= 0.7
            previous = None
            continue
        if path[1:] and state.loss - task.infimum > 0.95 * (path[-2][1] - task.infimum):
            flat += 1
            if flat >= 4:
                return state, lam, _stuck(task, target_gap)
        else:
            flat = 0
        if not math.isfinite(state.value):
            return state, lam, "the loss overflowed along the path"
        shrink = (
            PATH_FACTOR
            if task.loss.attained(task.targets)
            else max(PATH_FACTOR, min(0.8 * target_gap / excess, 0.8))
        )
        following = max(lam * shrink, weight_decay) if weight_decay else lam * shrink
        before, state = state, _extrapolate(problem, previous, state, lam, following)
        previous, lam = (lam, before), following
    return state, lam, _stuck(task, target_gap)


def _correct(problem: Problem, task: Task, state: State, lam: float, target: float) -> tuple[State, bool]:
    """Iterative refinement: the true logits become the offset."""
    for _ in range(4):
        du, db = task.transpose(state.a)
        true = task.logits(task.weight + du, None if task.bias is None or db is None else task.bias + db)
        problem.offset = true - state.f
        steps = problem.steps
        state = minimise(problem, state, lam, TIGHT)
        if problem.steps == steps:  # within tolerance at the true logits
            return state, state.loss <= target and task.stored_loss(du, db) <= target
    return state, False


def _stuck(task: Task, target_gap: float) -> str:
    n, m = task.features.shape
    if n > m + int(task.bias is not None):
        return (
            f"L* + {target_gap:g} is out of reach: n = {n} samples exceed m + 1 = {m + 1}; "
            "gcfast.widen the model to m >= n - 1"
        )
    return (
        f"L* + {target_gap:g} was not reached: the features are too nearly dependent; "
        "gcfast.certify names the samples"
    )


def _extrapolate(
    problem: Problem, previous: tuple[float, State] | None, state: State, lam: float, following: float
) -> State:
    """Go on linearly in log lambda where that beats standing still: late on the path it is nearly exact."""
    if previous is None:
        return state
    w = math.log(following / lam) / math.log(lam / previous[0])
    a, f = state.a + w * (state.a - previous[1].a), state.f + w * (state.f - previous[1].f)
    ahead, _ = problem.evaluate(a, f, following)
    here, _ = problem.evaluate(state.a, state.f, following)
    return State(a, f) if ahead < here else state
