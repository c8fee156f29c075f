"""Figures: loss against time and steps down to 1e-8, and the test error along the path of lambda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gcfast

from .context import Context
from .frozen import Frozen, Setting, noisy
from .generalisation import AIM, Stepper
from .problem import PERTURBATION, build, evaluate, load, optimizer, schedule, width

GOAL = 1e-8


@dataclass(frozen=True)
class Curves(Setting):
    """Base for ``times`` its usual epochs; A(base), switched at tau of the usual ones, for as many."""

    times: int
    seed: int


class _Watch:
    """(seconds, step, loss) at steps spaced geometrically; evaluations are not timed."""

    def __init__(self, context: Context, steps: int) -> None:
        self.points: list[tuple[float, int, float]] = []
        self.context, self.seconds, self.since = context, 0.0, context.clock()
        self.due = sorted({round(steps ** (i / 60)) for i in range(61)} | {steps})

    def __call__(self, step: int, loss: Any) -> None:
        if step in self.due:
            self.seconds += self.context.clock() - self.since
            self.points.append((self.seconds, step, loss()))
            self.since = self.context.clock()


def curves(cell: Curves, context: Context) -> dict[str, Any]:
    split = load(cell.data, cell.n, cell.seed)
    n = len(split.y_train)
    long = schedule(n, cell.epochs * cell.times, cell.seed)
    switch = schedule(n, cell.epochs, cell.seed, cell.tau).switch
    stepper = Stepper(split, long, False, context.device)
    whole = (stepper.x, stepper.y)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(cell.seed)
        model = build(cell.model, split, width(n)).to(context.device).train()
        return model, optimizer(cell.base, model.parameters(), cell.lr)

    def loss_of(model: nn.Module) -> float:
        model.eval()
        value, _ = evaluate(model, *whole)
        model.train()
        return value

    model, opt = fresh()
    base = _Watch(context, long.total)
    for step in range(long.total):
        stepper(model, opt, step)
        base(step + 1, lambda: loss_of(model))
        if step % 64 == 0:
            context.say(0.7 * step / long.total, "base")
            context.check()

    model, opt = fresh()
    two = gcfast.TwoPhase(opt, model, switch_step=switch, perturbation=PERTURBATION, seed=cell.seed)
    paper = _Watch(context, long.total)
    paper.due = sorted({*paper.due, switch})
    for step in range(switch):
        stepper(model, two, step)
        paper(step + 1, lambda: loss_of(model))
    head: Any = model.get_submodule("head")
    start = (head.weight.detach().clone(), head.bias.detach().clone())
    cache = gcfast.FeatureCache(model, whole, store="below")
    frozen = paper.seconds + context.clock() - paper.since  # what phase one and the features took
    rows = (cache.features, cache.targets)
    for step in range(switch, long.total):
        stepper(cache.head, two, step, cache.features)
        paper(step + 1, lambda: evaluate(cache.head, *rows)[0])
        if step % 64 == 0:
            context.say(0.7 + 0.2 * step / long.total, "A(base)")
            context.check()

    began = context.clock()
    nearest: list[tuple[float, int, float]] = []

    def note(progress: gcfast.Progress) -> None:
        nearest.append((frozen + context.clock() - began, progress.iteration, progress.loss))

    solved = gcfast.solve_head(
        gcfast.WideFeatures(cache.features, model.get_submodule("wide")),
        cache.targets,
        start=start,
        target_gap=0.8 * GOAL,
        callback=note,
    )
    nearest.append((frozen + context.clock() - began, len(nearest) + 1, solved.loss))
    return {
        "n": n,
        "m": width(n),
        "switch": switch,
        "usual_steps": long.total // cell.times,
        "base": base.points,
        "paper": paper.points,
        "nearest": nearest,
        "converged": solved.converged,
    }


@dataclass(frozen=True)
class Path(Setting):
    """Heads nearest to V_tau at ever smaller loss, and their test error."""

    seeds: tuple[int, ...]
    noise: float = 0.0  # share of training labels replaced by another class


def path(cell: Path, context: Context) -> dict[str, Any]:
    runs = []
    for index, seed in enumerate(cell.seeds):
        split = noisy(load(cell.data, cell.n, seed), cell.noise, seed)
        frozen = Frozen(split, cell, seed, context)
        points = [{"epsilon": None, "lambda": None, "loss": frozen.loss, "test_error": frozen.test_error()}]
        for step in range(17):
            epsilon = 10 ** (-step / 2)
            if epsilon >= frozen.loss:
                continue
            context.check()
            context.say((index + step / 17) / len(cell.seeds), f"epsilon = {epsilon:.0e}")
            solved = frozen.solve(target_gap=epsilon)
            points.append(
                {
                    "epsilon": epsilon,
                    "lambda": solved.regularization,
                    "loss": solved.loss,
                    "test_error": frozen.test_error(solved),
                }
            )
        runs.append({"seed": seed, "points": points})
    return {"n": len(split.y_train), "runs": runs}


@dataclass(frozen=True)
class Perturbations(Setting):
    """What the size of the Gaussian vector does to the loss, to sigma_min and to the test error."""

    sizes: tuple[float, ...]
    seeds: tuple[int, ...]


def perturbations(cell: Perturbations, context: Context) -> dict[str, Any]:
    points = []
    for index, seed in enumerate(cell.seeds):
        split = load(cell.data, cell.n, seed)
        for size in cell.sizes:
            context.say(index / len(cell.seeds), f"seed {seed}, perturbation {size:g}")
            frozen = Frozen(split, cell, seed, context, perturbation=size)
            proof = gcfast.certify(frozen.features, frozen.y, route="direct", sharp=True)
            solved = frozen.solve(target_gap=AIM)
            points.append(
                {
                    "size": size,
                    "seed": seed,
                    "status": proof.status,
                    "sigma_min_lower": proof.sigma_min_lower,
                    "loss": frozen.loss,
                    "switch_test_error": frozen.test_error(),
                    "gap": solved.gap,
                    "test_error": frozen.test_error(solved),
                }
            )
    return {"n": len(split.y_train), "points": points}
