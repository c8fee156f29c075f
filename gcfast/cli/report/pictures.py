"""The report's pictures, as SVG that takes its text colour from the page: it reads in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gcfast.plots import BASE, INK, NEAREST, TWO_PHASE, finish, new_figure, svg_text

_LEAST = 1e-300  # a logarithmic axis needs room below its smallest value


def loss_curves(values: Mapping[str, Any], narrow: bool = False) -> str:
    """Full training loss of the base optimizer and of A(base), with tau and the solved head."""
    figure, axes = new_figure(4.0, narrow)
    base_name = str(values["settings"]["base"])
    for name, label, colour in (
        ("base", f"{base_name} alone", BASE),
        ("two_phase", f"A({base_name})", TWO_PHASE),
    ):
        points = [point for point in values["curves"][name] if point["loss"] and point["loss"] > _LEAST]
        if points:
            epochs = [point["epoch"] for point in points]
            axes.plot(epochs, [point["loss"] for point in points], color=colour, label=label, lw=1.8)
    tau = values["steps"]["switch"] / values["steps"]["per_epoch"]
    axes.axvline(tau, color=INK, lw=1, ls=(0, (4, 3)))
    # At the foot of the line, where the curves are not.
    axes.annotate(
        "tau",
        (tau, 0),
        (-6, 6),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=INK,
        ha="right",
    )
    switch, final = values["loss"]["switch"], values["loss"]["final"]
    if switch and final and final > _LEAST:
        axes.plot([tau, tau], [switch, final], color=NEAREST, lw=1.8)
        axes.plot([tau], [final], "o", color=NEAREST, ms=7, label="nearest: the head, solved at tau")
        axes.annotate(f"{final:.1e}", (tau, final), (9, -3), textcoords="offset points", color=INK)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss on all training samples")
    axes.set_xlim(left=0)
    axes.margins(y=0.1)
    finish(axes, narrow)
    return svg_text(figure, f"loss{narrow:d}", "Training loss over epochs, logarithmic")


def lambda_path(values: Mapping[str, Any], narrow: bool = False) -> str:
    """The way from V_tau to the global minimum: training loss along falling regularisation."""
    figure, axes = new_figure(3.2, narrow, legend=False)
    points = [(weight, loss) for weight, loss in values["path"] if weight > _LEAST and loss > _LEAST]
    axes.plot(
        [weight for weight, _ in points], [loss for _, loss in points], "o-", color=NEAREST, lw=1.8, ms=4
    )
    infimum, target = values["loss"]["infimum"] or 0.0, values["settings"]["target_gap"]
    axes.axhline(infimum + target, color=INK, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        f"L* + target gap {target:.0e}",
        (0.0, infimum + target),
        (6, 5),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=INK,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    if len(points) > 1:
        axes.invert_xaxis()
    axes.set_xlabel("λ, falling to the right")
    axes.set_ylabel("training loss")
    axes.margins(y=0.12)
    finish(axes, narrow, legend=False)
    return svg_text(figure, f"path{narrow:d}", "Training loss along the path of falling lambda")


def singular_values(values: Mapping[str, Any], narrow: bool = False) -> str:
    """Estimated singular values of [features, 1], the proved bound, and where float32 rank gives up."""
    figure, axes = new_figure(3.2, narrow)
    # What equal samples leave is rounding, down to the smallest number there is: no axis has room for it.
    found = values["spectrum"] or [0.0]
    spectrum = [value for value in found if value > 1e-30 * found[0]]
    n, width = values["n"], values["width"]
    axes.plot(range(1, len(spectrum) + 1), spectrum, color=TWO_PHASE, lw=1.8, label="estimated")
    if spectrum:
        single = max(n, width + 1) * 2.0**-23 * spectrum[0]
        axes.axhline(single, color=INK, lw=1, ls=(0, (1, 2)), label="zero for float32 matrix_rank")
    bound = values["certificate"]["sigma_min_lower"]
    if bound and bound > 0:
        axes.axhline(bound, color=NEAREST, lw=1.8, label=f"proved: none is below {bound:.1e}")
    axes.set_yscale("log")
    axes.set_xlabel("index")
    axes.set_ylabel("singular value")
    axes.margins(y=0.1)
    finish(axes, narrow)
    return svg_text(
        figure, f"spectrum{narrow:d}", "Singular values of the features with the proved lower bound"
    )


def legend_colours() -> Sequence[tuple[str, str]]:
    """Colours of the three results, in the order of the table."""
    return (("base", BASE), ("two_phase", TWO_PHASE), ("nearest", NEAREST))
