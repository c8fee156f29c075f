"""Numbers that the pages state, each computed from the cells."""

from __future__ import annotations

import statistics as plain
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .statistics import Difference, Mean, mean, paired, power_law

Cells = Mapping[str, dict[str, Any]]
TAUS = ("0.4", "0.6", "0.8")
NAMES = {
    "digits": "digits",
    "semeion": "Semeion",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10 (JPEG subset)",
    "cifar100": "CIFAR-100",
    "kmnist": "KMNIST",
    "svhn": "SVHN",
}
MODELS = {
    "narrow": "fully connected, d-8-8-m",
    "mlp": "MLP",
    "resnet18": "ResNet-18",
    "resnet18/4": "ResNet-18, width 16",
    "resnet18/4s2": "ResNet-18, width 16, stem stride 2",
}
BASES = {"sgd": "SGD, momentum", "adam": "Adam"}


def of(cells: Cells, kind: str) -> list[dict[str, Any]]:
    """Cells of a kind, in the order of data, model, base and name."""

    def order(name: str) -> tuple[int, int, bool, str]:
        p = cells[name]["params"]
        model = p.get("model", "narrow")
        return list(NAMES).index(p["data"]), list(MODELS).index(model), p.get("base") == "adam", name

    return [cells[name] for name in sorted((n for n in cells if n.split("-", 1)[0] == kind), key=order)]


@dataclass(frozen=True)
class Group:
    """The seeds of one row of Table 2."""

    data: str
    model: str
    base: str
    augment: bool
    seeds: tuple[int, ...]
    params: dict[str, Any]
    results: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        return f"{NAMES[self.data]}, {MODELS[self.model]}, {BASES[self.base]}"

    def values(self, *path: str) -> list[float]:
        found = []
        for result in self.results:
            value: Any = result
            for key in path:
                value = value[key]
            found.append(float(value))
        return found

    def error(self, *path: str) -> Mean:
        return mean(self.values(*path, "test_error"))

    def difference(self, *path: str) -> Difference:
        """Test error of ``path`` minus that of base, in points."""
        return paired(self.values(*path, "test_error"), self.values("base", "test_error"))

    def ratios(self, tau: str) -> list[float]:
        """Time of A(base) with the solved head over that of base."""
        whole, base = self.values(tau, "nearest", "seconds"), self.values("base", "seconds")
        return [a / b for a, b in zip(whole, base)]

    def statuses(self) -> list[tuple[str, str]]:
        return [
            (r[tau]["certificate"]["status"], str(r[tau]["certificate"]["route"]))
            for r in self.results
            for tau in TAUS
        ]


def groups(cells: Cells, augment: bool) -> list[Group]:
    """Table 2's rows, in the order of data, model, base."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in of(cells, "table2"):
        p = cell["params"]
        if p["augment"] == augment:
            found.setdefault((p["data"], p["model"], p["base"]), []).append(cell)
    return [
        Group(
            *key,
            augment,
            tuple(c["params"]["seed"] for c in found[key]),
            found[key][0]["params"],
            tuple(c["result"] for c in found[key]),
        )
        for key in found
    ]


def by_data(rows: Sequence[Group], *path: str) -> dict[str, Difference]:
    """Test error of ``path`` minus base's by data set: a value a seed, the mean over models and bases."""
    found = {}
    for data in dict.fromkeys(g.data for g in rows):
        mine = [g for g in rows if g.data == data]
        seeds = sorted(set.intersection(*(set(g.seeds) for g in mine)))
        one, other = [], []
        for seed in seeds:
            one.append(plain.mean(g.values(*path, "test_error")[g.seeds.index(seed)] for g in mine))
            other.append(plain.mean(g.values("base", "test_error")[g.seeds.index(seed)] for g in mine))
        found[data] = paired(one, other)
    return found


def gaps(rows: Iterable[Group]) -> list[float]:
    return [value for g in rows for tau in TAUS for value in g.values(tau, "nearest", "gap")]


def certificates(rows: Iterable[Group]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for group in rows:
        for key in group.statuses():
            found[key] = found.get(key, 0) + 1
    return found


def table1(cells: Cells) -> dict[tuple[str, str], dict[str, Any]]:
    return {(c["params"]["data"], c["params"]["model"]): c["result"] for c in of(cells, "table1")}


def widths(cell: dict[str, Any]) -> dict[float, dict[float, tuple[float, float, float, int, int]]]:
    """By beta and m / n: median, least, largest sigma_min bound over seeds, how many are proved, of all."""
    found: dict[float, dict[float, list[float]]] = {}
    for point in cell["result"]["points"]:
        bound = point["sigma_min_lower"] if point["status"] == "holds" else 0.0
        found.setdefault(point["beta"], {}).setdefault(point["ratio"], []).append(bound)
    return {
        beta: {
            r: (plain.median(v), min(v), max(v), sum(x > 0 for x in v), len(v))
            for r, v in sorted(ratios.items())
        }
        for beta, ratios in found.items()
    }


def certificate_time(cells: Cells, least: int = 1000) -> tuple[float, float]:
    """(exponent, factor) of seconds against n, from ``least`` samples on."""
    points = [(p["n"], p["seconds"]) for p in cells["times-mnist"]["result"]["points"] if p["n"] >= least]
    return power_law(points)


def reached(points: Sequence[Sequence[float]], loss: float) -> tuple[float, float] | None:
    """(seconds, step) at which a curve first is at ``loss`` or below."""
    return next(((seconds, step) for seconds, step, value in points if value <= loss), None)


def noise_means(cell: dict[str, Any]) -> dict[str, tuple[Mean, Difference, float]]:
    """By what was done in every run: test error, its difference to base, and the median training loss."""
    runs = cell["result"]["runs"]
    found = {}
    for way in (k for k, v in runs[0].items() if isinstance(v, dict) and "test_error" in v):
        if all(way in r for r in runs):  # an epsilon above the loss at tau asks for nothing
            errors = [r[way]["test_error"] for r in runs]
            base = [r["base"]["test_error"] for r in runs]
            found[way] = mean(errors), paired(errors, base), plain.median(r[way]["loss"] for r in runs)
    return found


def perturbations(cell: dict[str, Any]) -> dict[float, dict[str, Any]]:
    """By size: how many are proved, of how many, median sigma_min bound, and mean test errors."""
    found: dict[float, list[dict[str, Any]]] = {}
    for point in cell["result"]["points"]:
        found.setdefault(point["size"], []).append(point)
    return {
        size: {
            "proved": sum(p["status"] == "holds" for p in points),
            "of": len(points),
            "sigma": plain.median(p["sigma_min_lower"] for p in points),
            "loss": plain.median(p["loss"] for p in points),
            "switch": mean([p["switch_test_error"] for p in points]),
            "error": mean([p["test_error"] for p in points]),
            "difference": paired(
                [p["test_error"] for p in points], [p["test_error"] for p in found[min(found)]]
            ),
        }
        for size, points in sorted(found.items())
    }


def path_change(cell: dict[str, Any], first: float, last: float) -> float:
    """Mean over seeds of the test error at loss <= ``last`` minus that at loss <= ``first``, in points."""
    changes = []
    for run in cell["result"]["runs"]:
        at = [next(p["test_error"] for p in run["points"] if p["loss"] <= loss) for loss in (first, last)]
        changes.append(at[1] - at[0])
    return plain.mean(changes)
