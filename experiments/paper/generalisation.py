"""Table 2: test error and training loss of base, of A(base), and of A(base) with the head solved.

The paper: A(base) trains all weights by base until step tau, adds a Gaussian vector to the hidden weights,
freezes them, and trains the head by base from there on, T steps in all, with base's hyper-parameters. Until
tau the two are one trajectory, so base runs once and is photographed at each tau, its optimizer included.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gcfast
from gcfast.cli.data.split import DataSplit
from gcfast.cli.training.train import Schedule

from .context import Context
from .problem import (
    PERTURBATION,
    TARGET_GAP,
    Augmentation,
    build,
    evaluate,
    load,
    optimizer,
    schedule,
    width,
)

AIM = 0.8 * TARGET_GAP  # the head is rounded to float32 after the solve
MOST_STORED = 2 << 30  # bytes of features; beyond, they are made anew at every look


@dataclass(frozen=True)
class Run:
    """The parameters of a cell. ``prove``: taus at which rank n is proved at the frozen weights, the direct
    route; at the others the theorem's assumptions are checked."""

    data: str
    n: int | None
    model: str
    base: str
    lr: float
    epochs: int
    seed: int
    taus: tuple[float, ...]
    prove: tuple[float, ...]
    augment: bool = False


class Stepper:
    """Steps of ``base`` on the schedule's batches, augmented or not: a function of the step's number."""

    def __init__(self, split: DataSplit, plan: Schedule, augment: bool, device: str) -> None:
        self.x, self.y = split.x_train.to(device), split.y_train.to(device)
        self.plan = plan
        self.augmentation = Augmentation.of(split, plan.seed) if augment else None
        self._epoch, self._batches = -1, []  # type: tuple[int, Any]

    def batch(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.plan.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self.plan.batches(epoch)
        return self._batches[index].to(self.y.device)

    def __call__(
        self, forward: Any, opt: torch.optim.Optimizer, step: int, rows: Tensor | None = None
    ) -> None:
        """``rows``: what ``forward`` takes in the place of the images."""
        index = self.batch(step)
        inputs = (self.x if rows is None else rows)[index]
        if self.augmentation is not None and rows is None:
            inputs = self.augmentation(inputs, step)
        opt.zero_grad()
        loss = F.cross_entropy(forward(inputs), self.y[index])
        loss.backward()
        opt.step()
        if step % 64 == 0 and not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}: a smaller step size would do"
            )


def run(cell: Run, context: Context) -> dict[str, Any]:
    split = load(cell.data, cell.n, cell.seed)
    n = len(split.y_train)
    plan = schedule(n, cell.epochs, cell.seed)
    torch.manual_seed(cell.seed)
    model = build(cell.model, split, width(n)).to(context.device)
    switches = {tau: schedule(n, cell.epochs, cell.seed, tau).switch for tau in cell.taus}
    state = context.kept() or {"step": 0, "seconds": 0.0, "photos": {}, "found": {}}
    found = state["found"]
    stepper = Stepper(split, plan, cell.augment, context.device)
    whole = plan.total * (1 + 0.2 * len(cell.taus))  # in steps of phase one, for the progress alone

    if "base" not in found:
        opt = optimizer(cell.base, model.parameters(), cell.lr)
        if state["step"]:
            model.load_state_dict(state["model"])
            opt.load_state_dict(state["optimizer"])
        model.train()
        _base(model, opt, stepper, switches, state, context, whole)
        test = split.x_test.to(context.device), split.y_test.to(context.device)
        model.eval()
        found["base"] = {"seconds": state["seconds"], **_quality(model, (stepper.x, stepper.y), test)}
        state |= {"model": None, "optimizer": None}
        context.keep(state)
    for tau, switch in switches.items():
        if str(tau) not in found:
            context.say((plan.total * (1 + 0.2 * len(found))) / whole, f"tau = {tau} T")
            photo = state["photos"][str(tau)]
            found[str(tau)] = _two_phase(cell, split, model, photo, tau, switch, stepper, context)
            del state["photos"][str(tau)]
            context.keep(state)
    return {"n": n, "m": width(n), "test": len(split.y_test), "steps": plan.total, **found}


