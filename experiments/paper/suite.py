"""Every cell: its name, what it runs, how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import beyond, convergence, expressivity, generalisation
from .context import Context

SEEDS = (0, 1, 2, 3, 4)
TAUS = (0.4, 0.6, 0.8)
DATA = ("digits", "semeion", "mnist", "cifar10", "cifar100", "kmnist", "svhn")
PROOFS = {"digits": None, "semeion": None}  # samples of Table 1: all of these, of others the first
PROOF_N = 4000

# Step sizes and epochs, chosen for base alone on seed 0 and used by A(base) unchanged; the page has more.
HYPER: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "mlp"): {"epochs": 100, "sgd": 0.01, "adam": 1e-3},
    ("semeion", "mlp"): {"epochs": 100, "sgd": 0.02, "adam": 1e-3},
    ("mnist", "mlp"): {"epochs": 60, "sgd": 0.005, "adam": 1e-4},
    ("digits", "resnet18/4"): {"epochs": 20, "sgd": 0.02, "adam": 1e-3},
    ("semeion", "resnet18/4"): {"epochs": 20, "sgd": 0.02, "adam": 1e-3},
    ("mnist", "resnet18/4s2"): {"epochs": 16, "sgd": 0.005, "adam": 3e-4},
    ("mnist", "resnet18"): {"epochs": 12, "sgd": 0.002, "adam": 3e-4},
    ("cifar10", "resnet18"): {"epochs": 24, "sgd": 0.005, "adam": 3e-4},
}
SAMPLES = {"digits": None, "semeion": None, "mnist": 10_000}
# CPU seconds of one thread: an epoch, and what the three phases two take
COST = {
    ("digits", "mlp"): (0.04, 3),
    ("semeion", "mlp"): (0.04, 3),
    ("mnist", "mlp"): (2.3, 120),
    ("digits", "resnet18/4"): (0.6, 6),
    ("semeion", "resnet18/4"): (1.5, 8),
    ("mnist", "resnet18/4s2"): (10, 80),
}


@dataclass(frozen=True)
class Cell:
    """``cost``: seconds, roughly. ``quiet``: timed on all threads, so that nothing may run beside it."""

    name: str
    work: Callable[[Any, Context], dict[str, Any]]
    params: Any
    cost: float
    quiet: bool = False

    @property
    def kind(self) -> str:
        return self.name.split("-", 1)[0]

    def run(self, context: Context) -> dict[str, Any]:
        return self.work(self.params, context)


def _slug(*parts: object) -> str:
    return "-".join(str(part).replace("/", "_") for part in parts)


def table1(device_rows: bool = False) -> list[Cell]:
    cells = []
    if device_rows:
        for data, n in (("cifar10", 20_000), ("mnist", 50_000)):
            params = expressivity.Proof(data, n, "resnet18", 0, compare=n <= 20_000)
            cells.append(Cell(_slug("table1", data, "resnet18", n), expressivity.row, params, 240, True))
        return cells
    for data in DATA:
        for model in ("narrow", "mlp", "resnet18", *(["resnet18/4"] if data.startswith("cifar") else [])):
            params = expressivity.Proof(data, PROOFS.get(data, PROOF_N), model, 0)
            big = data not in PROOFS
            cost = {"resnet18": 90 if big else 12}.get(model, 35 if big else 3)
            cells.append(Cell(_slug("table1", data, model), expressivity.row, params, cost, True))
    return cells


def table2(data: str, model: str, n: int | None, seeds: tuple[int, ...], augment: bool) -> list[Cell]:
    cells = []
    hyper = HYPER[data, model]
    epoch, rest = COST.get((data, model), (20, 100))
    for base in ("sgd", "adam"):
        for seed in seeds:
            large = n is not None
            prove = TAUS if not large else ((0.6,) if seed == 0 and base == "sgd" and n == 10_000 else ())
            params = generalisation.Run(
                data, n, model, base, hyper[base], hyper["epochs"], seed, TAUS, prove, augment
            )
            cost = epoch * hyper["epochs"] + rest + 130 * (large and bool(prove))
            if augment:
                cost += 0.5 * epoch * hyper["epochs"]
            kind = "augmented" if augment else "plain"
            cells.append(
                Cell(_slug("table2", data, model, base, kind, seed), generalisation.run, params, cost)
            )
    return cells


def _setting(data: str, model: str, base: str) -> tuple[str, float, int, float]:
    """(base, step size, epochs, tau) of the cells that look at one setting."""
    hyper = HYPER[data, model]
    return base, hyper[base], hyper["epochs"], 0.6


def figures() -> list[Cell]:
    ratios = (1.0, 1.05, 1.1, 1.5, 2.0)
    cells = [
        Cell(
            _slug("width", data),
            expressivity.widths,
            expressivity.Widths(data, n, "mlp", ratios, (1.0, 4.0), SEEDS),
            cost,
            True,
        )
        for data, n, cost in (("digits", None, 40), ("semeion", None, 40), ("mnist", 2000, 120))
    ]
    sizes = (250, 500, 1000, 2000, 4000, 8000)
    cells.append(
        Cell("times-mnist", expressivity.times, expressivity.Times("mnist", "mlp", sizes, 0), 80, True)
    )
    for data, model in (("digits", "mlp"), ("semeion", "resnet18/4")):
        for base in ("sgd", "adam"):
            many = convergence.Curves(data, None, model, *_setting(data, model, base), 5, 0)
            cost = 8 * COST[data, model][0] * HYPER[data, model]["epochs"]
            cells.append(Cell(_slug("curves", data, model, base), convergence.curves, many, cost))
    for data, model in (("digits", "mlp"), ("semeion", "mlp"), ("semeion", "resnet18/4")):
        for share in (0.0, 0.2):
            along = convergence.Path(data, None, model, *_setting(data, model, "sgd"), SEEDS, share)
            cost = 5 * (0.6 * COST[data, model][0] * HYPER[data, model]["epochs"] + 4)
            cells.append(Cell(_slug("path", data, model, f"noise{share:g}"), convergence.path, along, cost))
    for data, model, seeds in (
        ("digits", "mlp", SEEDS),
        ("semeion", "mlp", SEEDS),
        ("digits", "resnet18/4", SEEDS[:3]),
    ):
        sizes = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
        tried = convergence.Perturbations(data, None, model, *_setting(data, model, "sgd"), sizes, seeds)
        cost = 5 * len(seeds) * (0.6 * COST[data, model][0] * HYPER[data, model]["epochs"] + 1)
        cells.append(Cell(_slug("perturbation", data, model), convergence.perturbations, tried, cost))
    return cells


def further() -> list[Cell]:
    cells = []
    for data, model in (("digits", "mlp"), ("semeion", "mlp"), ("semeion", "resnet18/4")):
        for base in ("sgd", "adam"):
            params = beyond.Noise(
                data,
                None,
                model,
                *_setting(data, model, base),
                0.2,
                (0.5, 0.3, 0.1, 0.01),
                (1e-4, 1e-3, 1e-2, 1e-1),
                SEEDS,
            )
            cost = 5 * (COST[data, model][0] * HYPER[data, model]["epochs"] + 6)
            cells.append(Cell(_slug("noise", data, model, base), beyond.noise, params, cost))
    for data, n, epochs in (("digits", None, 60), ("semeion", None, 60), ("mnist", 2000, 20)):
        cells.append(
            Cell(_slug("relu", data), beyond.relu, beyond.Relu(data, n, 0.005, epochs, 0.6, SEEDS), 20)
        )
    for data in ("digits", "semeion"):
        setting = (data, None, "mlp", *_setting(data, "mlp", "sgd"))
        ratios = (0.1, 0.25, 0.5, 0.9, 1.0, 1.1)
        cells.append(Cell(_slug("few", data), beyond.few, beyond.Few(*setting, ratios, 0), 25))
        cells.append(Cell(_slug("conflict", data), beyond.conflict, beyond.Conflict(*setting, 5, 7, 0), 5))
    params = beyond.Transfer("mnist", 4000, 2, "semeion", None, "resnet18/4", "sgd", 0.005, SEEDS)
    cells.append(Cell("transfer-mnist-semeion", beyond.transfer, params, 5 * 40))
    return cells


def cpu() -> list[Cell]:
    cells = table1()
    for data in ("digits", "semeion", "mnist"):
        for model in ("mlp", "resnet18/4s2" if data == "mnist" else "resnet18/4"):
            cells += table2(data, model, SAMPLES[data], SEEDS, augment=False)
    for data in ("digits", "semeion"):
        for model in ("mlp", "resnet18/4"):
            cells += table2(data, model, SAMPLES[data], SEEDS, augment=True)
    return cells + figures() + further()


def gpu() -> list[Cell]:
    cells = table1(device_rows=True)
    for data, n in (("cifar10", 20_000), ("mnist", 60_000)):
        for augment in (False, True):
            cells += table2(data, "resnet18", n, SEEDS[:3], augment)
    return cells
