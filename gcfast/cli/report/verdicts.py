"""One sentence on what a run reached, and why or why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """``level`` is good, partial or bad; the rest is for people."""

    level: str
    headline: str
    detail: str


def verdict(values: Mapping[str, Any]) -> Verdict:
    """What the run established, in plain words; never more than the certificate says."""
    status, n = values["certificate"]["status"], values["n"]
    loss, target = values["loss"], values["settings"]["target_gap"]
    gap = loss["gap"]
    if status != "holds":
        reason = values["certificate_details"].get("reason") or "There is no certificate."
        if gap is not None and gap <= target:
            # L* bounds every network from below, so a loss this close to it needs no further proof.
            return Verdict(
                "partial",
                f"The loss is within {gap:.1e} of the global minimum, though the condition "
                + ("fails" if status == "fails" else "is not proved"),
                f"{sentence(reason)} The loss reached, {loss['final']:.3g}, was measured against"
                f" L* = {loss['infimum']:.3g}, which no network can beat on this data.",
            )
        reached = "" if gap is None else f" The loss reached is {gap:.1e} above L* = {loss['infimum']:.3g}."
        headline = (
            "The condition fails: no guarantee for these weights"
            if status == "fails"
            else "Not decided: the condition is neither proved nor disproved"
        )
        return Verdict("bad" if status == "fails" else "partial", headline, sentence(reason) + reached)
    if gap is None:
        return Verdict(
            "partial",
            "The guarantee holds; phase two was not solved in this run",
            f"The features of all {n:,} samples have full rank, proved, so the head alone can reach the"
            " global"
            " minimum; the run did not get there.",
        )
    if gap > target:
        return Verdict(
            "partial",
            f"The guarantee holds; the loss is still {gap:.1e} above the global minimum",
            f"The target was {target:.0e}.",
        )
    return Verdict(
        "good",
        "Global minimum reached, with proof that nothing better exists",
        f"The training loss is {loss['final']:.1e}. On these {n:,} samples no network whatever can get below"
        f" L* = {loss['infimum']:.3g}, so at most {gap:.1e} is left to gain (target: {target:.0e})."
        + (_why(values)),
    )


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _why(values: Mapping[str, Any]) -> str:
    certificate, n = values["certificate"], values["n"]
    if certificate["route"] == "direct":
        return (
            f" The features of all {n:,} samples were proved linearly independent,"
            " so the last layer can fit any targets."
        )
    return (
        f" All {n:,} samples are distinct where the wide layer sees them, so for almost every setting of"
        " the hidden"
        " weights the last layer can fit any targets."
    )