def _base(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    stepper: Stepper,
    switches: dict[float, int],
    state: dict[str, Any],
    context: Context,
    whole: float,
) -> None:
    """Base alone, all its steps, photographed at the switches."""
    step, before, began = state["step"], state["seconds"], context.clock()

    def now() -> dict[str, Any]:
        passed = before + context.clock() - began
        return {
            "model": copy.deepcopy(model.state_dict()),
            "optimizer": copy.deepcopy(opt.state_dict()),
            "seconds": passed,
        }

    while step < stepper.plan.total:
        stepper(model, opt, step)
        step += 1
        for tau, switch in switches.items():
            if step == switch:
                state["photos"][str(tau)] = now()
        if step % 16 == 0:
            context.say(step / whole, "base")
            context.pause(lambda step=step: {**state, **now(), "step": step})
    state |= {"step": step, "seconds": before + context.clock() - began}


def _two_phase(
    cell: Run,
    split: DataSplit,
    model: nn.Module,
    photo: dict[str, Any],
    tau: float,
    switch: int,
    stepper: Stepper,
    context: Context,
) -> dict[str, Any]:
    """A(base) from a photo of base at tau: the solved head, then the paper's own phase two."""
    began = context.clock()
    model = copy.deepcopy(model)
    model.load_state_dict(photo["model"])
    opt = optimizer(cell.base, model.parameters(), cell.lr)
    opt.load_state_dict(photo["optimizer"])
    two = gcfast.TwoPhase(opt, model, switch_step=None, perturbation=PERTURBATION, seed=cell.seed)
    two.switch()
    train = (stepper.x, stepper.y)
    store = "features" if 4 * len(stepper.y) * width(len(stepper.y)) <= MOST_STORED else "below"
    cache = gcfast.FeatureCache(model, train, store=store)
    freeze = context.clock() - began
    test = gcfast.FeatureCache(
        model, (split.x_test.to(context.device), split.y_test.to(context.device)), store=store
    )
    wide: Any = model.get_submodule("wide")
    head: Any = model.get_submodule("head")
    stored = cache.features if store == "features" else gcfast.WideFeatures(cache.features, wide)

    def quality() -> dict[str, float]:
        return _quality(cache.head, (cache.features, cache.targets), (test.features, test.targets))

    found: dict[str, Any] = {"switch": {"seconds": photo["seconds"], **quality()}}

    def watch(*_: Any) -> None:
        context.check()

    began = context.clock()
    if tau in cell.prove:
        kept = context.checkpoint("certify.gcfast")
        proof = gcfast.certify(
            stored, cache.targets, loss="cross_entropy", route="direct", callback=watch, checkpoint=kept
        )
    else:
        proof = gcfast.certify(model, train, loss="cross_entropy", route="theorem")
    found["certificate"] = {
        "status": proof.status,
        "route": proof.route,
        "reason": proof.reason,
        "sigma_min_lower": proof.sigma_min_lower,
        "infimum": proof.infimum,
        "seconds": context.clock() - began,
    }

    start = (head.weight.detach().clone(), head.bias.detach().clone())
    began = context.clock()
    solved = gcfast.solve_head(
        stored,
        cache.targets,
        start=start,
        target_gap=AIM,
        callback=watch,
        checkpoint=context.checkpoint("solve.gcfast"),
    )
    seconds = context.clock() - began
    with torch.no_grad():
        head.weight.copy_(solved.weight)
        head.bias.copy_(solved.bias)
    reached = quality()
    found["nearest"] = {
        **reached,
        "gap": reached["loss"] - solved.infimum,
        "converged": solved.converged,
        "reason": solved.reason,
        "form": solved.form,
        "points": len(solved.path),
        "products": solved.products,
        "distance_bound": solved.distance_bound,
        "freeze_seconds": freeze,
        "solve_seconds": seconds,
        "seconds": photo["seconds"] + freeze + seconds,
    }
    with torch.no_grad():
        head.weight.copy_(start[0])
        head.bias.copy_(start[1])

    model.train()  # what is frozen stays frozen
    began = context.clock()
    for step in range(switch, stepper.plan.total):
        if stepper.augmentation is None:
            stepper(cache.head, two, step, cache.features)
        else:
            stepper(model, two, step)
        if step % 16 == 0:
            context.check()
    seconds = context.clock() - began
    found["paper"] = {**quality(), "seconds": photo["seconds"] + freeze + seconds}
    two.unfreeze()
    return found


def _quality(forward: Any, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    loss, _ = evaluate(forward, *train)
    return {"loss": loss, "test_error": evaluate(forward, *test)[1]}
