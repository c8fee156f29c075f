"""The theorem route of certify: a wide analytic layer gives rank(H1) = n for almost every hidden weight.

Pinkus (1999, Theorem 5.1): the wide layer's activation is analytic and not a polynomial, m >= n, and the rows
z_1, ..., z_n that enter the layer act(Q z + c) are pairwise distinct, as stored.
"""

from __future__ import annotations

from torch import Tensor, nn

from gcfast.certificate.certificate import Status
from gcfast.certificate.evidence import Evidence
from gcfast.features import Features, TrainingSet, WideFeatures, equal_rows
from gcfast.model import WideLayerFound, activation_verdict, analyticity


def theorem_applies(
    evidence: Evidence,
    model: object,
    training_set: TrainingSet | None,
    features: Features,
    duplicate_groups: list[list[int]],
    forced: bool,
) -> bool:
    """Whether every assumption of the theorem holds; what is found of each is added to ``evidence``.

    ``training_set`` is None where features of a wide layer were given instead of a model. ``forced``: the
    caller asked for this route alone, so a model that it does not fit is refused by ValueError.
    """
    if training_set is not None:
        wide, below = training_set.wide, training_set.below
    else:
        wide, below = _layer_of(features)
    if wide is None or below is None:
        evidence.note(
            "wide layer",
            "fails",
            "what enters the head is not act(Q z + c) of a recognised layer; gcfast.widen inserts one",
        )
        if forced:
            raise ValueError(
                "route: the theorem needs a wide layer act(Q z + c) before the head, and the model has "
                "none; use gcfast.widen"
            )
        return False
    ok = not wide.polynomial
    evidence.note(
        "wide layer",
        "holds" if ok else "fails",
        f"{wide.name!r} is {wide.activation_name}(Q z + c), {wide.d} to {wide.m}, "
        + ("not a polynomial" if ok else "a polynomial"),
    )
    if wide.m < evidence.n:
        evidence.note(
            "width of the wide layer",
            "fails",
            f"m = {wide.m} < n = {evidence.n}; the theorem needs m >= n (gcfast.widen)",
        )
        ok = False
    if training_set is None:
        bad = [] if wide.analytic else [f"{wide.activation_name} is not analytic"]
        certain = True
    else:
        assert isinstance(model, nn.Module)
        found = analyticity(model, training_set.head, training_set.first_batch)
        bad = [str(f) for f in found if f.verdict != "analytic"]
        certain = any(f.verdict == "not analytic" for f in found)
    if bad:
        worst: Status = "fails" if certain else "unknown"
        evidence.note(
            "analytic in the hidden weights",
            worst,
            "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else ""),
        )
        if forced:
            raise ValueError(
                "route: the theorem needs features that are real analytic in the hidden weights; "
                f"{'; '.join(bad[:5])}. Use route='direct'"
            )
        ok = False
    else:
        what = (
            "every operator before the head"
            if training_set is not None
            else "the wide layer, in its weights,"
        )
        evidence.note("analytic in the hidden weights", "holds", f"{what} is real analytic")
    equal = duplicate_groups if training_set is None else equal_rows(below)
    if equal:
        for group in equal:
            evidence.add_offender("equal rows below the wide layer", group)
        evidence.note(
            "distinct rows below the wide layer",
            "unknown",
            f"{len(equal)} groups of equal rows at these weights; other hidden weights may separate them",
        )
        ok = False
    else:
        evidence.note(
            "distinct rows below the wide layer",
            "holds",
            f"all {evidence.n} stored rows of width {wide.d} are pairwise distinct, exactly",
        )
    return ok


def _layer_of(features: Features) -> tuple[WideLayerFound, Tensor]:
    """The wide layer whose features were given without a model, and the rows z that enter it."""
    assert isinstance(features, WideFeatures)
    name = features.settings["activation"]
    analytic = activation_verdict(name)[0] == "analytic"
    found = WideLayerFound("wide", "wide", features.d, features.m, name, analytic, False, nn.Identity())
    return found, features.z
