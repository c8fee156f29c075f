"""docs/paper.md and docs/guide.md, made from the cells."""

from __future__ import annotations

import math
import re
import statistics as plain
from pathlib import Path
from typing import Any

from . import claims, findings
from .findings import BASES, MODELS, NAMES, TAUS, Cells, Group
from .running import read
from .statistics import Difference

ROOT = Path(__file__).resolve().parents[2]
CELLS = Path(__file__).parent / "cells"
PAPER, GUIDE = ROOT / "docs" / "paper.md", ROOT / "docs" / "guide.md"
FIGURES = ROOT / "docs" / "paper"
TEMPLATES = Path(__file__).parent


def write() -> int:
    from . import figures

    cells = read(CELLS)
    PAPER.write_text(fill(TEMPLATES / "paper.md", cells), encoding="utf-8")
    GUIDE.write_text(fill(TEMPLATES / "guide.md", cells), encoding="utf-8")
    figures.write(cells, FIGURES)
    return 0


def check() -> int:
    """1 if a page is not what the cells say."""
    cells, code = read(CELLS), 0
    for page in (PAPER, GUIDE):
        if not page.exists() or page.read_text(encoding="utf-8") != fill(TEMPLATES / page.name, cells):
            print(f"{page} is not what {CELLS} say: python -m experiments.paper --page")
            code = 1
    return code


def fill(template: Path, cells: Cells) -> str:
    """The template, each {name} replaced by what :func:`values` says of it. KeyError for an unknown name."""
    known = values(cells)
    return re.sub(r"\{([a-z0-9_]+)\}", lambda m: known[m[1]], template.read_text(encoding="utf-8"))


def values(cells: Cells) -> dict[str, str]:
    return claims.values(cells) | {
        "made": _made(cells),
        "table1": _table1(cells),
        "errors": _errors(findings.groups(cells, augment=False)),
        "differences": _differences(findings.groups(cells, augment=False)),
        "losses": _losses(findings.groups(cells, augment=False)),
        "augmented_errors": _errors(findings.groups(cells, augment=True)),
        "augmented_differences": _differences(findings.groups(cells, augment=True)),
        "augmented_losses": _losses(findings.groups(cells, augment=True)),
        "curves": _curves(cells),
        "widths": _widths(cells),
        "perturbations": _perturbations(cells),
        "noise": _noise(cells),
        "relu": _relu(cells),
        "few": _few(cells),
        "conflict": _conflict(cells),
        "transfer": _transfer(cells),
        "settings": _settings(cells),
    }


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _made(cells: Cells) -> str:
    machines: dict[str, int] = {}
    commits: dict[str, int] = {}
    for cell in cells.values():
        m = cell["machine"]
        name = f"{m['device'] or m['cpu']}, {m['instruction_set']}, torch {m['torch']}"
        machines[name] = machines.get(name, 0) + 1
        commits[cell["commit"]] = commits.get(cell["commit"], 0) + 1
    alone = sum(c["seconds"] for c in cells.values() if c["machine"]["threads"] > 1)
    beside = sum(c["seconds"] for c in cells.values() if c["machine"]["threads"] == 1)
    return (
        f"{len(cells)} cells: {(alone + beside / 2) / 3600:.1f} hours with two at a time; "
        + "; ".join(f"{count} on {name}" for name, count in machines.items())
        + ". Commits: "
        + ", ".join(f"{commit} ({count})" for commit, count in commits.items())
        + "."
    )


# -- Table 1


def _table1(cells: Cells) -> str:
    rows = []
    found = findings.table1(cells)
    for data, shown in NAMES.items():
        for model in ("narrow", "mlp", "resnet18", "resnet18/4"):
            r = found.get((data, model))
            if r is None:
                if not any(d == data for d, _ in found) and model == "narrow":
                    rows.append([shown, "all", *["–"] * 9, "data not available here"])
                continue
            rows.append(
                [
                    shown,
                    MODELS[model],
                    f"{r['n']:,}",
                    f"{r['m']:,}",
                    f"{r['status']}, {r['route'] or '–'}",
                    f"{r['rank_lower']:,}",
                    f"{r['sigma_min_lower']:.1e}",
                    f"{r['cond_estimate']:.1e}",
                    f"{r['seconds']:.2g}",
                    f"{r['peak_bytes'] / 1e6:,.0f}",
                    r["theorem"]["status"],
                    f"{r['matrix_rank_float32']:,}"
                    + ("" if r["matrix_rank_float32"] == r["n"] else " (wrong)"),
                ]
            )
    head = [
        "data",
        "model",
        "n",
        "m",
        "condition, route",
        "rank ≥ (proved)",
        "σ_min ≥ (proved)",
        "cond (estimate)",
    ]
    head += ["seconds", "MB", "theorem's assumptions", "`matrix_rank`, float32"]
    return _table(head, rows)


# -- Table 2


