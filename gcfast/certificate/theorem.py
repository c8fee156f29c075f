"""The theorem route of certify: a wide analytic layer gives rank(H1) = n for almost every hidden weight.

Pinkus (1999, Theorem 5.1): the wide layer's activation is analytic and not a polynomial, m >= n, and the rows
z_1, ..., z_n that enter the layer act(Q z + c) are pairwise distinct, as stored. The theorem speaks of Q and
c that are free: no mask, no sharing, no hook, and moved by the Gaussian step or drawn anew.

Without thresholds c the rows must differ up to sign as well, z_i != -z_j, and none may be zero: tanh(Q z) of
{z, -z} has half the rank. Proof: act(t) = sum_k a_k t^k near 0 with infinitely many a_k != 0, so that
sum_i b_i act(<q, z_i>) = 0 for all q gives sum_i b_i t_i^k = 0 for those k, with t_i = <q, z_i>. For almost
every q the t_i are not zero and differ in absolute value; divided by the largest |t_i|^k, as k grows, the
equation says that its b_i is zero, and so one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gcfast.certificate.certificate import Status
from gcfast.certificate.evidence import Evidence
from gcfast.features import Features, TrainingSet, WideFeatures, equal_rows, equal_samples
from gcfast.model import Draw, WideLayerFound, activation_verdict, analyticity, draw_of, hidden_parameters

_LOOKED_AT = 256  # numbers of Q, and of c, whose values are counted


def theorem_applies(
    evidence: Evidence,
    model: object,
    training_set: TrainingSet | None,
    features: Features,
    duplicate_groups: list[list[int]],
    forced: bool,
) -> str | None:
    """What the theorem says, in words, if every assumption holds; each is noted in ``evidence``.

    ``training_set`` is None where features of a wide layer were given instead of a model. ``forced``: the
    caller asked for this route alone, so a model that it does not fit is refused by ValueError.
    """
    if training_set is not None:
        wide, below = training_set.wide, training_set.below
    else:
        wide, below = _layer_of(features)
    if wide is None:
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
        return None
    formula = f"{wide.activation_name}(Q z{' + c' if wide.thresholds else ''})"
    if wide.caveat is not None:
        evidence.note(
            "wide layer",
            "unknown",
            f"{wide.linear_name!r} is not {formula} with Q and c free: {wide.caveat}; the theorem needs a "
            "plain gcfast.WideLayer, or nn.Linear and activation, the direct route does not",
        )
        return None
    assert below is not None
    ok = not wide.polynomial
    evidence.note(
        "wide layer",
        "holds" if ok else "fails",
        f"{wide.name!r} is {formula}, {wide.d} to {wide.m}, "
        + ("not a polynomial" if ok else "a polynomial"),
    )
    parts = wide.module._parameters if training_set is not None else features.given  # type: ignore[attr-defined]
    ok &= _enough_units(evidence, wide, [p for p in parts.values() if p is not None])
    ok &= _analytic(evidence, wide, model, training_set, forced)
    ok &= _distinct(evidence, wide, below, duplicate_groups if training_set is None else None)
    if not wide.thresholds:
        ok &= _distinct_up_to_sign(evidence, below)
    hidden = {} if training_set is None else hidden_parameters(model, training_set.head)  # type: ignore[arg-type]
    free, words = _drawn(evidence, {f"{wide.linear_name}.{key}": p for key, p in parts.items()}, hidden)
    if not (ok and free):
        return None
    if not wide.thresholds:
        words += "; the layer has no thresholds c, so rows were compared up to sign"
    return f"the theorem's assumptions hold: {words}"


def _enough_units(evidence: Evidence, wide: WideLayerFound, parts: list[Tensor]) -> bool:
    """Whether n units are there, and not as copies of others, as where a layer was widened by copying."""
    name = "width of the wide layer"
    if wide.m < evidence.n:
        evidence.note(
            name, "fails", f"m = {wide.m} < n = {evidence.n}; the theorem needs m >= n (gcfast.widen)"
        )
        return False
    different = wide.m - sum(len(group) - 1 for group in equal_samples([p.detach() for p in parts]))
    if different < evidence.n:
        found = f"of {wide.m} units only {different} differ, and n = {evidence.n} are needed"
        evidence.note(name, "unknown", f"{found}; the Gaussian step of TwoPhase makes copies differ")
        return False
    return True


def _analytic(
    evidence: Evidence, wide: WideLayerFound, model: object, training_set: TrainingSet | None, forced: bool
) -> bool:
    name = "analytic in the hidden weights"
    if training_set is None:
        bad = [] if wide.analytic else [f"{wide.activation_name} is not analytic"]
        certain = True
    else:
        assert isinstance(model, nn.Module)
        found = analyticity(model, training_set.head, training_set.first_batch)
        bad = [str(f) for f in found if f.verdict != "analytic"]
        certain = any(f.verdict == "not analytic" for f in found)
    if not bad:
        what = "the wide layer, in its weights," if training_set is None else "every operator before the head"
        evidence.note(name, "holds", f"{what} is real analytic")
        return True
    worst: Status = "fails" if certain else "unknown"
    words = "; ".join(bad if len(bad) <= 5 else [*bad[:5], "..."])
    evidence.note(name, worst, words)
    if forced:
        raise ValueError(
            "route: the theorem needs features that are real analytic in the hidden weights; "
            f"{words}. Use route='direct'"
        )
    return False


def _distinct(evidence: Evidence, wide: WideLayerFound, below: Tensor, known: list[list[int]] | None) -> bool:
    """Whether the rows below the layer are pairwise distinct; ``known``: their groups of equal ones."""
    name = "distinct rows below the wide layer"
    equal = equal_rows(below) if known is None else known
    for group in equal:
        evidence.add_offender("equal rows below the wide layer", group)
    if equal:
        found = f"{len(equal)} groups of equal rows at these weights; other hidden weights may separate them"
        evidence.note(name, "unknown", found)
        return False
    found = f"all {evidence.n} stored rows of width {wide.d} are pairwise distinct, exactly"
    evidence.note(name, "holds", found)
    return True


def _distinct_up_to_sign(evidence: Evidence, below: Tensor) -> bool:
    """Whether z_i != -z_j for all i and j, i = j among them, which is z_i != 0."""
    name = "rows distinct up to sign, for a layer without thresholds"
    first = below.gather(1, (below != 0).to(below.dtype).argmax(1, keepdim=True))
    mirrored = below * first.sign()  # exact; rows that are equal or opposite become equal
    zero = (first == 0).nonzero()[:, 0].tolist()
    opposite = equal_rows(mirrored)
    way_out = "bias=True in the layer, or gcfast.WideLayer, makes distinct rows enough"
    for group in [zero[:1], *opposite] if zero else opposite:
        evidence.add_offender("rows that are zero or opposite below the wide layer", group)
    if zero or opposite:
        what = f"{len(zero)} rows are zero, {len(opposite)} groups are equal or opposite"
        evidence.note(name, "unknown", f"{what}: without c their features are tied whatever Q is; {way_out}")
        return False
    evidence.note(name, "holds", f"no two of {evidence.n} stored rows are opposite and none is zero, exactly")
    return True


def _drawn(
    evidence: Evidence, parts: Mapping[str, Tensor | None], hidden: Mapping[str, Tensor]
) -> tuple[bool, str]:
    """Whether Q and c may be taken for drawn from a density, and the theorem's conclusion in words.

    That of a step is theirs only where no weight of ``hidden`` has moved since, for it may by what they are.
    """
    name = "Q and c drawn from a density"
    draws: dict[str, Draw | None] = {key: draw_of(p) for key, p in parts.items() if p is not None}
    left_out = [key for key, draw in draws.items() if draw is not None and draw.scale == 0]
    odd = None
    if left_out:
        odd = (
            f"{left_out[0]!r} was left out of the Gaussian step (it did not require gradients, or the "
            "perturbation is 0 or below the spacing of its numbers)"
        )
    draw = next(iter(draws.values()), None)
    recorded = draw is not None and None not in draws.values()
    if odd is None and not recorded:
        odd = next((why for key, p in parts.items() if p is not None and (why := _no_density(key, p))), None)
    if odd is not None:
        way_out = "let TwoPhase train and perturb all of the wide layer, or use the direct route"
        evidence.note(name, "unknown", f"{odd}: {way_out}")
        return False, ""
    since = next((key for key, p in hidden.items() if draw_of(p) is None), None) if recorded else None
    if draw is None or not recorded or since is not None:
        found = "no record says where these weights come from: gcfast.TwoPhase keeps one when it switches"
        if since is not None:
            found = (
                f"{since!r} has changed since TwoPhase drew them, and so may rows that were chosen by them"
            )
        evidence.note(name, "not checked", found)
        return True, "almost every choice of Q and c gives rank(H1) = n in exact arithmetic"
    evidence.note(
        name,
        "holds",
        f"TwoPhase added {draw.scale:g} N(0, I) to all of them after step {draw.step} (seed {draw.seed}), "
        "and they are as it left them, bit by bit",
    )
    return (
        True,
        "with probability one over the Gaussian step that gave Q and c, rank(H1) = n in exact arithmetic",
    )


def _no_density(key: str, part: Tensor) -> str | None:
    """Numbers of a weight that no density gives, in words: zeros, as under a mask, or many that are equal."""
    numbers, eps = part.detach().reshape(-1), torch.finfo(part.dtype).eps
    zeros = int((numbers == 0).sum())
    if zeros > 1 + 4 * eps * len(numbers):  # a generator may round to zero
        return f"{zeros} of the {len(numbers)} numbers of {key!r} are exactly 0, which no density gives"
    generator = torch.Generator("cpu").manual_seed(0)
    some = torch.randint(len(numbers), (_LOOKED_AT,), generator=generator, dtype=torch.int64, device="cpu")
    index = some.unique().to(part.device)
    different = len(numbers[index].unique())
    if 1 < len(index) >= 2 * different:
        return f"{len(index)} numbers of {key!r} have {different} values, which no density gives"
    return None


def _layer_of(features: Features) -> tuple[WideLayerFound, Tensor]:
    """The wide layer whose features were given without a model, and the rows z that enter it."""
    assert isinstance(features, WideFeatures)
    name = features.settings["activation"]
    found = WideLayerFound(
        name="wide",
        linear_name="wide",
        d=features.d,
        m=features.m,
        activation_name=name,
        analytic=activation_verdict(name)[0] == "analytic",
        polynomial=False,
        module=nn.Identity(),
        formula=nn.Identity(),
    )
    return found, features.z
