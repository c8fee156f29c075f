"""Eigenvalue ranges of layers as an SVG picture that reads in light and in dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from gcfast.errors import import_optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE, TWO_PHASE, NEAREST = "#4c8ed9", "#e0782f", "#1f9d6b"
# Stand-ins for the colours the page decides; matplotlib can write only fixed ones.
INK, _GRID = "#010203", "#040506"


class EigenvalueRow(Protocol):
    """One layer of the picture: any object with these values will do."""

    @property
    def name(self) -> str: ...
    @property
    def carries(self) -> bool: ...
    @property
    def lambda_min(self) -> float | None: ...
    @property
    def lambda_max(self) -> float | None: ...
    @property
    def lambda_min_lower(self) -> float: ...
    @property
    def rounding(self) -> float: ...


def eigenvalue_ranges(rows: Sequence[EigenvalueRow]) -> str:
    """Estimated range of the eigenvalues of each K_l, the proved bound, and rounding: a file of its own."""
    figure, axes = new_figure(0.9 + 0.3 * len(rows), narrow=False)
    axes.set_xscale("log")
    bars = [row for row in rows if row.lambda_max is not None and row.lambda_max > 0]
    left = min((0.1 * row.rounding for row in bars), default=1.0)  # what is at or below zero begins here
    labelled: set[str] = set()

    def once(label: str) -> str:
        new = label not in labelled
        labelled.add(label)
        return label if new else "_nolegend_"

    for at, row in enumerate(rows):
        if row.lambda_min is None or row.lambda_max is None or row.lambda_max <= 0:
            text = "p_l < n C" if row.lambda_min is None else "K_l = 0"
            axes.annotate(text, (left, at), (4, -3), textcoords="offset points", color=INK)
            continue
        colour = NEAREST if row.carries else TWO_PHASE
        label = once("could carry a guarantee" if row.carries else "could not")
        axes.plot([max(row.lambda_min, left), row.lambda_max], [at, at], color=colour, lw=5, label=label)
        axes.plot([row.rounding] * 2, [at - 0.35, at + 0.35], color=INK, lw=1.2)
        if row.lambda_min_lower > 0:
            axes.plot(
                [row.lambda_min_lower], [at], "|", color=BASE, ms=14, mew=2, label=once("proved: none below")
            )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("eigenvalues of K_l; black: rounding")
    finish(axes, narrow=False)
    longest = max(len(row.name) for row in rows)
    figure.subplots_adjust(left=min(0.5, (0.3 + 0.08 * longest) / 7.6))
    svg = svg_text(figure, "eigenvalues", "Eigenvalue ranges of the Jacobian Grams, layer by layer")
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" style="--grid: #ccc"', 1)


def new_figure(height: float, narrow: bool, legend: bool = True) -> tuple[Figure, Axes]:
    """Narrow is for telephones: the same letters on a smaller sheet, so that they stay readable."""
    figure_module = import_optional("matplotlib.figure", "the report's pictures")
    width, height = (4.0, 0.9 * height) if narrow else (7.6, height)
    figure: Figure = figure_module.Figure(figsize=(width, height))
    # Margins in inches; laying out by measuring every label takes longer than drawing.
    above = 0.1 if not legend else 0.75 if narrow else 0.35
    figure.subplots_adjust(0.7 / width, 0.55 / height, 1 - 0.1 / width, 1 - above / height)
    return figure, figure.add_subplot()


def finish(axes: Axes, narrow: bool, legend: bool = True) -> None:
    ticker = import_optional("matplotlib.ticker", "the report's pictures")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
    axes.tick_params(which="both", color=_GRID, labelcolor=INK)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_minor_locator(ticker.NullLocator())
            axis.set_major_formatter(ticker.FuncFormatter(_power_of_ten))
    axes.grid(color=_GRID, lw=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    if legend:
        # Above the axes, where no curve can be under it.
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(
            handles,
            labels,
            loc="upper left",
            ncols=1 if narrow else 3,
            frameon=False,
            labelcolor=INK,
            fontsize=9,
        )


def _power_of_ten(value: float, _: object) -> str:
    if value <= 0:  # where an axis reaches below the smallest number there is
        return "0"
    # Raised digits of the font itself: typesetting formulas is slow.
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def svg_text(figure: Figure, salt: str, title: str) -> str:
    matplotlib = import_optional("matplotlib", "the report's pictures")
    buffer = io.StringIO()
    # The salt makes ids of different pictures differ: they share one page.
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Inside HTML none of these is needed, and without them the page names no address at all.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text, count=0)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    for identifier in set(re.findall(r'\bid="([^"]+)"', text)):
        text = re.sub(
            rf'(id="|href="#|url\(#){re.escape(identifier)}(?=["\)])', rf"\g<1>{salt}-{identifier}", text
        )
    text = text.replace(INK, "currentColor").replace(_GRID, "var(--grid)")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()
