"""What the cells say of each claim, and the numbers behind each piece of advice."""

# ruff: noqa: E501  (the pages' own lines)

from __future__ import annotations

import statistics as plain
from typing import Any

from . import findings
from .findings import MODELS, NAMES, TAUS, Cells, Group
from .problem import TARGET_GAP
from .statistics import Difference

NEAR = 0.3  # points of test error: as well as base
CONFIRMED, NOT, UNTESTED = "**Confirmed**", "**Not confirmed**", "**Not testable here**"


def values(cells: Cells) -> dict[str, str]:
    """By name, every sentence and number of the templates that is not a table."""
    plain_rows, augmented = findings.groups(cells, False), findings.groups(cells, True)
    return {
        "claim_expressivity": _expressivity(cells, [*plain_rows, *augmented]),
        "claim_theorem": _theorem(cells, [*plain_rows, *augmented]),
        "claim_generalisation": _generalisation(plain_rows, augmented),
        "claim_minimum": _minimum([*plain_rows, *augmented]),
        "claim_time": _time(plain_rows),
        "claim_untested": _untested(cells),
        **_numbers(cells, plain_rows, augmented),
    }


def _and(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _expressivity(cells: Cells, rows: list[Group]) -> str:
    nets = {k: r for k, r in findings.table1(cells).items() if k[1].startswith("resnet")}
    held = {k: r for k, r in nets.items() if r["status"] == "holds" and r["route"] == "direct"}
    trained = findings.certificates(g for g in rows if g.model.startswith("resnet"))
    direct = trained.get(("holds", "direct"), 0)
    shown = _and([f"{NAMES[d]} (n = {r['n']:,}, {MODELS[m]})" for (d, m), r in held.items()]) if held else ""
    verdict = CONFIRMED if len(held) == len(nets) and nets else (f"{NOT} everywhere" if held else NOT)
    text = f"{verdict}: rank n is proved, rounding included, for {len(held)} of {len(nets)} ResNet-18"
    text += f" at random weights: {shown}." if held else " at random weights."
    if open_ := [
        f"{NAMES[d]}, {MODELS[m]}: {r['reason']}" for (d, m), r in nets.items() if (d, m) not in held
    ]:
        text += " Open: " + "; ".join(open_) + "."
    text += f" At trained and frozen weights it is proved directly in {direct} of the {sum(trained.values())}"
    text += " ResNet runs of Table 2"
    rest = {k: v for k, v in trained.items() if k != ("holds", "direct")}
    text += "".join(
        f"; in {count} " + ("by the theorem's assumptions" if key == ("holds", "theorem") else " ".join(key))
        for key, count in rest.items()
    )
    compared = [r for r in findings.table1(cells).values() if "matrix_rank_float32" in r]
    wrong = [r for r in compared if r["matrix_rank_float32"] != r["rank_lower"] and r["status"] == "holds"]
    text += (
        f". A numerical rank in float32, torch's `matrix_rank`, contradicts the proof in {len(wrong)} of"
        f" {len(compared)} rows of Table 1"
    )
    return text + ("." if not wrong else ": there it cannot decide the condition.")


def _theorem(cells: Cells, rows: list[Group]) -> str:
    nets = {k: r for k, r in findings.table1(cells).items() if k[1] == "narrow"}
    held = [k for k, r in nets.items() if r["theorem"]["status"] == "holds"]
    direct = [k for k, r in nets.items() if r["status"] == "holds" and r["route"] == "direct"]
    verdict = CONFIRMED if nets and len(held) == len(nets) else NOT
    text = (
        f"{verdict}: with hidden layers of 8 and 8 units the theorem's assumptions, distinct rows below the wide layer "
        f"among them, hold as stored for {len(held)} of {len(nets)} data sets"
    )
    if direct:
        least = min(nets[k]["sigma_min_lower"] for k in direct)
        text += (
            f". At random weights rank n is proved directly as well for {_and([NAMES[d] for d, _ in direct])}"
            f" (σ_min ≥ {least:.0e} at least)"
        )
    if undecided := [NAMES[d] for d, m in nets if (d, m) not in direct]:
        text += f"; not in floating point for {_and(undecided)}, where the features of 8 numbers a sample are too nearly"
        text += " dependent: what the theorem says almost surely is then no use to a solver"
    return text + "."


def _within(found: dict[str, Difference]) -> bool:
    return all(abs(d.mean) <= NEAR for d in found.values())


def _generalisation(rows: list[Group], augmented: list[Group]) -> str:
    paper, solved = findings.by_data(rows, "0.6", "paper"), findings.by_data(rows, "0.6", "nearest")
    worse = [NAMES[d] for found in (paper, solved) for d, v in found.items() if v.mean > NEAR]
    if not worse and _within(paper) and _within(solved):
        verdict = CONFIRMED
    elif not worse:
        verdict = f"{CONFIRMED}, and on some data A(base) is the better one"
    else:
        verdict = f"{NOT} within {NEAR} points on {_and(list(dict.fromkeys(worse)))}"

    def listed(found: dict[str, Difference]) -> str:
        return _and([f"{NAMES[d]} {v}" for d, v in found.items()])

    text = (
        f"{verdict}. Test error of A(base) minus that of base, in points, τ = 0.6 T, mean over models, bases and seeds "
        f"with a 95 % interval: {listed(paper)}; with the head solved instead: {listed(solved)}"
    )
    if augmented:
        text += f". With augmentation: {listed(findings.by_data(augmented, '0.6', 'paper'))}; head solved: "
        text += listed(findings.by_data(augmented, "0.6", "nearest"))
    return text + "."


def _minimum(rows: list[Group]) -> str:
    gaps = findings.gaps(rows)
    inside = sum(g <= TARGET_GAP for g in gaps)
    verdict = CONFIRMED if inside == len(gaps) else NOT
    paper = sorted(v for g in rows for v in g.values("0.6", "paper", "loss"))
    base = sorted(v for g in rows for v in g.values("base", "loss"))
    return (
        f"{verdict} for the solved head: L − L* ≤ {TARGET_GAP:.0e} in {inside} of {len(gaps)} runs, largest gap "
        f"{max(gaps):.1e}. The paper's own phase two, base on the head for the rest of its T steps, is on the way there: "
        f"its loss at T is {plain.median(paper):.1e} (median; {paper[0]:.0e} to {paper[-1]:.0e}), that of base "
        f"{plain.median(base):.1e}"
    )


def _time(rows: list[Group]) -> str:
    ratios = {g.title: plain.median(g.ratios("0.6")) for g in rows}
    slow = [title for title, r in ratios.items() if r > 0.7]
    text = f"A(base) with the head solved at τ = 0.6 T takes {min(ratios.values()):.2f} to {max(ratios.values()):.2f} of"
    text += " base's time (medians of the rows of Table 2, features and solve included, the certificate not)"
    return text + (f"; above 0.7: {'; '.join(slow)}" if slow else "") + "."


def _untested(cells: Cells) -> str:
    there = {d for d, _ in findings.table1(cells)}
    absent = [shown for data, shown in NAMES.items() if data not in there]
    text = f"{_and(absent)} are not here as data; " if absent else ""
    return f"{UNTESTED}: {text}full-width training of ResNet-18 needs a GPU (`--suite gpu`), and none was at hand."


def _numbers(cells: Cells, rows: list[Group], augmented: list[Group]) -> dict[str, str]:
    known: dict[str, str] = {}
    ratios = [r for g in rows for r in g.ratios("0.6")]
    known["ratio_median"] = f"{plain.median(ratios):.2f}"
    known["ratio_least"], known["ratio_most"] = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    known["gap_most"] = f"{max(findings.gaps([*rows, *augmented])):.1e}"
    known["comparisons"] = str(6 * len(rows))
    known["by_chance"] = f"{0.05 * 6 * len(rows):.1f}"
    known["significant"] = str(
        sum(g.difference(t, way).p < 0.05 for g in rows for t in TAUS for way in ("paper", "nearest"))
    )
    for tau in TAUS:
        solved = [g.difference(tau, "nearest").mean for g in rows]
        paper = [g.difference(tau, "paper").mean for g in rows]
        name = tau.replace(".", "")
        known[f"solved_mean_{name}"] = f"{plain.mean(solved):+.2f}"
        known[f"solved_worst_{name}"] = f"{max(solved):+.2f}"
        known[f"paper_mean_{name}"] = f"{plain.mean(paper):+.2f}"
        known[f"paper_worst_{name}"] = f"{max(paper):+.2f}"
        times = [plain.median(g.ratios(tau)) for g in rows]
        known[f"time_{name}"] = f"{min(times):.2f}–{max(times):.2f}"
    exponent, _ = findings.certificate_time(cells)
    known["time_exponent"] = f"{exponent:.2f}"
    points = cells["times-mnist"]["result"]["points"]
    for n in (1000, 8000):
        point = next(p for p in points if p["n"] == n)
        known[f"proof_{n}"] = f"{point['seconds']:.2g} s"
        known[f"theorem_{n}"] = f"{1e3 * point['theorem_seconds']:.0f} ms"
    solved = [g.difference("0.6", "nearest").mean for g in augmented]
    known["augmented_least"], known["augmented_most"] = f"{min(solved):+.1f}", f"{max(solved):+.1f}"
    nets = [g for g in rows if g.model.startswith("resnet")]
    for name, path in (("base", ("base",)), ("paper", ("0.6", "paper"))):
        known[f"resnet_{name}_loss"] = f"{plain.median(v for g in nets for v in g.values(*path, 'loss')):.1e}"
    changes = [g.difference("0.6", "nearest").mean for g in nets]
    known["resnet_least"], known["resnet_most"] = f"{min(changes):+.1f}", f"{max(changes):+.1f}"
    for name, way in (("adam_mlp", "nearest"), ("adam_mlp_paper", "paper")):
        mine = [g for g in rows if (g.model, g.base) == ("mlp", "adam")]
        known[name] = _and([f"{g.difference('0.6', way)} ({NAMES[g.data]})" for g in mine])
    known["cost_lines"] = _cost(rows)
    known |= _width_numbers(cells) | _noise_numbers(cells)
    return known | _perturbation_numbers(cells) | _path_numbers(cells) | _transfer_numbers(cells)


def _s(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _cost(rows: list[Group]) -> str:
    """Seconds of one thread of what follows phase one, by data and model."""
    lines = []
    for key in dict.fromkeys((g.data, g.model) for g in rows):
        mine = [g for g in rows if (g.data, g.model) == key]

        def median(*path: str, mine: list[Group] = mine) -> float:
            return plain.median(v for g in mine for v in g.values(*path))

        proved = [
            r[t]["certificate"]["seconds"]
            for g in mine
            for r in g.results
            for t in TAUS
            if r[t]["certificate"]["route"] == "direct"
        ]
        n = mine[0].results[0]["n"]
        lines.append(
            f"- {NAMES[key[0]]}, {MODELS[key[1]]}, n = {n:,}: base's T steps {_s(median('base', 'seconds'))} s; the features "
            f"once {_s(median('0.6', 'nearest', 'freeze_seconds'))} s, the head solved {_s(median('0.6', 'nearest', 'solve_seconds'))} s"
            + (f", rank n proved {_s(plain.median(proved))} s" if proved else "")
            + " (CPU seconds of one thread)."
        )
    return "\n".join(lines)


def _perturbation_numbers(cells: Cells) -> dict[str, str]:
    found = [findings.perturbations(c) for c in findings.of(cells, "perturbation")]
    none = [(f[0.0]["proved"], f[0.0]["of"]) for f in found]
    spoiled = [(f[0.1]["of"] - f[0.1]["proved"], f[0.1]["of"]) for f in found]
    return {
        "perturbation_default": f"{max(abs(f[1e-3]['difference'].mean) for f in found):.2f}",
        "perturbation_large": f"{max(abs(f[1e-1]['difference'].mean) for f in found):.1f}",
        "perturbation_unproved": f"{sum(p for p, _ in spoiled)} of {sum(n for _, n in spoiled)} runs",
        "perturbation_none": f"{sum(p for p, _ in none)} of {sum(n for _, n in none)} runs",
    }


def _path_numbers(cells: Cells) -> dict[str, str]:
    changes: dict[float, list[str]] = {0.0: [], 0.2: []}
    for cell in findings.of(cells, "path"):
        p = cell["params"]
        change = findings.path_change(cell, 1e-2, 1e-6)
        changes[p["noise"]].append(f"{change:+.1f} ({NAMES[p['data']]}, {MODELS[p['model']]})")
    return {"path_clean": _and(changes[0.0]), "path_noisy": _and(changes[0.2])}


def _transfer_numbers(cells: Cells) -> dict[str, str]:
    runs = [r for c in findings.of(cells, "transfer") for r in c["result"]["runs"]]
    known = {"transfer_seconds": f"{plain.median(r['pretrained']['seconds'] for r in runs):.1f}"}
    for body in ("pretrained", "random"):
        known[f"transfer_{body}"] = str(findings.mean([r[body]["test_error"] for r in runs]))
    return known


def _width_numbers(cells: Cells) -> dict[str, str]:
    """How much a wider layer and a sharper softplus bring to sigma_min."""
    known = {}
    found = {c["params"]["data"]: findings.widths(c) for c in findings.of(cells, "width")}
    steps: dict[str, list[float]] = {"equal": [], "wide": [], "beta": [], "beta_wide": []}
    unproved = 0
    for by_beta in found.values():
        for ratios in by_beta.values():
            unproved += sum(v[4] - v[3] for v in ratios.values())
            if ratios[1.0][0] > 0:
                steps["equal"].append(ratios[1.1][0] / ratios[1.0][0])
            steps["wide"].append(ratios[2.0][0] / ratios[1.1][0])
        for name, at in (("beta", 1.1), ("beta_wide", 2.0)):
            steps[name].append(by_beta[4.0][at][0] / by_beta[1.0][at][0])
    for name, ratio in steps.items():
        known[f"width_{name}"] = f"{float(f'{plain.median(ratio):.2g}'):,g}"
    known["width_unproved"] = str(unproved)
    return known


def _noise_numbers(cells: Cells) -> dict[str, str]:
    known: dict[str, Any] = {}
    hurt, cured, best = [], [], []
    for cell in findings.of(cells, "noise"):
        means = findings.noise_means(cell)
        decays = {k: v for k, v in means.items() if k.startswith("weight decay")}
        name, (_, difference, _) = min(decays.items(), key=lambda kv: kv[1][0].mean)
        hurt.append(means["nearest"][1].mean)
        cured.append(difference.mean)
        best.append(name.removeprefix("weight decay "))
    known["noise_least"], known["noise_most"] = f"{min(hurt):+.1f}", f"{max(hurt):+.1f}"
    known["decay_least"], known["decay_most"] = f"{min(cured):+.1f}", f"{max(cured):+.1f}"
    known["decay_best"] = ", ".join(sorted(set(best), key=float))
    return known
