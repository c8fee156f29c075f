"""The pictures of docs/paper.md, as SVG with the same bytes from the same cells and the same matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from .findings import BASES, MODELS, NAMES, Cells, certificate_time, of, widths

BASE, PAPER, NEAREST, OTHER = "#4c8ed9", "#e0782f", "#1f9d6b", "#8a63c9"  # those of the report
STYLE = {
    "svg.hashsalt": "gcfast",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
}


def write(cells: Cells, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in (("loss", _loss), ("path", _path), ("time", _time), ("width", _width)):
            figure = draw(cells)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def _title(cell: dict[str, Any], base: bool = True) -> str:
    p = cell["params"]
    return f"{NAMES[p['data']]}, {MODELS[p['model']]}" + (f"\n{BASES[p['base']]}" if base else "")


def _loss(cells: Cells) -> Any:
    """Loss against steps and against seconds, down to 1e-8."""
    found = of(cells, "curves")
    figure, axes = plt.subplots(2, len(found), figsize=(3.1 * len(found), 5.2), sharey=True, squeeze=False)
    for column, cell in enumerate(found):
        r = cell["result"]
        for row, (x, label) in enumerate(((1, "steps"), (0, "seconds of one thread"))):
            axis = axes[row, column]
            for key, name, colour in (("base", "base", BASE), ("paper", "A(base)", PAPER)):
                axis.plot([p[x] for p in r[key]], [p[2] for p in r[key]], color=colour, label=name, lw=1.5)
            if x == 0:
                # from where phase one left it, over the time that the features took
                before = [p for p in r["paper"] if p[1] <= r["switch"]][-1]
                line = [(before[0], before[2])] + [(p[0], p[2]) for p in r["nearest"]]
                axis.plot(*zip(*line), "o-", color=NEAREST, label="A(base), head solved", lw=1.5, ms=3)
            else:
                axis.axvline(r["switch"], color="0.5", lw=0.8, ls=":")
                axis.axvline(r["usual_steps"], color="0.5", lw=0.8, ls="--")
                last = r["nearest"][-1][2]
                axis.plot([r["switch"]], [last], "o", color=NEAREST, ms=5, label="A(base), head solved")
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.axhline(1e-8, color="0.5", lw=0.8, ls=":")
        axes[0, column].set_title(_title(cell), fontsize=9)
    for row in axes:
        row[0].set_ylabel("training loss")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    return figure


def _path(cells: Cells) -> Any:
    """Test error along the path, one line a seed and their mean at common losses left out: seeds differ."""
    found = of(cells, "path")
    pairs: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for cell in found:
        p = cell["params"]
        pairs.setdefault((p["data"], p["model"]), {})[p["noise"]] = cell
    figure, axes = plt.subplots(1, len(pairs), figsize=(3.6 * len(pairs), 3.2), squeeze=False)
    for axis, (_, both) in zip(axes[0], sorted(pairs.items())):
        for noise, colour in ((0.0, NEAREST), (0.2, PAPER)):
            if noise not in both:
                continue
            for index, run in enumerate(both[noise]["result"]["runs"]):
                line = [(p["loss"], p["test_error"]) for p in run["points"]]
                label = f"{noise:.0%} of the labels wrong" if index == 0 else None
                axis.plot(*zip(*line), "o-", color=colour, lw=0.9, ms=2.5, alpha=0.8, label=label)
        axis.set(xscale="log", xlabel="training loss (lambda falls to the right)")
        axis.invert_xaxis()
        axis.set_ylim(bottom=0)
        axis.set_title(_title(next(iter(both.values())), base=False), fontsize=9)
    axes[0, 0].set_ylabel("test error, %")
    axes[0, 0].legend(fontsize=8)
    return figure


def _time(cells: Cells) -> Any:
    points = cells["times-mnist"]["result"]["points"]
    exponent, factor = certificate_time(cells)
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    n = [p["n"] for p in points]
    axis.plot(n, [p["seconds"] for p in points], "o", color=NEAREST, label="rank n proved, direct route")
    fitted = [x for x in n if x >= 1000]
    axis.plot(fitted, [factor * x**exponent for x in fitted], color=NEAREST, lw=1, label=f"n^{exponent:.2f}")
    axis.plot(
        n,
        [p["theorem_seconds"] for p in points],
        "s",
        color=BASE,
        ms=4,
        label="theorem's assumptions checked",
    )
    axis.set(xscale="log", yscale="log", xlabel="samples n (m = 1.1 n)", ylabel="seconds")
    axis.set_xticks(n, [f"{x:,}" for x in n])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(fontsize=8)
    return figure


def _width(cells: Cells) -> Any:
    found = of(cells, "width")
    figure, axes = plt.subplots(1, len(found), figsize=(3.3 * len(found), 3.2), sharey=True, squeeze=False)
    for axis, cell in zip(axes[0], found):
        for (beta, ratios), colour in zip(sorted(widths(cell).items()), (BASE, NEAREST, OTHER)):
            proved = {r: v for r, v in ratios.items() if v[1] > 0}
            median = [v[0] for v in proved.values()]
            low = [v[0] - v[1] for v in proved.values()]
            high = [v[2] - v[0] for v in proved.values()]
            axis.errorbar(
                list(proved),
                median,
                [low, high],
                fmt="o-",
                color=colour,
                ms=4,
                lw=1.2,
                label=f"beta = {beta:g}",
            )
        n = cell["result"]["points"][0]["n"]
        axis.set(yscale="log", xlabel="m / n")
        axis.set_title(f"{NAMES[cell['params']['data']]}, n = {n:,}", fontsize=9)
    axes[0, 0].set_ylabel("sigma_min(H1), proved lower bound")
    axes[0, 0].legend(fontsize=8)
    return figure
