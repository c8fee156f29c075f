"""Phase two, solved: the convex problem in the head alone (Kawaguchi and Sun, AAAI 2021, section 4)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gcfast._newton import PAIRS, Problem, State, minimise
from gcfast._task import Task
from gcfast._working_set import LOOSE, MAX_PATH, PATH_FACTOR, TIGHT, Progress, WorkingSet, follow
from gcfast.features import check_features, collect, equal_rows
from gcfast.inspection import Head
from gcfast.losses import ConvexLoss, CrossEntropy, check_convex, resolve_loss
from gcfast.memory import require
from gcfast.rank import StackedOnes, exact_products, gram

METHODS = ("nearest", "exact", "gd", "sgd")


@dataclass
class HeadSolution:
    """A head and what is known of it.

    ``weight`` (C, m), ``bias`` (C,) (None for a head without one), in the dtype of the features; ``loss`` is
    theirs as stored, evaluated in float64. ``infimum`` is L*, what no model whatever can beat; ``gap`` =
    loss - infimum (with weight decay: of the regularised problem, and then bounded by ``duality_gap``).
    ``duality_gap`` P - D certifies the nearest point: |U - U*| <= ``distance_bound`` * |U|.
    ``residual`` is the Frobenius norm of the loss's gradient in the head. ``path`` lists (lambda, loss).
    """

    weight: Tensor
    bias: Tensor | None
    loss: float
    infimum: float
    gap: float
    duality_gap: float
    distance_bound: float
    residual: float
    regularization: float
    method: str
    converged: bool
    interrupted: bool
    iterations: int
    products: int
    seconds: float
    peak_bytes: int
    reason: str
    path: list[tuple[float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        state = "interrupted" if self.interrupted else ("converged" if self.converged else "NOT converged")
        return (
            f"head by {self.method}: {state}; "
            f"loss {self.loss:.3e}, L* {self.infimum:.3e}, gap {self.gap:.3e}; "
            f"{self.iterations} iterations, {self.products} products, {self.seconds:.2f} s. {self.reason}"
        )


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
            solution = _exact(task, max_bytes, weight_decay, target_gap)
        elif method == "nearest":
            solution = _nearest(task, target_gap, weight_decay, max_bytes, say, began)
        else:
            solution = _descent(task, method, target_gap, weight_decay, max_iterations, generator, say, began)
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
        c = _outputs(targets)
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
    return Task(features, y, loss, weight, bias, _infimum(features, y, loss))


def _outputs(targets: Tensor) -> int:
    if (targets.dim() == 2 and targets.shape[1] > 1) or targets.is_floating_point():
        return targets.shape[1] if targets.dim() == 2 else 1
    if len(targets) and int(targets.min()) < 0:
        i = int((targets.reshape(-1) < 0).nonzero()[0])
        label = int(targets.reshape(-1)[i])
        raise ValueError(f"targets: label {label} of sample {i} is out of range (labels count from 0)")
    return max(int(targets.max()) + 1, 2) if len(targets) else 2


def _infimum(features: Tensor, y: Tensor, loss: ConvexLoss) -> float:
    """L* for heads on these features: samples with equal rows share one output."""
    n = len(features)
    total = loss.infimum(y).to(torch.float64)
    for members in equal_rows(features):
        index = torch.tensor(members, device=y.device)
        group = torch.zeros(len(members), dtype=torch.long, device=y.device)
        total[index] = 0.0
        total[index[0]] = loss.group_infimum(y[index], group, 1)[0]
    return float(total.sum()) / n


def _finish(
    task: Task,
    weight: Tensor,
    bias: Tensor | None,
    *,
    lam: float,
    gap_target: float,
    weight_decay: float,
    **known: Any,
) -> HeadSolution:
    """Evaluate the head as it will be stored, in float64, and bound its distance from the minimiser of P."""
    dtype = task.features.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    z = task.logits(weight, bias)
    value, residual, conjugate = task.loss.terms(z, task.targets)
    loss = float(value.mean())
    grad_w, grad_b = task.transpose(residual / task.n)
    duality_gap = distance = math.nan
    center_w = torch.zeros_like(task.weight) if weight_decay else task.weight
    center_b = None if task.bias is None else (torch.zeros_like(task.bias) if weight_decay else task.bias)
    u2 = float(((weight.to(torch.float64) - center_w) ** 2).sum())
    if bias is not None and center_b is not None:
        u2 += float(((bias.to(torch.float64) - center_b) ** 2).sum())
    if lam > 0:
        # D at the residual: mean(<r, z0> - loss*(r)) - |H1^T r / n|^2 / (2 lambda)
        z0 = torch.zeros_like(z) if weight_decay else task.start_logits
        dual2 = float((grad_w**2).sum()) + (0.0 if grad_b is None else float((grad_b**2).sum()))
        duality_gap = (
            loss + 0.5 * lam * u2 - (float(((residual * z0).sum(1) - conjugate).mean()) - dual2 / (2 * lam))
        )
        duality_gap = max(duality_gap, 0.0)
        distance = math.sqrt(2 * duality_gap / lam / u2) if u2 > 0 else 0.0
    gap = duality_gap if weight_decay else loss - task.infimum
    return HeadSolution(
        weight=weight,
        bias=bias,
        loss=loss,
        infimum=task.infimum,
        gap=gap,
        duality_gap=duality_gap,
        distance_bound=distance,
        residual=math.sqrt(float((grad_w**2).sum()) + (0.0 if grad_b is None else float((grad_b**2).sum()))),
        regularization=lam,
        converged=gap <= gap_target,
        seconds=0.0,
        **known,
    )


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
        return _finish(
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
                best, lam = State(found[0], zero), found[1]
                return _arrive(task, best, lam, target_gap, weight_decay, ARRIVED, known)
            path.clear()  # all samples at once, in float64, decides
            working = None
        problem = Problem(_gram(task), offset, task.loss, task.targets)
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
    return _finish(
        task, weight, bias, lam=lam, gap_target=target_gap, weight_decay=weight_decay, reason=reason, **known
    )


def _gram(task: Task) -> Tensor:
    return gram(StackedOnes(task.features, task.bias is not None))


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


def _exact(task: Task, max_bytes: int | None, weight_decay: float, target_gap: float) -> HeadSolution:
    """V_tau + H1^T (H1 H1^T)^-1 (Y - H1 V_tau): the limit of gradient descent for the squared loss."""
    if task.loss.name != "mse":
        raise ValueError(f"method: 'exact' is for loss='mse'; got loss {task.loss.name!r} (use 'nearest')")
    if weight_decay:
        raise ValueError("weight_decay: 'exact' has none; use method='nearest'")
    n, m = task.features.shape
    if n > m + int(task.bias is not None):
        raise ValueError(
            f"method: 'exact' needs n <= m + 1; got n = {n}, m = {m}: "
            "gcfast.widen the model, or use 'nearest'"
        )
    need = 2 * n * n * 8 + n * 1024 * 8
    require("solve_head(method='exact')", need, max_bytes, task.features.device, "use method='gd'")
    low, info = torch.linalg.cholesky_ex(_gram(task))
    if int(info) != 0:
        raise ValueError(
            "features: numerically dependent rows, no exact solve; use method='nearest', or gcfast.certify "
            "to see which samples"
        )
    a = torch.zeros_like(task.logits(task.weight, task.bias))
    weight, bias = task.weight, task.bias
    steps, before = 0, math.inf
    for _ in range(5):  # iterative refinement with the true residual
        steps += 1
        gap = task.targets - task.logits(weight, bias)
        size = float(gap.abs().amax())
        if size == 0 or size > 0.5 * before:
            break
        before = size
        a = a + torch.cholesky_solve(gap, low)
        du, db = task.transpose(a)
        weight, bias = task.weight + du, None if task.bias is None or db is None else task.bias + db
    return _finish(
        task,
        weight,
        bias,
        lam=0.0,
        gap_target=target_gap,
        weight_decay=0.0,
        method="exact",
        interrupted=False,
        iterations=steps,
        products=0,
        peak_bytes=need,
        reason="minimum-norm correction of the start, the limit of gradient descent",
        path=[],
    )


def _descent(
    task: Task,
    method: str,
    target_gap: float,
    weight_decay: float,
    max_iterations: int | None,
    generator: torch.Generator | None,
    say: Callable[[Progress], None],
    began: float,
) -> HeadSolution:
    """The paper's own phase two: gradient descent with step 1/beta, or SGD with square-summable steps."""
    curvature = task.loss.smoothness(len(task.weight))
    if not math.isfinite(curvature):
        raise ValueError(
            f"loss: {task.loss!r} states no smoothness(), which {method} needs for its step; use 'nearest'"
        )
    n = task.n
    weight, bias = task.weight.clone(), None if task.bias is None else task.bias.clone()
    h = task.features.to(torch.float64)
    best, interrupted, done = (math.inf, weight, bias), False, 0
    path: list[tuple[float, float]] = []
    limit = max_iterations if max_iterations is not None else (10_000 if method == "gd" else 200)
    if method == "gd":
        step = 1.0 / (curvature * _sigma_max(h, bias is not None) ** 2 / n + weight_decay)
    else:
        step = 1.0 / (curvature * float((h * h).sum(1).amax() + 1) + weight_decay)
        order = generator or torch.Generator().manual_seed(0)

    def advance(rows: Tensor, y: Tensor, eta: float) -> None:
        nonlocal weight, bias
        z = rows @ weight.mT
        r = task.loss.residual(z if bias is None else z + bias, y) / len(rows)
        weight = weight - eta * (r.mT @ rows + weight_decay * weight)
        if bias is not None:
            bias = bias - eta * (r.sum(0) + weight_decay * bias)

    every = max(1, limit // 200) if method == "gd" else 1
    reason = "iteration limit"
    try:
        while done < limit:
            if method == "gd":
                advance(h, task.targets, step)
            else:
                batches = torch.randperm(n, generator=order).to(h.device).split(256)
                for i, batch in enumerate(batches):
                    t = done + i / len(batches)
                    # sum eta = inf, sum eta^2 < inf
                    advance(h[batch], task.targets[batch], step / (1 + t / limit) ** 0.6)
            done += 1
            if done % every and done < limit:
                continue
            value = task.mean_loss(h @ weight.mT if bias is None else h @ weight.mT + bias)
            norm2 = float((weight**2).sum()) + (0.0 if bias is None else float((bias**2).sum()))
            path.append((weight_decay, value))
            if value + 0.5 * weight_decay * norm2 < best[0]:
                best = (value + 0.5 * weight_decay * norm2, weight, bias)
            say(
                Progress(
                    done, weight_decay, value, value - task.infimum, time.perf_counter() - began, done / limit
                )
            )
            if not weight_decay and value <= task.infimum + target_gap:
                reason = "target gap reached"
                break
    except KeyboardInterrupt:
        interrupted, reason = True, "interrupted; the best head so far"
    _, weight, bias = best
    return _finish(
        task,
        weight,
        bias,
        lam=weight_decay,
        gap_target=target_gap,
        weight_decay=weight_decay,
        method=method,
        interrupted=interrupted,
        iterations=done,
        products=0,
        peak_bytes=h.numel() * 8,
        reason=reason,
        path=path,
    )


def _sigma_max(h: Tensor, ones: bool) -> float:
    """Largest singular value of H1 by power iteration, enlarged by 2 %."""
    v = torch.ones(h.shape[0], dtype=torch.float64, device=h.device)
    sigma = 0.0
    for _ in range(100):
        v = v / torch.linalg.vector_norm(v)
        u = h.mT @ v
        new = float(torch.sqrt((u**2).sum() + (v.sum() ** 2 if ones else 0.0)))
        v = h @ u + (v.sum() if ones else 0.0)
        if new <= sigma * (1 + 1e-6):
            break
        sigma = new
    return 1.02 * max(sigma, new)
