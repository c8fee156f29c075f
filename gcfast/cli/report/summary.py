"""A run's outcome as a few lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcfast.cli.progress import format_seconds
from gcfast.cli.report.verdicts import verdict


def print_summary(values: Mapping[str, Any]) -> None:
    """The run's outcome for a terminal."""
    certificate, loss, errors, seconds = (
        values[key] for key in ("certificate", "loss", "test_error", "seconds")
    )
    judged = verdict(values)
    print(judged.headline.upper() if judged.level == "good" else judged.headline)
    if certificate["status"]:
        route = f" ({certificate['route']})" if certificate["route"] else ""
        print(f"certificate  {certificate['status']}{route}: {values['certificate_details']['reason']}")
        if certificate["sigma_min_lower"]:
            print(f"             smallest singular value >= {certificate['sigma_min_lower']:.1e}, proved")
    if loss["gap"] is not None:
        word = "<=" if loss["gap"] <= values["settings"]["target_gap"] else ">"
        print(
            f"gap          L - L* = {loss['gap']:.1e} {word} target {values['settings']['target_gap']:.0e}"
            f"   (L* = {loss['infimum']:.3g}, L at tau = {loss['switch']:.1e})"
        )
    base = values["settings"]["base"]
    rows = (
        ("base", f"{base} alone", ("base",)),
        ("two_phase", f"A({base})", ("phase_one", "phase_two")),
        ("nearest", f"A({base}), solved", ("phase_one", "solve")),
    )
    print(f"\n{'':<20}{'training loss':>14}{'test error':>13}{'time':>14}")
    for key, name, parts in rows:
        final, error = values["final_loss"][key], errors[key]
        known = [seconds[part] for part in parts if seconds[part] is not None]
        time_text = format_seconds(sum(known)) if len(known) == len(parts) else "-"
        loss_text = "-" if final is None else f"{final:.1e}"
        error_text = "-" if error is None else f"{error:.2f} %"
        print(f"{name:<20}{loss_text:>14}{error_text:>13}{time_text:>14}")
    if seconds["certify"] is not None:
        print(f"{'certificate':<20}{'':>14}{'':>13}{format_seconds(seconds['certify']):>14}")
    for note in values["notes"]:
        print(f"note: {note}")
    print()
