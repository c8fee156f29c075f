"""Phase one and the freeze, for cells that look at what the head can do from there."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import gcfast
from gcfast.cli.data.split import DataSplit

from .context import Context
from .generalisation import Stepper
from .problem import PERTURBATION, build, evaluate, optimizer, schedule, width


@dataclass(frozen=True)
class Setting:
    """What trains phase one: the parameters that cells about one setting have in common."""

    data: str
    n: int | None
    model: str
    base: str
    lr: float
    epochs: int
    tau: float


def noisy(split: DataSplit, share: float, seed: int) -> DataSplit:
    """``share`` of the training labels replaced by another class each, drawn by ``seed``."""
    if not share:
        return split
    generator = np.random.default_rng((seed, 2))
    n = len(split.y_train)
    chosen = torch.from_numpy(generator.permutation(n)[: round(share * n)])
    other = torch.from_numpy(generator.integers(1, split.classes, len(chosen)))
    labels = split.y_train.clone()
    labels[chosen] = (labels[chosen] + other) % split.classes
    return replace(split, y_train=labels)


class Frozen:
    """A model trained by base until tau, perturbed and frozen, with its rows below the wide layer."""

    def __init__(
        self,
        split: DataSplit,
        setting: Setting,
        seed: int,
        context: Context,
        *,
        m: int | None = None,
        perturbation: float = PERTURBATION,
        to_the_end: bool = False,
        **options: Any,
    ) -> None:
        """``to_the_end``: also base alone for all its steps, its test error in ``base_test_error``."""
        n = len(split.y_train)
        plan = schedule(n, setting.epochs, seed, setting.tau)
        stepper = Stepper(split, plan, False, context.device)
        torch.manual_seed(seed)
        model = (
            build(setting.model, split, width(n) if m is None else m, **options).to(context.device).train()
        )
        opt = optimizer(setting.base, model.parameters(), setting.lr)
        test = split.x_test.to(context.device), split.y_test.to(context.device)
        for step in range(plan.switch):
            stepper(model, opt, step)
            if step % 64 == 0:
                context.check()
        if to_the_end:
            kept = _state(model), _state(opt)
            for step in range(plan.switch, plan.total):
                stepper(model, opt, step)
            model.eval()
            self.base_loss = evaluate(model, stepper.x, stepper.y)[0]
            self.base_test_error = evaluate(model, *test)[1]
            model.load_state_dict(kept[0])
            opt.load_state_dict(kept[1])
            model.train()
        two = gcfast.TwoPhase(opt, model, switch_step=None, perturbation=perturbation, seed=seed)
        two.switch()
        self.model = model
        self.cache = gcfast.FeatureCache(model, (stepper.x, stepper.y), store="below")
        self._test = gcfast.FeatureCache(model, test, store="below")
        self.features = gcfast.WideFeatures(self.cache.features, model.get_submodule("wide"))
        self.y = self.cache.targets
        self._head: Any = model.get_submodule("head")
        self.start = (self._head.weight.detach().clone(), self._head.bias.detach().clone())
        self.loss = evaluate(self.cache.head, self.cache.features, self.y)[0]

    def solve(self, **options: Any) -> gcfast.HeadSolution:
        """The head nearest to where phase one left it, or the regularised one; the model keeps its own."""
        return gcfast.solve_head(self.features, self.y, start=self.start, **options)

    @torch.no_grad()
    def test_error(self, solved: gcfast.HeadSolution | None = None) -> float:
        return self._with(solved, self._test)[1]

    @torch.no_grad()
    def train_loss(self, solved: gcfast.HeadSolution) -> float:
        return self._with(solved, self.cache)[0]

    def _with(self, solved: gcfast.HeadSolution | None, rows: gcfast.FeatureCache) -> tuple[float, float]:
        weight, bias = self.start if solved is None else (solved.weight, solved.bias)
        self._head.weight.copy_(weight)
        self._head.bias.copy_(bias)
        found = evaluate(rows.head, rows.features, rows.targets)
        self._head.weight.copy_(self.start[0])
        self._head.bias.copy_(self.start[1])
        return found


def _state(thing: Any) -> Any:

    return copy.deepcopy(thing.state_dict())
