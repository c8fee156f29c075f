"""Where the paper stops: label noise, ReLU, too few features, conflicting copies, a body from elsewhere."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gcfast
from gcfast.cli.data.split import DataSplit

from .context import Context
from .frozen import Frozen, Setting, noisy
from .generalisation import AIM, Stepper
from .problem import build, evaluate, load, optimizer, schedule, settle, width


@dataclass(frozen=True)
class Noise(Setting):
    """Some labels wrong: base, the certified minimum, stops before it, and weight decay of the head."""

    share: float
    epsilons: tuple[float, ...]
    weight_decays: tuple[float, ...]
    seeds: tuple[int, ...]


def noise(cell: Noise, context: Context) -> dict[str, Any]:
    runs = []
    for index, seed in enumerate(cell.seeds):
        context.say(index / len(cell.seeds), f"seed {seed}")
        split = noisy(load(cell.data, cell.n, seed), cell.share, seed)
        frozen = Frozen(split, cell, seed, context, to_the_end=True)
        proof = gcfast.certify(frozen.features, frozen.y, loss="cross_entropy", route="direct", sharp=False)
        run: dict[str, Any] = {
            "seed": seed,
            "certificate": {"status": proof.status, "reason": proof.reason},
            "base": {"loss": frozen.base_loss, "test_error": frozen.base_test_error},
            "switch": {"loss": frozen.loss, "test_error": frozen.test_error()},
        }
        for epsilon in (AIM, *cell.epsilons):
            if epsilon < frozen.loss:
                solved = frozen.solve(target_gap=epsilon)
                run[f"epsilon {epsilon:g}" if epsilon != AIM else "nearest"] = {
                    "loss": frozen.train_loss(solved),
                    "gap": solved.gap,
                    "test_error": frozen.test_error(solved),
                }
        for decay in cell.weight_decays:
            solved = frozen.solve(weight_decay=decay, target_gap=1e-6)
            run[f"weight decay {decay:g}"] = {
                "loss": frozen.train_loss(solved),
                "gap": solved.gap,
                "converged": solved.converged,
                "test_error": frozen.test_error(solved),
            }
        runs.append(run)
    return {"n": len(split.y_train), "m": width(len(split.y_train)), "runs": runs}


@dataclass(frozen=True)
class Relu:
    """A network of ReLUs, which no theorem about analytic functions covers: the direct route."""

    data: str
    n: int | None
    lr: float
    epochs: int
    tau: float
    seeds: tuple[int, ...]


def relu_mlp(split: DataSplit, m: int) -> nn.Module:
    hidden = (split.features, 128, 64)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (before, after) in enumerate(itertools.pairwise(hidden)):
        layers[f"linear{i}"] = nn.Linear(before, after)
        nn.init.kaiming_normal_(layers[f"linear{i}"].weight)  # type: ignore[arg-type]
        layers[f"relu{i}"] = nn.ReLU()
    layers["wide"] = gcfast.WideLayer(hidden[-1], m, activation="relu")
    layers["head"] = nn.Linear(m, split.classes)
    return nn.Sequential(layers)


def relu(cell: Relu, context: Context) -> dict[str, Any]:
    runs = []
    for index, seed in enumerate(cell.seeds):
        context.say(index / len(cell.seeds), f"seed {seed}")
        split = load(cell.data, cell.n, seed)
        n = len(split.y_train)
        plan = schedule(n, cell.epochs, seed, cell.tau)
        torch.manual_seed(seed)
        model: Any = relu_mlp(split, width(n)).to(context.device)
        two = gcfast.TwoPhase(
            optimizer("sgd", model.parameters(), cell.lr), model, switch_step=plan.switch, seed=seed
        )
        stepper = Stepper(split, plan, False, context.device)
        for step in range(plan.switch):
            stepper(model, two, step)
        model.eval()
        data = (stepper.x, stepper.y)
        began = context.clock()
        proof = gcfast.certify(model, data, loss="cross_entropy")
        seconds = context.clock() - began
        solved = gcfast.solve_head(model, data, target_gap=AIM)
        loss, _ = evaluate(model, *data)
        test = split.x_test.to(context.device), split.y_test.to(context.device)
        runs.append(
            {
                "seed": seed,
                "status": proof.status,
                "route": proof.route,
                "reason": proof.reason,
                "sigma_min_lower": proof.sigma_min_lower,
                "rank_lower": proof.rank_lower,
                "assumptions": [str(a) for a in proof.assumptions],
                "seconds": seconds,
                "gap": loss - solved.infimum,
                "test_error": evaluate(model, *test)[1],
            }
        )
    return {"n": n, "m": width(n), "runs": runs}


@dataclass(frozen=True)
class Few(Setting):
    """n > m + 1: what the certificate says, and what the solver reaches."""

    ratios: tuple[float, ...]
    seed: int


def few(cell: Few, context: Context) -> dict[str, Any]:
    split = load(cell.data, cell.n, cell.seed)
    n = len(split.y_train)
    points = []
    for ratio in cell.ratios:
        m = round(ratio * n)
        context.say(len(points) / len(cell.ratios), f"m = {m}")
        frozen = Frozen(split, cell, cell.seed, context, m=m)
        proof = gcfast.certify(frozen.features, frozen.y, loss="cross_entropy")
        solved = frozen.solve(target_gap=AIM)
        points.append(
            {
                "m": m,
                "ratio": ratio,
                "status": proof.status,
                "reason": proof.reason,
                "gap": solved.gap,
                "converged": solved.converged,
                "solver_reason": solved.reason,
                "test_error": frozen.test_error(solved),
            }
        )
    return {"n": n, "points": points}


@dataclass(frozen=True)
class Conflict(Setting):
    """Copies of training samples, some with another label: the offenders named, L* as it must be."""

    agreeing: int
    conflicting: int
    seed: int


def conflict(cell: Conflict, context: Context) -> dict[str, Any]:
    split = load(cell.data, cell.n, cell.seed)
    n = len(split.y_train)
    generator = torch.Generator().manual_seed(cell.seed)
    chosen = torch.randperm(n, generator=generator)[: cell.agreeing + cell.conflicting]
    labels = split.y_train[chosen].clone()
    labels[cell.agreeing :] = (labels[cell.agreeing :] + 1) % split.classes
    planted = [sorted((int(i), n + k)) for k, i in enumerate(chosen)]
    split = replace(
        split,
        x_train=torch.cat([split.x_train, split.x_train[chosen]]),
        y_train=torch.cat([split.y_train, labels]),
    )
    frozen = Frozen(split, cell, cell.seed, context)
    proof = gcfast.certify(
        frozen.model.eval(), (split.x_train, split.y_train), loss="cross_entropy", sharp=False
    )
    solved = frozen.solve(target_gap=AIM)
    # a pair of one input with two labels: each at 1/2 gives log 2 a sample, and nothing gives less
    expected = 2 * cell.conflicting * math.log(2) / (n + cell.agreeing + cell.conflicting)
    named = sorted(o.samples for o in proof.offenders)
    return {
        "n": n + cell.agreeing + cell.conflicting,
        "status": proof.status,
        "reason": proof.reason,
        "rank_lower": proof.rank_lower,
        "planted": sorted(planted),
        "named": named,
        "all_named_and_no_other": named == sorted(planted),
        "conflicting": sorted(o.samples for o in proof.offenders if o.conflicting),
        "conflicts_right": sorted(o.samples for o in proof.offenders if o.conflicting)
        == sorted(planted[cell.agreeing :]),
        "infimum": solved.infimum,
        "expected_infimum": expected,
        "loss": solved.loss,
        "gap": solved.gap,
        "converged": solved.converged,
        "solver_reason": solved.reason,
    }


@dataclass(frozen=True)
class Transfer:
    """A body trained on one data set, frozen; a random wide layer and a solved head for another one."""

    source: str
    source_n: int
    source_epochs: int
    data: str
    n: int | None
    model: str
    base: str
    lr: float
    seeds: tuple[int, ...]


def transfer(cell: Transfer, context: Context) -> dict[str, Any]:
    runs = []
    for index, seed in enumerate(cell.seeds):
        context.say(index / len(cell.seeds), f"seed {seed}: the body")
        source = load(cell.source, cell.source_n, seed, 1000)
        split = _resized(load(cell.data, cell.n, seed), source.shape)
        n = len(split.y_train)
        began = context.clock()
        torch.manual_seed(seed)
        body: Any = build(cell.model, source, 256).to(context.device)
        _train(body, source, cell.base, cell.lr, cell.source_epochs, seed, context)
        pretraining = context.clock() - began
        source_error = evaluate(body.eval(), source.x_test, source.y_test)[1]
        untrained = build(cell.model, source, 256).to(context.device)
        settle(untrained, split.x_train)
        run: dict[str, Any] = {
            "seed": seed,
            "pretraining_seconds": pretraining,
            "source_test_error": source_error,
        }
        for name, model in (("pretrained", body), ("random", untrained)):
            run[name] = _random_wide(model.eval(), split, seed, context)
        runs.append(run)
    return {"n": n, "m": width(n), "runs": runs}


def _train(
    model: nn.Module, split: DataSplit, base: str, lr: float, epochs: int, seed: int, context: Context
) -> None:
    plan = schedule(len(split.y_train), epochs, seed)
    stepper = Stepper(split, plan, False, context.device)
    opt = optimizer(base, model.parameters(), lr)
    model.train()
    for step in range(plan.total):
        stepper(model, opt, step)
        if step % 16 == 0:
            context.check()


def _resized(split: DataSplit, shape: tuple[int, int, int]) -> DataSplit:
    """Images brought to another size, so that digits mean the same to a body."""

    def bring(x: Tensor) -> Tensor:
        return F.interpolate(x, size=shape[1:], mode="bilinear", align_corners=False)

    return replace(split, x_train=bring(split.x_train), x_test=bring(split.x_test), shape=shape)


@torch.no_grad()
def _random_wide(model: Any, split: DataSplit, seed: int, context: Context) -> dict[str, Any]:
    """A fresh wide layer over what the body gives, standardised, and the head solved from zero."""
    began = context.clock()
    z = gcfast.FeatureCache(_frozen(model), (split.x_train, split.y_train), store="below").features
    mean, std = z.mean(0), z.std(0).clamp_min(1e-6)
    n = len(z)
    torch.manual_seed(seed)
    wide = gcfast.WideLayer(z.shape[1], width(n), beta=model.wide.beta)
    rows = gcfast.WideFeatures((z - mean) / std, wide)
    zero = torch.zeros(split.classes, width(n)), torch.zeros(split.classes)
    proof = gcfast.certify(rows, split.y_train, loss="cross_entropy", route="direct", sharp=False)
    solved = gcfast.solve_head(rows, split.y_train, start=zero, target_gap=AIM)
    seconds = context.clock() - began
    z_test = gcfast.FeatureCache(_frozen(model), (split.x_test, split.y_test), store="below").features
    logits = wide((z_test - mean) / std) @ solved.weight.T + solved.bias
    return {
        "status": proof.status,
        "reason": proof.reason,
        "sigma_min_lower": proof.sigma_min_lower,
        "gap": solved.gap,
        "seconds": seconds,
        "test_error": 100 * float((logits.argmax(1) != split.y_test).double().mean()),
    }


def _frozen(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    return model