def _errors(rows: list[Group]) -> str:
    head = ["data, model, base", "base"]
    head += [f"A(base), {t} T" for t in TAUS] + [f"head solved, {t} T" for t in TAUS]
    lines = []
    for g in rows:
        line = [g.title, str(g.error("base"))]
        line += [str(g.error(t, "paper")) for t in TAUS] + [str(g.error(t, "nearest")) for t in TAUS]
        lines.append(line)
    return _table(head, lines)


def _differences(rows: list[Group]) -> str:
    head = ["data, model, base", *(f"A(base), {t} T" for t in TAUS), *(f"head solved, {t} T" for t in TAUS)]
    lines = []
    for g in rows:
        each = [g.difference(t, way) for way in ("paper", "nearest") for t in TAUS]
        lines.append([g.title, *(f"{d} (p = {_p(d)})" for d in each)])
    return _table(head, lines)


def _p(d: Difference) -> str:
    return "–" if math.isnan(d.p) else (f"{d.p:.2f}" if d.p >= 0.005 else f"{d.p:.0e}")


def _losses(rows: list[Group]) -> str:
    head = [
        "data, model, base",
        "n",
        "steps",
        "base: loss",
        "A(base), 0.6 T: loss",
        "head solved, 0.6 T: loss",
    ]
    head += ["largest gap, all τ", "certificates", "time, 0.6 T", "time with certificate"]
    lines = []
    for g in rows:
        certified: dict[str, int] = {}
        for status, route in g.statuses():
            name = f"{status} ({route})" if route != "None" else status
            certified[name] = certified.get(name, 0) + 1
        ratios = sorted(g.ratios("0.6"))
        proof = g.values("0.6", "certificate", "seconds")
        with_proof = [r + p / b for r, p, b in zip(g.ratios("0.6"), proof, g.values("base", "seconds"))]
        lines.append(
            [
                g.title,
                f"{g.results[0]['n']:,}",
                f"{g.results[0]['steps']:,}",
                f"{plain.median(g.values('base', 'loss')):.1e}",
                f"{plain.median(g.values('0.6', 'paper', 'loss')):.1e}",
                f"{plain.median(g.values('0.6', 'nearest', 'loss')):.1e}",
                f"{max(findings.gaps([g])):.1e}",
                ", ".join(f"{count} {name}" for name, count in certified.items()),
                f"{plain.median(ratios):.2f}× ({ratios[0]:.2f}–{ratios[-1]:.2f})",
                f"{plain.median(with_proof):.2f}×",
            ]
        )
    return _table(head, lines)


def _settings(cells: Cells) -> str:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for g in [*findings.groups(cells, False), *findings.groups(cells, True)]:
        row = found.setdefault((g.data, g.model), {"epochs": g.params["epochs"], "seeds": set()})
        row[g.base] = g.params["lr"]
        row["seeds"] |= set(g.seeds)
    lines = [
        [
            NAMES[d],
            MODELS[m],
            str(r["epochs"]),
            f"{r['sgd']:g}",
            f"{r['adam']:g}",
            ", ".join(map(str, sorted(r["seeds"]))),
        ]
        for (d, m), r in found.items()
    ]
    return _table(["data", "model", "epochs T", "step size, SGD", "step size, Adam", "seeds"], lines)


# -- figures in numbers


def _curves(cells: Cells) -> str:
    lines = []
    for cell in findings.of(cells, "curves"):
        r, p = cell["result"], cell["params"]
        last = r["nearest"][-1]
        base = findings.reached(r["base"], 1e-4)
        lines.append(
            [
                f"{NAMES[p['data']]}, {MODELS[p['model']]}, {BASES[p['base']]}",
                f"{r['base'][-1][2]:.1e} in {r['base'][-1][0]:.0f} s",
                f"{r['paper'][-1][2]:.1e} in {r['paper'][-1][0]:.0f} s",
                f"{last[2]:.1e} in {last[0]:.1f} s",
                "never" if base is None else f"{base[0]:.1f} s",
            ]
        )
    head = [
        "",
        "base, 5 T steps",
        "A(base), 5 T steps",
        "A(base), head solved at 0.6 T",
        "base at loss 1e-4 after",
    ]
    return _table(head, lines)


def _widths(cells: Cells) -> str:
    lines = []
    for cell in findings.of(cells, "width"):
        n = cell["result"]["points"][0]["n"]
        for beta, ratios in sorted(findings.widths(cell).items()):
            shown = [
                (f"{v[0]:.1e}" if v[0] > 0 else "nothing")
                + ("" if v[3] == v[4] else f" ({v[3]} of {v[4]} proved)")
                for v in ratios.values()
            ]
            lines.append([f"{NAMES[cell['params']['data']]}, n = {n:,}", f"{beta:g}", *shown])
    ratios = sorted({p["ratio"] for c in findings.of(cells, "width") for p in c["result"]["points"]})
    return _table(["data", "β", *(f"m = {r:g} n" for r in ratios)], lines)


