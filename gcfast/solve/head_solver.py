"""Phase two, solved: the convex problem in the head alone (Kawaguchi and Sun, AAAI 2021, section 4)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gcfast import errors
from gcfast.ambient import ordinary
from gcfast.features import Features, TrainingSet, as_targets, check_new_head, checked, collect, copies_among
from gcfast.losses import (
    ConvexLoss,
    check_convex,
    check_matches_outputs,
    infimum_with_copies,
    resolve_loss,
)
from gcfast.model import Head
from gcfast.proofs import exact_products
from gcfast.solve.all_samples import AllSamples
from gcfast.solve.descent import descent, exact
from gcfast.solve.gram_forms import GramForm, forms_for, rank_of, sizes_of
from gcfast.solve.grams import FreeGram, Gram, build_gram
from gcfast.solve.newton import GramProblem, Problem
from gcfast.solve.path import OVERFLOW, REGULARISED, ROUNDING, WITHIN, PathEnd, follow
from gcfast.solve.path_checkpoint import PathCheckpoint
from gcfast.solve.path_point import PathForm, PathPoint
from gcfast.solve.problem import HeadProblem, make_problem
from gcfast.solve.solution import (
    HeadSolution,
    Progress,
    beyond_the_head,
    evaluate_head,
    no_worse_than_the_start,
)
from gcfast.solve.spectrum import SpectralProblem
from gcfast.solve.working_set import WorkingSet, WorkingSetFull
from gcfast.storage import StateFile, allowed_bytes, fingerprint

INTERRUPTED = "interrupted; the best head so far"
METHODS = ("nearest", "exact", "gd", "sgd")


@ordinary()
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
    errors.is_choice("method", method, METHODS)
    errors.is_number("target_gap", target_gap, above=0)
    errors.is_number("weight_decay", weight_decay, 0)
    errors.is_function("callback", callback)
    errors.is_generator("generator", generator)
    errors.is_checkpoint(checkpoint, checkpoint_seconds)
    errors.is_flag("fixed", fixed)
    if max_iterations is not None:
        max_iterations = errors.is_count("max_iterations", max_iterations)
    allowed_bytes(max_bytes, torch.device("cpu"))  # its own check
    target_gap, weight_decay = float(target_gap), float(weight_decay)
    convex = resolve_loss(loss)
    training_set: TrainingSet | None = None
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
            training_set.features,
            training_set.targets,
            convex,
            (module.weight, module.bias),
            module.weight.dtype,
        )
    else:
        features = checked(model_or_features)
        targets = as_targets(data_or_targets, "targets")
        head_problem = make_problem(features, targets, convex, start)
    head_problem.target_gap, head_problem.weight_decay = target_gap, weight_decay
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
            solution = _nearest(head_problem, max_bytes, on_progress, began, keeper)
        else:
            solution = descent(
                head_problem, method, target_gap, weight_decay, max_iterations, generator, on_progress, began
            )
        solution = no_worse_than_the_start(head_problem, solution)
    if training_set is not None:
        if head_problem.copies and infimum_with_copies(convex, head_problem.targets, []) < solution.infimum:
            copies = copies_among(data_or_targets, fixed, head_problem.copies, head_problem.n)
            beyond_the_head(head_problem, solution, copies)
        _give(training_set, solution)
        coarse = training_set.outputs.dtype
        if torch.finfo(coarse).eps > torch.finfo(torch.float32).eps:
            solution.reason += f"; of the head itself: the model rounds its outputs to {coarse}"
    if keeper is not None and not solution.interrupted:
        keeper.remove()
    solution.seconds = time.perf_counter() - began
    return solution


def _give(training_set: TrainingSet, solution: HeadSolution) -> None:
    """Write the head to the model; where its outputs do not follow, it is as it was and an error says so."""
    parts = training_set.head.parameters
    before = [p.detach().clone() for p in parts]

    def write(values: list[Tensor]) -> None:
        # weights that were made in inference mode can be written to there alone
        with torch.inference_mode(parts[0].is_inference()), torch.no_grad():
            for p, value in zip(parts, values, strict=True):
                p.copy_(value)

    try:
        write([value for value in (solution.weight, solution.bias) if value is not None])
        check_new_head(training_set)
    except BaseException:
        write(before)
        raise


def _nearest(
    head_problem: HeadProblem,
    max_bytes: int | None,
    on_progress: Callable[[Progress], None],
    began: float,
    checkpoint: StateFile | None,
) -> HeadSolution:
    """The path in the forms of K that fit, one after another, until one of them leads to its end."""
    forms, lacking = forms_for(head_problem, max_bytes)
    unmoved = head_problem.weight, head_problem.bias
    near = not head_problem.weight_decay and head_problem.initial <= head_problem.target
    if near and head_problem.loss_above(*unmoved) <= head_problem.target:
        there = PathEnd(None, 0.0, "the start is within the target", True)
        return _solution(head_problem, forms[0], None, there, [])
    keeper = PathCheckpoint(checkpoint)
    forms = forms[next((i for i, o in enumerate(forms) if o.name == keeper.name), 0) :]
    stored = any(o.form in ("dense", "tiles") for o in forms)
    best: HeadSolution | None = None
    sound: tuple[int, float, tuple[Tensor, Tensor | None]] | None = None  # of the form before: where, and U
    while forms:
        chosen, form, start = forms.pop(0), None, None
        try:
            form = build_form(head_problem, chosen, patient=not stored)
            a = None if sound is None else form.coordinates(sound[2])
            del keeper.path[0 if sound is None or a is None else sound[0] :]
            if sound is not None and a is not None:
                start = PathPoint(sound[0], sound[1], a, form.outputs(a))
            end = follow(form, keeper, on_progress, began, start, patience=1 if forms else 4)
        except WorkingSetFull:
            if not forms:
                raise MemoryError(
                    "solve_head: more samples matter than the memory allowed has room for; raise max_bytes"
                ) from None
            continue
        except (KeyboardInterrupt, FloatingPointError) as stop:
            newest = None if form is None else form.newest
            lam = keeper.path[-1][0] if keeper.path else head_problem.weight_decay
            reason = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else OVERFLOW
            end = PathEnd(newest, lam, reason, False)
        found = _solution(head_problem, chosen, form, end, list(keeper.path))
        done = end.reason == ROUNDING or (found.converged if head_problem.weight_decay else end.arrived)
        if best is None or found.gap < best.gap or done:
            best = found
        if form is not None and form.sound is not None and not (done or best.converged or best.interrupted):
            # what came after it may be rounding
            sane = PathEnd(form.sound[2], form.sound[1], end.reason, False)
            best = min(
                best, _solution(head_problem, chosen, form, sane, list(keeper.path)), key=lambda s: s.gap
            )
        if end.reason == INTERRUPTED:
            best.interrupted, best.reason = True, INTERRUPTED
            break
        if done:
            break
        if form is not None and form.sound is not None:
            sound = *form.sound[:2], form.step(form.sound[2])
        if chosen.form != "set":
            # float32 lost too many digits, or K itself has
            forms = [o for o in forms if o.form == "spectrum" or o.dtype == torch.float64 != chosen.dtype]
    assert best is not None
    if lacking and not (best.converged or best.interrupted) and best.reason != ROUNDING:
        best.reason += f" (or allow max_bytes={lacking:_}, for a form of K that bad scales do not matter to)"
    return best


def build_form(head_problem: HeadProblem, chosen: GramForm, patient: bool) -> PathForm:
    """The form of K that was chosen, with K where it is stored."""
    features, ones = head_problem.features, head_problem.bias is not None
    if chosen.form == "set":
        return WorkingSet(chosen.name, head_problem, chosen.most_rows, patient)
    terms = head_problem.offset, head_problem.loss, head_problem.targets
    problem: Problem
    if chosen.form == "spectrum":
        h = features.panel(0, features.m)
        problem = SpectralProblem(torch.cat([h, h.new_ones((len(h), 1))], 1) if ones else h, *terms)
    else:
        gram: Gram
        if chosen.form == "free":
            gram = FreeGram(features, ones, chosen.dtype, chosen.most_rows)
        else:
            gram = build_gram(features, ones, chosen.dtype, chosen.form == "dense")
        problem = GramProblem(gram, *terms, rank=rank_of(sizes_of(features, len(head_problem.weight))))
    return AllSamples(chosen.name, head_problem, problem)


def _solution(
    head_problem: HeadProblem,
    chosen: GramForm,
    form: PathForm | None,
    end: PathEnd,
    path: list[tuple[float, float]],
) -> HeadSolution:
    name, peak_bytes = chosen.name, chosen.bytes
    if isinstance(form, WorkingSet) and form.dtype == torch.float64:
        name, peak_bytes = name.replace("float32", "float64"), peak_bytes + 12 * len(form.rows) ** 2
    if form is None or end.state is None:
        bias = head_problem.bias
        step = torch.zeros_like(head_problem.weight), None if bias is None else torch.zeros_like(bias)
    else:
        step = form.step(end.state)
    weight, bias = head_problem.head(*step)
    if head_problem.weight_decay:
        weight, bias = _as_stored(head_problem, weight, bias)
    iterations, products = (0, 0) if form is None else form.counts
    solution = evaluate_head(
        head_problem,
        weight,
        bias,
        lam=end.lam,
        gap_target=head_problem.target_gap,
        weight_decay=head_problem.weight_decay,
        method="nearest",
        interrupted=False,
        iterations=iterations,
        products=products,
        peak_bytes=peak_bytes,
        reason=end.reason,
        form=name,
        path=path,
    )
    if end.reason == OVERFLOW:
        solution.reason = OVERFLOW  # whatever the gap says
    elif solution.converged and not end.arrived and end.reason != INTERRUPTED:
        solution.reason = REGULARISED if head_problem.weight_decay else WITHIN
    return solution


def _as_stored(
    head_problem: HeadProblem, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The weight in its dtype; the bias takes what its rounding moves all samples by."""
    stored = weight.to(head_problem.dtype).to(torch.float64)
    if bias is not None:
        bias = bias + head_problem.logits(weight - stored, None).mean(0)
    return stored, bias
