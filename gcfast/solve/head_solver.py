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
    check_matches_outputs,
    resolve_loss,
)
from gcfast.model import Head
from gcfast.proofs import exact_products
from gcfast.solve.descent import descent, exact
from gcfast.solve.gram_forms import GramForm, forms_for, rank_of, sizes_of
from gcfast.solve.grams import FreeGram, Gram
from gcfast.solve.grams import build_gram as build_gram
from gcfast.solve.newton import NewtonState, Problem
from gcfast.solve.path import ARRIVED, REGULARISED, follow_path
from gcfast.solve.path_checkpoint import PathCheckpoint
from gcfast.solve.problem import HeadProblem, make_problem
from gcfast.solve.solution import HeadSolution, Progress, evaluate_head
from gcfast.solve.working_set import WorkingSet, WorkingSetFull, follow_working_set
from gcfast.storage import StateFile, fingerprint

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
    fixed: bool = False,
) -> HeadSolution:
    """Solve phase two: minimise L over the head (W, b) with the hidden weights frozen.

    Args:
        model_or_features: a model, whose head is updated in place, or features (n, m) without the ones
            column: a tensor, a numpy array (memory-mapped too), blocks of rows, or
            :class:`gcfast.WideFeatures`, which are never stored.
        data_or_targets: the training set (inputs, targets), a Dataset, a DataLoader, or batches (inputs,
            targets), where what is no tensor is read a second time without the model, and refused where it
            changes; with features, the targets: class labels (n,), probabilities (n, C), or real (n, C), by
            the loss.
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
        fixed: the data are the same at every reading, by your word: they are read once.

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
        training_set = collect(
            model_or_features, data_or_targets, head, inspect=False, max_bytes=max_bytes, fixed=fixed
        )
        if training_set.targets is None:
            raise ValueError("data: expected (inputs, targets); got inputs alone")
        check_matches_outputs(convex, training_set.targets, training_set.output_shape)
        module = training_set.head.module
        head_problem = make_problem(
            training_set.features, training_set.targets, convex, (module.weight, module.bias)
        )
    else:
        features = checked(model_or_features)
        if isinstance(data_or_targets, np.ndarray):
            data_or_targets = torch.from_numpy(np.array(data_or_targets))
        if not isinstance(data_or_targets, Tensor):
            raise TypeError(f"targets: expected a tensor; got {type(data_or_targets).__name__}")
        module = None
        head_problem = make_problem(features, data_or_targets, convex, start)
    on_progress = callback or (lambda progress: None)
    keeper = None
    if checkpoint is not None:
        if method != "nearest":
            raise ValueError(f"checkpoint: only method='nearest' keeps one; got method={method!r}")
        settings = (repr(convex), float(target_gap), float(weight_decay))
        parts = (
            *head_problem.features.identity(),
            head_problem.targets,
            head_problem.weight,
            head_problem.bias,
            settings,
        )
        keeper = StateFile(checkpoint, "solve_head", fingerprint(*parts), checkpoint_seconds)
    with exact_products(head_problem.device), keeper or contextlib.nullcontext():
        check_convex(convex, head_problem.start_logits, head_problem.targets)
        if method == "exact":
            solution = exact(head_problem, max_bytes, weight_decay, target_gap)
        elif method == "nearest":
            solution = _nearest(head_problem, target_gap, weight_decay, max_bytes, on_progress, began, keeper)
        else:
            solution = descent(
                head_problem, method, target_gap, weight_decay, max_iterations, generator, on_progress, began
            )
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
    head_problem: HeadProblem,
    target_gap: float,
    weight_decay: float,
    max_bytes: int | None,
    on_progress: Callable[[Progress], None],
    began: float,
    checkpoint: StateFile | None,
) -> HeadSolution:
    n, c = head_problem.n, len(head_problem.weight)
    forms = forms_for(head_problem, weight_decay, max_bytes)
    if weight_decay:
        offset = torch.zeros((n, c), dtype=torch.float64, device=head_problem.device)
    else:
        offset = head_problem.start_logits
    target = head_problem.infimum + target_gap
    path: list[tuple[float, float]] = []
    zero = torch.zeros((n, c), dtype=torch.float64, device=offset.device)
    initial = head_problem.mean_loss(offset)
    fields: dict[str, Any] = {
        "method": "nearest",
        "interrupted": False,
        "iterations": 0,
        "products": 0,
        "peak_bytes": forms[0].bytes,
        "path": path,
        "form": forms[0].name,
    }
    unmoved = head_problem.weight, head_problem.bias
    if not weight_decay and initial <= target and head_problem.loss_above(*unmoved) <= target:
        return evaluate_head(
            head_problem,
            *unmoved,
            lam=0.0,
            gap_target=target_gap,
            weight_decay=0.0,
            reason="the start is within the target",
            **fields,
        )
    best = NewtonState(zero, zero, initial)
    lam, reason = 0.0, ""
    problem: Problem | None = None
    working: WorkingSet | None = None
    keeper = PathCheckpoint(checkpoint, head_problem, path)
    try:
        # hard labels leave few samples near their margin: work on those, and look at all
        if forms[0].form == "set":
            if keeper.form in (None, "set"):
                working = WorkingSet(head_problem, forms[0].most_rows)
                try:
                    stored = any(o.form in ("dense", "tiles") for o in forms)
                    start = keeper.point(working)
                    found = follow_working_set(
                        working,
                        head_problem,
                        target_gap,
                        path,
                        on_progress,
                        began,
                        start,
                        keeper.keep_set,
                        not stored,
                    )
                except WorkingSetFull:
                    found = None
                fields |= {"iterations": working.steps, "products": working.products}
                if working.dtype == torch.float64:
                    fields["form"] = forms[0].name.replace("float32", "float64")
                    fields["peak_bytes"] += 12 * len(working.rows) ** 2
                if found is not None:
                    best, lam = NewtonState(found[0], zero), found[1]
                    return finish_nearest(head_problem, best, lam, target_gap, weight_decay, ARRIVED, fields)
            path.clear()  # all samples at once decide
            working = None
            forms.pop(0)
            if not forms:
                raise MemoryError(
                    "solve_head: more samples matter than the memory allowed has room for; raise max_bytes"
                )
        while True:
            fields |= {"peak_bytes": forms[0].bytes, "form": forms[0].name}
            rank = rank_of(sizes_of(head_problem.features, c))
            problem = Problem(
                _gram(head_problem, forms[0]), offset, head_problem.loss, head_problem.targets, rank=rank
            )
            lam = 3e-3 * float(problem.diagonal.mean()) / n
            if weight_decay:
                lam = max(lam, weight_decay)
            best, lam, reason = follow_path(
                problem,
                head_problem,
                best,
                lam,
                target,
                target_gap,
                weight_decay,
                path,
                on_progress,
                began,
                initial,
                keeper,
            )
            exact = [o for o in forms[1:] if o.dtype == torch.float64]
            if reason in (ARRIVED, REGULARISED) or forms[0].dtype == torch.float64 or not exact:
                break
            forms, best = exact, NewtonState(zero, zero, initial)  # float32 lost too many digits
            path.clear()
    except KeyboardInterrupt:
        fields["interrupted"] = True
        reason = "interrupted; the best head so far"
        lam = path[-1][0] if path else 0.0
        if problem is not None and problem.newest is not None:
            best = problem.newest
        elif working is not None and working.newest is not None:
            best = NewtonState(working.newest, zero)
    if problem is not None:
        fields |= {"iterations": problem.steps, "products": problem.products}
    return finish_nearest(head_problem, best, lam, target_gap, weight_decay, reason, fields)


def _gram(head_problem: HeadProblem, form: GramForm) -> Gram:
    ones = head_problem.bias is not None
    if form.form == "free":
        return FreeGram(head_problem.features, ones, form.dtype, form.most_rows)
    return build_gram(head_problem.features, ones, form.dtype, form.form == "dense")


def finish_nearest(
    head_problem: HeadProblem,
    best: NewtonState,
    lam: float,
    target_gap: float,
    weight_decay: float,
    reason: str,
    fields: dict[str, Any],
) -> HeadSolution:
    du, db = head_problem.transpose(best.a)
    weight = du if weight_decay else head_problem.weight + du
    bias = (
        None if head_problem.bias is None or db is None else (db if weight_decay else head_problem.bias + db)
    )
    return evaluate_head(
        head_problem,
        weight,
        bias,
        lam=lam,
        gap_target=target_gap,
        weight_decay=weight_decay,
        reason=reason,
        **fields,
    )