def _perturbations(cells: Cells) -> str:
    lines = []
    for cell in findings.of(cells, "perturbation"):
        for size, r in findings.perturbations(cell).items():
            lines.append(
                [
                    f"{NAMES[cell['params']['data']]}, {MODELS[cell['params']['model']]}",
                    f"{size:g}",
                    f"{r['proved']} of {r['of']}",
                    f"{r['sigma']:.1e}",
                    f"{r['loss']:.1e}",
                    str(r["switch"]),
                    str(r["error"]),
                ]
            )
    head = [
        "data, model",
        "standard deviation",
        "proved",
        "σ_min ≥",
        "loss at τ",
        "test error at τ, %",
        "head solved, %",
    ]
    return _table(head, lines)


# -- beyond the paper


def _noise(cells: Cells) -> str:
    lines = []
    for cell in findings.of(cells, "noise"):
        p = cell["params"]
        for way, (error, difference, loss) in findings.noise_means(cell).items():
            shown = {
                "base": "base, T steps",
                "switch": "phase one, 0.6 T",
                "nearest": "head solved, gap ≤ 1e-6",
            }
            name = shown.get(
                way,
                way.replace("epsilon", "head solved to L ≤ L* +").replace("weight", "head solved, weight"),
            )
            lines.append(
                [
                    f"{NAMES[p['data']]}, {MODELS[p['model']]}, {BASES[p['base']]}",
                    name,
                    f"{loss:.1e}",
                    str(error),
                    "" if way == "base" else str(difference),
                ]
            )
    return _table(["20 % of the labels wrong", "", "training loss", "test error, %", "minus base's"], lines)


def _relu(cells: Cells) -> str:
    lines = []
    for cell in findings.of(cells, "relu"):
        runs = cell["result"]["runs"]
        held = [r for r in runs if r["status"] == "holds"]
        lines.append(
            [
                NAMES[cell["params"]["data"]],
                f"{cell['result']['n']:,}",
                f"{len(held)} of {len(runs)}",
                f"{min((r['sigma_min_lower'] for r in held), default=0.0):.1e}",
                f"{plain.median(r['seconds'] for r in runs):.2g}",
                f"{max(r['gap'] for r in runs):.1e}",
                str(findings.mean([r["test_error"] for r in runs])),
            ]
        )
    head = [
        "data",
        "n",
        "proved, direct route",
        "least σ_min bound",
        "seconds",
        "largest gap",
        "test error, %",
    ]
    return _table(head, lines)


def _few(cells: Cells) -> str:
    lines = []
    for cell in findings.of(cells, "few"):
        n = cell["result"]["n"]
        for p in cell["result"]["points"]:
            reached = f"{p['gap']:.1e}" + ("" if p["converged"] else " (not reached)")
            lines.append(
                [
                    NAMES[cell["params"]["data"]],
                    f"{n:,}",
                    f"{p['m']:,}",
                    p["status"],
                    reached,
                    f"{p['test_error']:.2f}",
                ]
            )
    return _table(["data", "n", "m", "condition", "gap after `solve_head`", "test error, %"], lines)


def _conflict(cells: Cells) -> str:
    lines = []
    for cell in findings.of(cells, "conflict"):
        r, p = cell["result"], cell["params"]
        lines.append(
            [
                NAMES[p["data"]],
                f"{len(r['planted'])}, {p['conflicting']} of them conflicting",
                "every one and no other"
                if r["all_named_and_no_other"] and r["conflicts_right"]
                else "NOT all right",
                f"{r['infimum']:.6e}",
                f"{r['expected_infimum']:.6e}",
                f"{r['gap']:.1e}" + ("" if r["converged"] else f" ({r['solver_reason']})"),
                f"{r['rank_lower']:,} of {r['n']:,}",
            ]
        )
    head = ["data", "copies planted", "named", "L* found", "2 k log 2 / n", "gap reached", "rank proved"]
    return _table(head, lines)


def _transfer(cells: Cells) -> str:
    lines = []
    scratch = {(g.data, g.model, g.base): g.error("base") for g in findings.groups(cells, False)}
    for cell in findings.of(cells, "transfer"):
        p, runs = cell["params"], cell["result"]["runs"]
        for name, shown in (
            ("pretrained", f"trained on {p['source_n']:,} of {NAMES[p['source']]}"),
            ("random", "at random"),
        ):
            mine = [r[name] for r in runs]
            lines.append(
                [
                    NAMES[p["data"]],
                    shown + ", frozen; wide layer random, head solved",
                    f"{sum(r['status'] == 'holds' for r in mine)} of {len(mine)}",
                    f"{max(r['gap'] for r in mine):.1e}",
                    f"{plain.median(r['seconds'] for r in mine):.1f}",
                    str(findings.mean([r["test_error"] for r in mine])),
                ]
            )
        whole = scratch[p["data"], p["model"], p["base"]]
        lines.append(
            [NAMES[p["data"]], "trained on the data themselves (Table 2's base)", "", "", "", str(whole)]
        )
    return _table(["data", "body", "proved", "largest gap", "seconds after the body", "test error, %"], lines)
