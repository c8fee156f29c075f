"""Phase two, solved: the convex problem in the head alone (Kawaguchi and Sun, AAAI 2021, section 4)."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcfast.features import Features, checked, collect
from gcfast.losses import (
    ConvexLoss,
    check_convex,
    resolve_loss,
)
from gcfast.model import Head
from gcfast.proofs import exact_products
from gcfast.solve.descent import descent, exact
from gcfast.solve.gram_forms import Option, _options, rank_of, sizes_of
from gcfast.solve.grams import FreeGram, Gram
from gcfast.solve.grams import form as form_gram
from gcfast.solve.newton import Problem, State
from gcfast.solve.path import ARRIVED, REGULARISED, _follow
from gcfast.solve.path_checkpoint import PathKeeper
from gcfast.solve.problem import Task, _task
from gcfast.solve.solution import HeadSolution, Progress, finish
from gcfast.solve.working_set import TooMany, WorkingSet, follow
from gcfast.storage import Checkpoint, fingerprint

METHODS = ("nearest", "exact", "gd", "sgd")


def solve_head(
    model_or_features: nn.Module | Tensor | Features | Any,
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
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 120.0,
) -> HeadSolution:
    """Solve phase two: minimise L over the head (W, b) with the hidden weights frozen.

    Args:
        model_or_features: a model, whose head is updated in place, or features (n, m) without the ones
            column: a tensor, a numpy array (memory-mapped too), blocks of rows, or
            :class:`gcfast.WideFeatures`, which are never stored.
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
        max_bytes: memory that may be used beyond the features (default: what the machine has free). The form
            of K = H1 H1^T is chosen by it, see :func:`gcfast.plan`; refused beforehand where none fits.
        callback: called with a :class:`Progress`. Ctrl-C ends the work with the best head so far.
        head: module or name, where the model's head is not the last Linear applied.
        max_iterations: of gd (default 10,000) and sgd (epochs, default 200).
        checkpoint: a file in which ``nearest`` keeps its state every ``checkpoint_seconds``; a run that was
            killed takes up from it, and it is removed when the work is done.

    Raises:
        ValueError, TypeError: naming the argument. MemoryError: with the bytes it would take and the way out.
        CheckpointError: the checkpoint is torn, or of another problem. OSError: no room for it on the disk.
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
        seen = collect(model_or_features, data_or_targets, head, inspect=False, max_bytes=max_bytes)
        if seen.targets is None:
            raise ValueError("data: expected (inputs, targets); got inputs alone")
        module = seen.head.module
        task = _task(seen.features, seen.targets, convex, (module.weight, module.bias))
    else:
        features = checked(model_or_features)
        if isinstance(data_or_targets, np.ndarray):
            data_or_targets = torch.from_numpy(np.array(data_or_targets))
        if not isinstance(data_or_targets, Tensor):
            raise TypeError(f"targets: expected a tensor; got {type(data_or_targets).__name__}")
        module = None
        task = _task(features, data_or_targets, convex, start)
    say = callback or (lambda progress: None)
    keeper = None
    if checkpoint is not None:
        if method != "nearest":
            raise ValueError(f"checkpoint: only method='nearest' keeps one; got method={method!r}")
        settings = (repr(convex), float(target_gap), float(weight_decay))
        parts = (*task.features.identity(), task.targets, task.weight, task.bias, settings)
        keeper = Checkpoint(checkpoint, "solve_head", fingerprint(*parts), checkpoint_seconds)
    with exact_products(), keeper or contextlib.nullcontext():
        check_convex(convex, task.start_logits[:256], task.targets[:256])
        if method == "exact":
            solution = exact(task, max_bytes, weight_decay, target_gap)
        elif method == "nearest":
            solution = _nearest(task, target_gap, weight_decay, max_bytes, say, began, keeper)
        else:
            solution = descent(task, method, target_gap, weight_decay, max_iterations, generator, say, began)
    if module is not None:
        with torch.no_grad():
            module.weight.copy_(solution.weight)
            if module.bias is not None and solution.bias is not None:
                module.bias.copy_(solution.bias)
    if keeper is not None and not solution.interrupted:
        keeper.remove()
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


def _nearest(
    task: Task,
    target_gap: float,
    weight_decay: float,
    max_bytes: int | None,
    say: Callable[[Progress], None],
    began: float,
    checkpoint: Checkpoint | None,
) -> HeadSolution:
    n, c = task.n, len(task.weight)
    forms = _options(task, weight_decay, max_bytes)
    if weight_decay:
        offset = torch.zeros((n, c), dtype=torch.float64, device=task.device)
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
        "peak_bytes": forms[0].bytes,
        "path": path,
        "form": forms[0].name,
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
    keeper = PathKeeper(checkpoint, task, path)
    try:
        # hard labels leave few samples near their margin: work on those, and look at all
        if forms[0].form == "set":
            if keeper.form in (None, "set"):
                working = WorkingSet(task, forms[0].most_rows)
                try:
                    stored = any(o.form in ("dense", "tiles") for o in forms)
                    start = keeper.point(working)
                    found = follow(
                        working, task, target_gap, path, say, began, start, keeper.keep_set, not stored
                    )
                except TooMany:
                    found = None
                known |= {"iterations": working.steps, "products": working.products}
                if working.dtype == torch.float64:
                    known["form"] = forms[0].name.replace("float32", "float64")
                    known["peak_bytes"] += 12 * len(working.rows) ** 2
                if found is not None:
                    best, lam = State(found[0], zero), found[1]
                    return _arrive(task, best, lam, target_gap, weight_decay, ARRIVED, known)
            path.clear()  # all samples at once decide
            working = None
            forms.pop(0)
            if not forms:
                raise MemoryError(
                    "solve_head: more samples matter than the memory allowed has room for; raise max_bytes"
                )
        while True:
            known |= {"peak_bytes": forms[0].bytes, "form": forms[0].name}
            rank = rank_of(sizes_of(task.features, c))
            problem = Problem(_gram(task, forms[0]), offset, task.loss, task.targets, rank=rank)
            lam = 3e-3 * float(problem.diagonal.mean()) / n
            if weight_decay:
                lam = max(lam, weight_decay)
            best, lam, reason = _follow(
                problem, task, best, lam, target, target_gap, weight_decay, path, say, began, initial, keeper
            )
            exact = [o for o in forms[1:] if o.dtype == torch.float64]
            if reason in (ARRIVED, REGULARISED) or forms[0].dtype == torch.float64 or not exact:
                break
            forms, best = exact, State(zero, zero, initial)  # float32 lost too many digits
            path.clear()
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


def _gram(task: Task, form: Option) -> Gram:
    ones = task.bias is not None
    if form.form == "free":
        return FreeGram(task.features, ones, form.dtype, form.most_rows)
    return form_gram(task.features, ones, form.dtype, form.form == "dense")


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
